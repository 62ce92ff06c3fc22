// RMSNorm and LayerNorm by rows; the including file defines ISA.
#pragma once

#include "cpu/rows.h"
#include "cpu/rowwise.h"

namespace llava_fast {
namespace ISA {

// x, of another type, as T.
template <typename T>
static T* convert(DType dtype, const void* x, float* scratch, int64_t n) {
    T* out = reinterpret_cast<T*>(scratch);
    each(n, [&](int64_t i, int64_t m) {
        store_some(out + i,
                   dtype == DType::f32    ? load_some(static_cast<const float*>(x) + i, m)
                   : dtype == DType::bf16 ? load_some(static_cast<const bf16*>(x) + i, m)
                                          : load_some(static_cast<const f16*>(x) + i, m),
                   m);
    });
    return out;
}

template <typename T>
static void norm_forward(const NormTask& task) {
    const int64_t D = task.D, room = (D + kPair - 1) / kPair * kPair;
    const T* weight = convert<T>(task.weight_dtype, task.weight, task.scratch, D);
    const T* bias = task.centred ? convert<T>(task.weight_dtype, task.bias, task.scratch + room, D) : nullptr;
#pragma omp parallel for schedule(static, 1) num_threads(task.threads) if (task.threads > 1)
    for (int part = 0; part < task.threads; ++part) {
        T* total_row = reinterpret_cast<T*>(task.scratch + (2 + part) * room);
        const int64_t last = task.T * (part + 1) / task.threads;
        for (int64_t t = task.T * part / task.threads; t < last; ++t) {
            const T* row = static_cast<const T*>(task.x) + t * D;
            T* out = static_cast<T*>(task.out) + t * D;
            if (task.residual) {
                const T *x = row, *residual = static_cast<const T*>(task.residual) + t * D;
                write_row(static_cast<T*>(task.sum) + t * D, D, task.stream, [&](int64_t i, int64_t n) {
                    const pair value = load_ahead(x + i, n) + load_ahead(residual + i, n);
                    store_pair(total_row + i, value, n);  // what is written around the caches must not be read again
                    return value;
                });
                row = total_row;
            }
            pair squares = splat_pair(0.0f), values = squares;
            each_pair(D, [&](int64_t i, int64_t n) {
                const pair value = load_ahead(row + i, n);
                if (task.centred) {
                    values = values + value;
                } else {
                    squares = fma(value, value, squares);
                }
            });
            const float mean = task.centred ? sum(values) / static_cast<float>(D) : 0.0f;
            const pair shift = splat_pair(mean);
            if (task.centred) {
                each_pair(D, [&](int64_t i, int64_t n) {
                    const pair value = zero_past<T>(load_pair(row + i, n) - shift, n);
                    squares = fma(value, value, squares);
                });
            }
            const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(D) + task.eps);
            if (task.stats) {
                task.stats[t] = rstd;
                if (task.centred) task.stats[task.T + t] = mean;
            }
            const pair scale = splat_pair(rstd);
            if (task.centred) {
                write_row(out, D, task.stream, [&](int64_t i, int64_t n) {
                    return fma((load_pair(row + i, n) - shift) * scale, load_pair(weight + i, n), load_pair(bias + i, n));
                });
            } else {
                write_row(out, D, task.stream,
                          [&](int64_t i, int64_t n) { return rounded_pair<T>(load_pair(row + i, n) * scale) * load_pair(weight + i, n); });
            }
        }
        if (task.stream) fence();
    }
}

// Parts are in the order of pairs of T.
template <typename T>
static void sum_parts(const float* parts, int64_t count, int64_t D, int64_t room, float* out) {
    each_pair(D, [&](int64_t i, int64_t n) {
        pair total = splat_pair(0.0f);
        for (int64_t part = 0; part < count; ++part) total = total + load_pair(parts + part * room + i);
        float values[kPair];
        store_pair(values, total);
        for (int64_t j = 0; j < n; ++j) out[i + j] = values[place<T>(j)];
    });
}

// With n the normalised row, g = grad * weight and means over the row:
//   grad_x = rstd * (g - mean(g n) n - mean(g)), the last term for LayerNorm alone;  grad_weight = sum of grad * n over rows.
template <typename T>
static void norm_backward(const NormTask& task) {
    const int64_t D = task.D, room = (D + kPair - 1) / kPair * kPair, parts = task.T < kNormParts ? task.T : kNormParts;
    float *grad_weights = task.scratch + room, *grad_biases = grad_weights + kNormParts * room;
    const T* weight = convert<T>(task.weight_dtype, task.weight, task.scratch, D);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        float *grad_weight = grad_weights + part * room, *grad_bias = grad_biases + part * room;
        for (int64_t i = 0; i < room; ++i) grad_weight[i] = 0.0f;
        if (task.centred) {
            for (int64_t i = 0; i < room; ++i) grad_bias[i] = 0.0f;
        }
        const int64_t last = task.T * (part + 1) / parts;
        for (int64_t t = task.T * part / parts; t < last; ++t) {
            const T *x = static_cast<const T*>(task.x) + t * D, *grad = static_cast<const T*>(task.grad) + t * D;
            const T* grad_sum = task.grad_sum ? static_cast<const T*>(task.grad_sum) + t * D : nullptr;
            T* grad_x = static_cast<T*>(task.grad_x) + t * D;
            const float rstd = task.stats[t], mean = task.centred ? task.stats[task.T + t] : 0.0f;
            const pair scale = splat_pair(rstd), shift = splat_pair(mean);
            pair with_normed = splat_pair(0.0f), plain = with_normed;
            each_pair(D, [&](int64_t i, int64_t n) {
                // Lanes past the end are (0 - mean) * rstd here, but their grad is zero.
                const pair normed = (load_ahead(x + i, n) - shift) * scale, g = load_ahead(grad + i, n);
                const pair weighted = g * load_pair(weight + i, n);
                with_normed = fma(weighted, normed, with_normed);
                const pair kept = task.centred ? normed : rounded_pair<T>(normed);
                store_pair(grad_weight + i, fma(g, kept, load_pair(grad_weight + i)));
                if (task.centred) {
                    plain = plain + weighted;
                    store_pair(grad_bias + i, g + load_pair(grad_bias + i));
                }
            });
            const pair a = splat_pair(-sum(with_normed) / static_cast<float>(D));
            const pair b = splat_pair(task.centred ? -sum(plain) / static_cast<float>(D) : 0.0f);
            write_row(grad_x, D, task.stream, [&](int64_t i, int64_t n) {
                const pair normed = (load_pair(x + i, n) - shift) * scale, g = load_pair(grad + i, n);
                const pair value = scale * fma(normed, a, fma(g, load_pair(weight + i, n), b));
                return grad_sum ? value + load_ahead(grad_sum + i, n) : value;
            });
        }
        if (task.stream) fence();
    }
    sum_parts<T>(grad_weights, parts, D, room, task.grad_weight);
    if (task.centred) sum_parts<T>(grad_biases, parts, D, room, task.grad_bias);
}

}  // namespace ISA
}  // namespace llava_fast
