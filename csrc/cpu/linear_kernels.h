// The loops of the linear op, compiled once per instruction set; the including file defines ISA to the set's name.
//
// Few rows: every weight is read once from memory and used for all rows, so memory's speed is the limit; dot products along I, no
// packing. Many rows: the arithmetic is the limit; see linear_gemm.h.
//
// Only static and templated functions inside the namespace of the instruction set, and nothing from the standard library:
// see half.h for the reason.
#pragma once

#include "cpu/linear_gemm.h"
#include "cpu/linear_gemv.h"

namespace llava_fast {
namespace ISA {

template <typename T, typename W>
static void run(const LinearTask& task) {
    if (task.M <= kFewRows && !task.invariant) {
        few_rows<T, W>(task);
    } else {
        many_rows<T, W>(task);
    }
}

template <typename T>
static void run_as(const LinearTask& task) {
    switch (task.weight_type) {
        case WeightType::f32:
            return run<T, float>(task);
        case WeightType::bf16:
            return run<T, bf16>(task);
        case WeightType::f16:
            return run<T, f16>(task);
        case WeightType::int8:
            return run<T, int8_t>(task);
        case WeightType::int4:
            return run<T, nibbles>(task);
    }
}

}  // namespace ISA

void LLAVA_FAST_JOIN(linear_, ISA)(const LinearTask& task) {
    switch (task.dtype) {
        case DType::f32:
            return ISA::run_as<float>(task);
        case DType::bf16:
            return ISA::run_as<bf16>(task);
        case DType::f16:
            return ISA::run_as<f16>(task);
        case DType::f64:
        case DType::e4m3:
            return;  // refused by the caller
    }
}

}  // namespace llava_fast
