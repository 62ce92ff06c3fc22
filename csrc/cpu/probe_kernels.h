// Included once per instruction set, with ISA, VECTOR, WIDTH, SPREAD(scalar) and FMA(a, b, c) defined.
#pragma once

#include "cpu/probe.h"

#define LLAVA_FAST_JOIN_(a, b) a##b
#define LLAVA_FAST_JOIN(a, b) LLAVA_FAST_JOIN_(a, b)

namespace llava_fast {

int LLAVA_FAST_JOIN(fma_rounds_, ISA)(int64_t rounds, float* out) {
    VECTOR chains[12];  // 4 cycles of latency on 2 units need 8; with the two constants they fit 16 registers
    for (int i = 0; i < 12; ++i) chains[i] = SPREAD(1.0f + 0.001f * static_cast<float>(i));
    const VECTOR scale = SPREAD(0.999f), shift = SPREAD(0.001f);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) chains[i] = FMA(chains[i], scale, shift);
    }
    for (int i = 0; i < 12; ++i) *out += chains[i][0];
    return WIDTH;
}

}  // namespace llava_fast
