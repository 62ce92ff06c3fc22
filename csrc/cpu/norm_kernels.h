// RMSNorm and LayerNorm by rows; the including file defines ISA.
#pragma once

#include "cpu/rowwise.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

// x as fp32, rounded to T first where it is wider.
template <typename T>
static void widen_all(DType dtype, const void* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) {
        const int64_t m = n - i < kWidth ? n - i : kWidth;
        const vec value = dtype == DType::f32    ? load(static_cast<const float*>(x) + i, m)
                          : dtype == DType::bf16 ? load(static_cast<const bf16*>(x) + i, m)
                                                 : load(static_cast<const f16*>(x) + i, m);
        store(out + i, rounded<T>(value), m);
    }
}

template <typename T>
static void norm_forward(const NormTask& task) {
    const int64_t D = task.D;
    float *weight = task.scratch, *bias = weight + D, *rows = bias + D;
    widen_all<T>(task.weight_dtype, task.weight, weight, D);
    if (task.centred) widen_all<T>(task.weight_dtype, task.bias, bias, D);
#pragma omp parallel for schedule(static, 1) num_threads(task.threads) if (task.threads > 1)
    for (int part = 0; part < task.threads; ++part) {
        float* row = rows + part * D;
        const int64_t last = task.T * (part + 1) / task.threads;
        for (int64_t t = task.T * part / task.threads; t < last; ++t) {
            const T* x = static_cast<const T*>(task.x) + t * D;
            T* out = static_cast<T*>(task.out) + t * D;
            vec squares = splat(0.0f), values = splat(0.0f);
            if (task.residual) {
                const T* residual = static_cast<const T*>(task.residual) + t * D;
                T* total = static_cast<T*>(task.sum) + t * D;
                write_row(total, D, task.stream, [&](int64_t i, int64_t n) {
                    const vec value = rounded<T>(load_some(x + i, n) + load_some(residual + i, n));
                    store_some(row + i, value, n);
                    squares = fma(value, value, squares);
                    values = values + value;
                    return value;
                });
            } else {
                each(D, [&](int64_t i, int64_t n) {
                    const vec value = load_some(x + i, n);
                    store_some(row + i, value, n);
                    squares = fma(value, value, squares);
                    values = values + value;
                });
            }
            float mean = 0.0f, variance;
            if (task.centred) {
                mean = sum(values) / static_cast<float>(D);
                const vec shift = splat(mean);
                vec centred = splat(0.0f);
                int64_t i = 0;
                for (; i + kWidth <= D; i += kWidth) {
                    const vec value = load(row + i) - shift;
                    centred = fma(value, value, centred);
                }
                variance = sum(centred);
                for (; i < D; ++i) variance += (row[i] - mean) * (row[i] - mean);  // the lanes past the end are not zero once centred
                variance /= static_cast<float>(D);
            } else {
                variance = sum(squares) / static_cast<float>(D);
            }
            const float rstd = 1.0f / __builtin_sqrtf(variance + task.eps);
            if (task.stats) {
                task.stats[t] = rstd;
                if (task.centred) task.stats[task.T + t] = mean;
            }
            const vec scale = splat(rstd), shift = splat(mean);
            if (task.centred) {
                write_row(out, D, task.stream, [&](int64_t i, int64_t n) {
                    return fma((load_some(row + i, n) - shift) * scale, load_some(weight + i, n), load_some(bias + i, n));
                });
            } else {
                write_row(out, D, task.stream,
                          [&](int64_t i, int64_t n) { return rounded<T>(load_some(row + i, n) * scale) * load_some(weight + i, n); });
            }
        }
        if (task.stream) fence();
    }
}

static void sum_parts(const float* parts, int64_t count, int64_t D, float* out) {
    each(D, [&](int64_t i, int64_t n) {
        vec total = splat(0.0f);
        for (int64_t part = 0; part < count; ++part) total = total + load_some(parts + part * D + i, n);
        store_some(out + i, total, n);
    });
}

// With n the normalised row, g = grad * weight and means over the row:
//   grad_x = rstd * (g - mean(g n) n - mean(g)), the last term for LayerNorm alone;  grad_weight = sum of grad * n over rows.
template <typename T>
static void norm_backward(const NormTask& task) {
    const int64_t D = task.D, parts = task.T < kNormParts ? task.T : kNormParts;
    float *weight = task.scratch, *grad_weights = weight + D, *grad_biases = grad_weights + kNormParts * D;
    widen_all<T>(task.weight_dtype, task.weight, weight, D);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        float *grad_weight = grad_weights + part * D, *grad_bias = grad_biases + part * D;
        for (int64_t i = 0; i < D; ++i) grad_weight[i] = 0.0f;
        if (task.centred) {
            for (int64_t i = 0; i < D; ++i) grad_bias[i] = 0.0f;
        }
        const int64_t last = task.T * (part + 1) / parts;
        for (int64_t t = task.T * part / parts; t < last; ++t) {
            const T *x = static_cast<const T*>(task.x) + t * D, *grad = static_cast<const T*>(task.grad) + t * D;
            const T* grad_sum = task.grad_sum ? static_cast<const T*>(task.grad_sum) + t * D : nullptr;
            T* grad_x = static_cast<T*>(task.grad_x) + t * D;
            const float rstd = task.stats[t], mean = task.centred ? task.stats[task.T + t] : 0.0f;
            const vec scale = splat(rstd), shift = splat(mean);
            vec with_normed = splat(0.0f), plain = splat(0.0f);
            each(D, [&](int64_t i, int64_t n) {
                // Lanes past the end are (0 - mean) * rstd here, but their grad is zero.
                const vec normed = (load_some(x + i, n) - shift) * scale, g = load_some(grad + i, n);
                const vec weighted = g * load_some(weight + i, n);
                with_normed = fma(weighted, normed, with_normed);
                plain = plain + weighted;
                const vec kept = task.centred ? normed : rounded<T>(normed);
                store_some(grad_weight + i, fma(g, kept, load_some(grad_weight + i, n)), n);
                if (task.centred) store_some(grad_bias + i, g + load_some(grad_bias + i, n), n);
            });
            const vec a = splat(-sum(with_normed) / static_cast<float>(D));
            const vec b = splat(task.centred ? -sum(plain) / static_cast<float>(D) : 0.0f);
            write_row(grad_x, D, task.stream, [&](int64_t i, int64_t n) {
                const vec normed = (load_some(x + i, n) - shift) * scale, g = load_some(grad + i, n);
                const vec value = scale * fma(normed, a, fma(g, load_some(weight + i, n), b));
                return grad_sum ? value + load_some(grad_sum + i, n) : value;
            });
        }
        if (task.stream) fence();
    }
    sum_parts(grad_weights, parts, D, task.grad_weight);
    if (task.centred) sum_parts(grad_biases, parts, D, task.grad_bias);
}

}  // namespace ISA
}  // namespace llava_fast
