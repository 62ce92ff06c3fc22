// The loops of the cross-entropy of rows, compiled once per instruction set; the including file defines ISA to the set's name.
//
// A row is read in blocks that stay in L1, so that the maximum and the sum of exponentials cost one reading from memory; sums of
// blocks are added in double. A row belongs to one thread: the result does not depend on their number.
#pragma once

#include <math.h>

#include "cpu/cross_entropy.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kLogits = 1024;  // logits a block

// fp32 values of n logits, the rest of the last register filled with `fill`. Returns the number of registers.
template <typename T>
static inline int64_t widen_block(const T* p, int64_t n, float fill, float* out) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, load(p + i));
    if (i == n) return n / kWidth;
    store(out + i, load(p + i, n - i));
    for (int64_t j = n; j < i + kWidth; ++j) out[j] = fill;
    return i / kWidth + 1;
}

struct RowSums {
    float high;     // the largest logit
    double total;   // sum of exp(logit - high)
    double logits;  // their sum
};

template <typename T>
static inline RowSums row_sums(const T* row, int64_t n, bool with_sum) {
    float block[kLogits], best = -INFINITY;
    double total = 0, logits = 0;
    for (int64_t v = 0; v < n; v += kLogits) {
        const int64_t left = n - v < kLogits ? n - v : kLogits;
        const int64_t registers = widen_block(row + v, left, -INFINITY, block);
        vec top = load(block);
        for (int64_t i = 1; i < registers; ++i) top = max(top, load(block + i * kWidth));
        const float high = largest(top);
        if (high > best) {
            total *= ::exp(static_cast<double>(best) - static_cast<double>(high));
            best = high;
        }
        if (best == -INFINITY) {  // every logit so far is -infinity and adds nothing, or NaN, which no maximum shows
            vec block_sum = splat(0.0f);
            for (int64_t i = 0; i < registers; ++i) block_sum = block_sum + load(block + i * kWidth);
            const float seen = sum(block_sum);
            if (seen != seen) total = static_cast<double>(seen);
        } else {
            vec sum_exp = splat(0.0f);
            for (int64_t i = 0; i < registers; ++i) sum_exp = sum_exp + exp(load(block + i * kWidth) - splat(best));
            total += static_cast<double>(sum(sum_exp));
        }
        if (with_sum) {
            for (int64_t i = 0; i < left; ++i) logits += static_cast<double>(block[i]);
        }
    }
    return {best, total, logits};
}

// row[v] = a exp(row[v] - base) + b
template <typename T>
static inline void to_gradients(T* row, int64_t n, float base, float a, float b) {
    int64_t v = 0;
    for (; v + kWidth <= n; v += kWidth) store(row + v, fma(splat(a), exp(load(row + v) - splat(base)), splat(b)));
    if (v < n) store(row + v, fma(splat(a), exp(load(row + v, n - v) - splat(base)), splat(b)), n - v);
}

template <typename T>
static void run(const CrossEntropyTask& task) {
    const int64_t n = task.vocab;
    const float smoothing = task.smoothing;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t r = 0; r < task.rows; ++r) {
        T* row = static_cast<T*>(task.logits) + r * n;
        T* chosen = row + task.labels[r];
        const float at_label = widen(*chosen);
        float base, inverse = 1.0f;  // exp(z - lse) = inverse * exp(z - base)
        if (task.loss != nullptr) {
            const RowSums sums = row_sums(row, n, smoothing != 0.0f);
            const float lse = static_cast<float>(static_cast<double>(sums.high) + ::log(sums.total));
            float target = at_label;
            if (smoothing != 0.0f) target += smoothing * (static_cast<float>(sums.logits / static_cast<double>(n)) - at_label);
            task.lse[r] = lse;
            task.loss[r] = lse - target + task.z_loss * lse * lse;
            base = sums.high;
            inverse = static_cast<float>(1.0 / sums.total);
        } else {
            base = task.lse[r];
        }
        if (task.gradients) {
            const float g = task.grad != nullptr ? task.grad[r] : task.scale;
            const float a = g * (1.0f + 2.0f * task.z_loss * task.lse[r]) * inverse, b = -g * smoothing / static_cast<float>(n);
            to_gradients(row, n, base, a, b);
            narrow(a * ::expf(at_label - base) + b - g * (1.0f - smoothing), chosen);
        }
    }
}

}  // namespace ISA

void LLAVA_FAST_JOIN(cross_entropy_, ISA)(const CrossEntropyTask& task) {
    switch (task.dtype) {
        case DType::f32:
            return ISA::run<float>(task);
        case DType::bf16:
            return ISA::run<bf16>(task);
        case DType::f16:
            return ISA::run<f16>(task);
        default:
            return;
    }
}

}  // namespace llava_fast
