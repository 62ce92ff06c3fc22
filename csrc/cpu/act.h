// Activations of one register, for the instruction set of the including file (vec.h); relative errors of a few roundings.
#pragma once

#include "cpu/linear.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

static inline vec sigmoid(vec x) {
    return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), Phi(-a) = erfc(t) / 2, t = a / sqrt 2: no difference of close numbers, so the tails keep
// their relative accuracy. erfc(t) = exp(-t^2) erfcx(t), and (1 + 2t) erfcx(t) is a polynomial in (t - 2) / (t + 2), fitted on
// [0, 10.6] to 2e-8 (the form is Shepherd and Laframboise's, 1981).
static inline vec gelu(vec x) {
    const vec a = min(splat(15.0f), max(x, splat(0.0f) - x));  // past 15 the tail is 0; an infinity would make a NaN below
    const vec t = a * splat(0.707106781186547524f);
    const vec q = (t - splat(2.0f)) / (t + splat(2.0f));
    vec p = splat(-4.077201774e-04f);
    p = fma(p, q, splat(-1.237999209e-03f));
    p = fma(p, q, splat(1.320776996e-03f));
    p = fma(p, q, splat(8.640138453e-03f));
    p = fma(p, q, splat(-8.062509770e-03f));
    p = fma(p, q, splat(-5.420708323e-02f));
    p = fma(p, q, splat(1.640557656e-01f));
    p = fma(p, q, splat(-1.660311343e-01f));
    p = fma(p, q, splat(-9.276400345e-02f));
    p = fma(p, q, splat(1.276978389e+00f));
    // exp(-a^2 / 2): the rounding of the square would be multiplied by a^2 / 2, so it is put back.
    const vec half = a * splat(0.5f), square = half * a, rest = fma(half, a, splat(0.0f) - square);
    const vec e = exp(splat(0.0f) - square);
    const vec tail = splat(0.5f) * fma(splat(0.0f) - e, rest, e) * p / fma(splat(2.0f), t, splat(1.0f));
    return max(x, splat(0.0f)) - a * tail;
}

static inline vec gelu_tanh(vec x) {
    // x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const vec cubic = fma(x * x, splat(0.044715f * 1.5957691216057308f), splat(1.5957691216057308f));
    return x * sigmoid(x * cubic);
}

template <Act act>
static inline vec activate(vec x) {
    if constexpr (act == Act::gelu) return gelu(x);
    if constexpr (act == Act::gelu_tanh) return gelu_tanh(x);
    if constexpr (act == Act::quick_gelu) return x * sigmoid(splat(1.702f) * x);
    if constexpr (act == Act::silu) return x * sigmoid(x);
    return x;
}

}  // namespace ISA
}  // namespace llava_fast
