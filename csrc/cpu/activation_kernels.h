// Activations element by element, and SwiGLU; the including file defines ISA.
#pragma once

#include "cpu/rowwise.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

// exp(-x), kept finite for the reciprocal of 1 + exp(-x).
static inline vec odds(vec x) {
    return exp(min(splat(80.0f), splat(0.0f) - x));
}
static inline vec sigmoid(vec x) {
    return reciprocal(splat(1.0f) + odds(x));
}

// The normal distribution function, 1/2 + x P(x^2) / Q(x^2): our own minimax fit, 1.4e-8 off for |x| < 5.3 before rounding. Past that it
// overshoots, so that the limits give exactly 0 and 1. Half the work of an erf from an exponential, which bf16 needs to keep up with
// memory.
static inline vec normal_cdf(vec x) {
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
    static inline vec inner(vec x) {
        if (kKind == Activation::gelu_pytorch_tanh) {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
            return x * fma(x * x, splat(2.0f * 0.7978845608f * 0.044715f), splat(2.0f * 0.7978845608f));
        }
        return kKind == Activation::quick_gelu ? x * splat(1.702f) : x;
    }
    static inline vec inner_slope(vec x) {
        if (kKind == Activation::gelu_pytorch_tanh) {
            return fma(x * x, splat(6.0f * 0.7978845608f * 0.044715f), splat(2.0f * 0.7978845608f));
        }
        return splat(kKind == Activation::quick_gelu ? 1.702f : 1.0f);
    }
    static inline vec value(vec x) { return x * (kKind == Activation::gelu ? normal_cdf(x) : sigmoid(inner(x))); }
    static inline vec slope(vec x) {
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

template <typename T, Activation kKind>
static void activation_forward(const ActivationTask& task) {
    share(task.n, task.threads, [&](int64_t first, int64_t count) {
        const T* x = static_cast<const T*>(task.x) + first;
        write_row(static_cast<T*>(task.out) + first, count, task.stream,
                  [&](int64_t i, int64_t n) { return Function<kKind>::value(load_some(x + i, n)); });
    });
}

template <typename T, Activation kKind>
static void activation_backward(const ActivationTask& task) {
    share(task.n, task.threads, [&](int64_t first, int64_t count) {
        const T *x = static_cast<const T*>(task.x) + first, *grad = static_cast<const T*>(task.grad) + first;
        write_row(static_cast<T*>(task.out) + first, count, task.stream,
                  [&](int64_t i, int64_t n) { return load_some(grad + i, n) * Function<kKind>::slope(load_some(x + i, n)); });
    });
}

template <typename T>
static void swiglu_forward(const SwigluTask& task) {
    const int64_t F = task.F;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t t = 0; t < task.T; ++t) {
        const T *gate = static_cast<const T*>(task.gate_up) + t * 2 * F, *up = gate + F;
        write_row(static_cast<T*>(task.out) + t * F, F, task.stream, [&](int64_t i, int64_t n) {
            const vec g = load_some(gate + i, n);
            return g * sigmoid(g) * load_some(up + i, n);
        });
        if (task.stream) fence();
    }
}

template <typename T>
static void swiglu_backward(const SwigluTask& task) {
    const int64_t F = task.F;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t t = 0; t < task.T; ++t) {
        const T *gate = static_cast<const T*>(task.gate_up) + t * 2 * F, *up = gate + F, *grad = static_cast<const T*>(task.grad) + t * F;
        T *grad_gate = static_cast<T*>(task.out) + t * 2 * F, *grad_up = grad_gate + F;
        write_row(grad_gate, F, task.stream, [&](int64_t i, int64_t n) {
            const vec g = load_some(gate + i, n), s = sigmoid(g), dy = load_some(grad + i, n);
            store_some(grad_up + i, dy * g * s, n);
            return dy * load_some(up + i, n) * fma(g * s, splat(1.0f) - s, s);
        });
        if (task.stream) fence();
    }
}

}  // namespace ISA
}  // namespace llava_fast
