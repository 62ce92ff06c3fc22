// Ops that read each row (or element) once and hardly compute: norms, rotary embedding, activations. The formulas are in
// kernels/norm.py, kernels/rope.py and kernels/activation.py.
//
// Arrays are contiguous unless a stride is given (in elements). fp32, bf16 and fp16; arithmetic in fp32. Results do not depend on
// the number of threads. Letters: T rows, D width, H query heads, G key heads, d head dim, F MLP width.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

// RMSNorm where bias is null, else LayerNorm. With a residual, x + residual is what is normalised, and is written to sum.
struct NormTask {
    DType dtype, weight_dtype;
    int64_t T, D;
    float eps;
    const void* x;         // forward: [T, D]; backward: what was normalised
    const void* residual;  // [T, D] or null
    const void* weight;    // [D]
    const void* bias;      // [D] or null
    void* out;             // [T, D]
    void* sum;             // [T, D] or null
    float* stats;          // [T] 1 / deviation, then for LayerNorm [T] mean; forward: may be null
    // backward
    const void* grad;      // [T, D]
    const void* grad_sum;  // [T, D] or null: gradient that reaches the sum from elsewhere
    void* grad_x;          // [T, D], also the residual's
    float* grad_weight;    // [D]
    float* grad_bias;      // [D] or null
    bool centred;          // set for LayerNorm
    float* scratch;
    bool stream;  // write around the caches
    int threads;
};

struct RopeRows {
    const void* x;  // [T, heads, d], last dimension contiguous
    int64_t row_stride, head_stride, heads;
};

// Rotates q, and k where it has heads, by the angle of each row, or by minus the angle.
struct RopeTask {
    DType dtype, table_dtype;
    int64_t T, d;
    const void *cos, *sin;  // [T, d / 2]
    bool inverse;
    RopeRows q, k, v;
    void *q_out, *k_out;  // [T, heads, d]; into a cache: [cache_rows, G, d] in cache_dtype
    void* v_out;          // null: no cache
    DType cache_dtype;
    int64_t cache_rows;
    const int64_t* slots;            // [T] row of the cache; -1: none
    const float *k_scale, *v_scale;  // [G] or null; what is stored is the value divided by them
    bool stream;                     // write around the caches
    int threads;
};

enum class Activation : int { gelu, gelu_pytorch_tanh, quick_gelu, silu };

// f(x) - 1/2 for x >= 0 of what is 1/2 plus an odd function, and 1 past the last interval: in the n-th, around n step, a cubic in
// x - n step.
constexpr int kIntervals = 32;
struct Curve {
    float step;
    float coefficient[4][kIntervals];
};

struct ActivationTask {
    DType dtype;
    Activation kind;
    int64_t n;
    const void* x;
    const void* grad;  // backward
    void* out;         // backward: gradient of x
    int threads;
    bool stream;
    const Curve* curve;  // of f(x) / x; backward: of f'(x)
};

struct SwigluTask {
    DType dtype;
    int64_t T, F;
    const void* gate_up;  // [T, 2F]
    const void* grad;     // backward: [T, F]
    void* out;            // [T, F]; backward: [T, 2F]
    int threads;
    bool stream;
    const Curve* curve;  // of the sigmoid
};

#define LLAVA_FAST_DECLARE(isa)                                 \
    void norm_forward_##isa(const NormTask& task);              \
    void norm_backward_##isa(const NormTask& task);             \
    void rope_##isa(const RopeTask& task);                      \
    void activation_forward_##isa(const ActivationTask& task);  \
    void activation_backward_##isa(const ActivationTask& task); \
    void swiglu_forward_##isa(const SwigluTask& task);          \
    void swiglu_backward_##isa(const SwigluTask& task);
LLAVA_FAST_DECLARE(portable)
LLAVA_FAST_DECLARE(avx2)
LLAVA_FAST_DECLARE(avx512)
#undef LLAVA_FAST_DECLARE

// The tasks above with everything but centred, scratch, stream and curve set. All throw std::invalid_argument for a dtype they do not know.
void norm_forward(NormTask task);
void norm_backward(NormTask task);
void rope(RopeTask task);  // throws std::invalid_argument for a slot outside [-1, cache_rows), before anything is written
void activation_forward(ActivationTask task);
void activation_backward(ActivationTask task);
void swiglu_forward(SwigluTask task);
void swiglu_backward(SwigluTask task);

constexpr int64_t kNormParts =
    32;  // pieces of rows whose weight gradients are summed apart, then together: the same on any number of threads

}  // namespace llava_fast
