// Activations element by element, and SwiGLU; the including file defines ISA.
#pragma once

#include "cpu/rows.h"
#include "cpu/rowwise.h"

namespace llava_fast {
namespace ISA {

// exp(-x), kept finite for the reciprocal of 1 + exp(-x).
static inline __attribute__((always_inline)) vec odds(vec x) {
    return exp(min(splat(80.0f), splat(0.0f) - x));
}
static inline __attribute__((always_inline)) vec sigmoid(vec x) {
    return reciprocal(splat(1.0f) + odds(x));
}

// The normal distribution function, 1/2 + x P(x^2) / Q(x^2): our own minimax fit, 1.4e-8 off for |x| < 5.3 before rounding. Past that it
// overshoots, so that the limits give exactly 0 and 1. Half the work of an erf from an exponential, which bf16 needs to keep up with
// memory.
static inline __attribute__((always_inline)) vec normal_cdf(vec x) {
    x = min(splat(6.0f), max(splat(-6.0f), x));
    const vec z = x * x;
    vec p = splat(2.207665366e-08f);
    p = fma(p, z, splat(6.307065236e-06f));
    p = fma(p, z, splat(1.716086867e-04f));
    p = fma(p, z, splat(4.693158881e-03f));
    p = fma(p, z, splat(3.419370725e-02f));
    p = fma(p, z, splat(3.989422357e-01f));
    vec q = splat(1.174515539e-06f);
    q = fma(q, z, splat(7.420378485e-05f));
    q = fma(q, z, splat(1.900424492e-03f));
    q = fma(q, z, splat(2.882818260e-02f));
    q = fma(q, z, splat(2.523768612e-01f));
    q = fma(q, z, splat(1.0f));
    return min(splat(1.0f), max(splat(0.0f), fma(x * p, reciprocal(q), splat(0.5f))));
}

// f(x) and f'(x). The sigmoid kinds are x sigmoid(u(x)), with derivative s + x s (1 - s) u'(x).
template <Activation kKind>
struct Function {
    static inline __attribute__((always_inline)) vec inner(vec x) {
        if (kKind == Activation::gelu_pytorch_tanh) {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
            return x * fma(x * x, splat(2.0f * 0.7978845608f * 0.044715f), splat(2.0f * 0.7978845608f));
        }
        return kKind == Activation::quick_gelu ? x * splat(1.702f) : x;
    }
    static inline __attribute__((always_inline)) vec inner_slope(vec x) {
        if (kKind == Activation::gelu_pytorch_tanh) {
            return fma(x * x, splat(6.0f * 0.7978845608f * 0.044715f), splat(2.0f * 0.7978845608f));
        }
        return splat(kKind == Activation::quick_gelu ? 1.702f : 1.0f);
    }
    static inline __attribute__((always_inline)) vec value(vec x) {
        return x * (kKind == Activation::gelu ? normal_cdf(x) : sigmoid(inner(x)));
    }
    static inline __attribute__((always_inline)) vec slope(vec x) {
        if (kKind == Activation::gelu) {
            return fma(x * splat(0.3989422804f), exp(x * x * splat(-0.5f)), normal_cdf(x));
        }
        // 1 - s is taken as odds * s: a difference loses what u'(x) then makes large.
        const vec o = odds(inner(x)), s = reciprocal(splat(1.0f) + o);
        return fma(x * s * (o * s), inner_slope(x), s);
    }
};

// f(first, count) for each thread's part of n elements, in whole lines but for the last.
template <typename F>
static inline void share(int64_t n, int threads, const F& f) {
    const int64_t blocks = (n + 63) / 64;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
        const int64_t first = blocks * part / threads * 64, last = blocks * (part + 1) / threads * 64;
        f(first, (last < n ? last : n) - first);
        fence();
    }
}

// What multiplies x, and the slope, as functions of T's numbers: by the formulas above, or by the task's table.
template <typename T, Activation kKind>
struct Formula {
    explicit Formula(const Curve&) {}
    inline __attribute__((always_inline)) vec value(vec x) const { return Function<kKind>::value(x); }
    inline __attribute__((always_inline)) vec slope(vec x) const { return Function<kKind>::slope(x); }
    inline __attribute__((always_inline)) vec sigmoid(vec x) const { return ISA::sigmoid(x); }  // of kKind silu
};

#if defined(__AVX512F__)
// bf16 arrives faster than the formulas compute (30 to 45 instructions a register, where memory leaves time for 25), and needs less:
// the odd part by a cubic, its coefficients picked from two registers each by the interval's number.
template <Activation kKind>
struct Formula<bf16, kKind> {
    vec low[4], high[4], intervals, step, last;
    explicit Formula(const Curve& curve)
        : intervals(splat(1.0f / curve.step)), step(splat(curve.step)), last(splat(curve.step * (kIntervals - 1))) {
        for (int i = 0; i < 4; ++i) low[i] = load(curve.coefficient[i]), high[i] = load(curve.coefficient[i] + kWidth);
    }
    inline __attribute__((always_inline)) vec odd_part(vec a) const {              // of a = |x|
        a = min(last, a);                                                          // NaN comes through
        const vec magic = splat(12582912.0f), shifted = fma(a, intervals, magic);  // 1.5 2^23: the low bits are the nearest integer
        const __m512i index = _mm512_castps_si512(shifted);
        const vec r = _mm512_fnmadd_ps(shifted - magic, step, a);
        vec p = _mm512_permutex2var_ps(low[3], index, high[3]);
        p = fma(p, r, _mm512_permutex2var_ps(low[2], index, high[2]));
        p = fma(p, r, _mm512_permutex2var_ps(low[1], index, high[1]));
        return fma(p, r, _mm512_permutex2var_ps(low[0], index, high[0]));
    }
    inline __attribute__((always_inline)) vec value(vec x) const {  // x / 2 + x odd(x)
        const vec a = _mm512_abs_ps(x);
        return fma(a, odd_part(a), x * splat(0.5f));
    }
    inline __attribute__((always_inline)) vec slope(vec x) const {
        const __m512i odd = _mm512_castps_si512(odd_part(_mm512_abs_ps(x))), sign = _mm512_set1_epi32(INT32_MIN);
        return splat(0.5f) + _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(x), odd, 0x6a));  // odd ^ (x & sign)
    }
    inline __attribute__((always_inline)) vec sigmoid(vec x) const { return slope(x); }  // from the table of values
};
#endif

template <typename T, Activation kKind>
static void activation_forward(const ActivationTask& task) {
    share(task.n, task.threads, [&](int64_t first, int64_t count) {
        const Formula<T, kKind> formula(*task.curve);
        const T* x = static_cast<const T*>(task.x) + first;
        write_row(static_cast<T*>(task.out) + first, count, task.stream,
                  [&](int64_t i, int64_t n) { return both([&](vec v) { return formula.value(v); }, load_ahead(x + i, n)); });
    });
}

template <typename T, Activation kKind>
static void activation_backward(const ActivationTask& task) {
    share(task.n, task.threads, [&](int64_t first, int64_t count) {
        const Formula<T, kKind> formula(*task.curve);
        const T *x = static_cast<const T*>(task.x) + first, *grad = static_cast<const T*>(task.grad) + first;
        write_row(static_cast<T*>(task.out) + first, count, task.stream, [&](int64_t i, int64_t n) {
            return load_ahead(grad + i, n) * both([&](vec v) { return formula.slope(v); }, load_ahead(x + i, n));
        });
    });
}

template <typename T>
static void swiglu_forward(const SwigluTask& task) {
    const int64_t F = task.F;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < task.T; ++t) {
            const Formula<T, Activation::silu> formula(*task.curve);
            const T *gate = static_cast<const T*>(task.gate_up) + t * 2 * F, *up = gate + F;
            write_row(static_cast<T*>(task.out) + t * F, F, task.stream, [&](int64_t i, int64_t n) {
                return both([&](vec g) { return formula.value(g); }, load_ahead(gate + i, n)) * load_ahead(up + i, n);
            });
        }
        if (task.stream) fence();
    }
}

template <typename T>
static void swiglu_backward(const SwigluTask& task) {
    constexpr int64_t kBlock = 4096 / sizeof(T);
    const int64_t F = task.F;
    const vec one = splat(1.0f);
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < task.T; ++t) {
            const Formula<T, Activation::silu> formula(*task.curve);
            const T *gate = static_cast<const T*>(task.gate_up) + t * 2 * F, *up = gate + F,
                    *grad = static_cast<const T*>(task.grad) + t * F;
            T *grad_gate = static_cast<T*>(task.out) + t * 2 * F, *grad_up = grad_gate + F;
            for (int64_t first = 0; first < F; first += kBlock) {
                const int64_t count = F - first < kBlock ? F - first : kBlock;
                alignas(64) T block[kBlock];
                T* ups = task.stream ? block : grad_up + first;
                write_row(grad_gate + first, count, task.stream, [&](int64_t i, int64_t n) {
                    const pair g = load_ahead(gate + first + i, n), dy = load_ahead(grad + first + i, n);
                    const pair s = both([&](vec v) { return formula.sigmoid(v); }, g), silu = g * s;
                    store_pair(ups + i, dy * silu, n);
                    return dy * load_ahead(up + first + i, n) * both([&](vec x, vec y) { return fma(x, one - y, y); }, silu, s);
                });
                if (task.stream) stream_copy(grad_up + first, block, count);
            }
        }
        if (task.stream) fence();
    }
}

}  // namespace ISA
}  // namespace llava_fast
