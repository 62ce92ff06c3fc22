// The linear op for few rows of x; included by linear_kernels.h.
//
// Four rows of W at a time against up to four rows of x: up to 16 independent chains of multiply-adds, each weight widened once for
// them. A block of W stays in L1 while all rows of x pass, so memory is read once whatever M.
#pragma once

#include "cpu/linear_kernels.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kFewRows = 16;
constexpr int64_t kRowsW = 4;
constexpr int64_t kChunk = 64;  // outputs between two epilogues

// y[n * kChunk + r] = W[r] . x[n] for R rows of W and N of x.
template <typename W, int R, int N>
static inline void dots(const Weight<W>& weight, int64_t o, const float* x, int64_t x_stride, int64_t I, const W* next, float* y) {
    const W* row = weight.row(o);
    vec acc[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    }
    const bool scaled = weight.groups > 1;
    for (int64_t g = 0, begin = 0; begin < I; ++g, begin += weight.group) {
        const int64_t end = begin + weight.group < I ? begin + weight.group : I;
        vec scale[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) scale[r] = splat(scaled ? weight.scale[(o + r) * weight.groups + g] : 1.0f);
        const auto step = [&](int64_t k, auto... count) {
            vec v[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) v[n] = load(x + n * x_stride + k, count...);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                vec w = load(place(row + r * weight.stride, k), count...);
                if (sizeof(W) == 1 && scaled) w = w * scale[r];
                if (next != nullptr) __builtin_prefetch(place(next + r * weight.stride, k), 0, 3);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) acc[r][n] = fma(w, v[n], acc[r][n]);
            }
        };
        int64_t k = begin;
        for (; k + kWidth <= end; k += kWidth) step(k);
        if (k < end) step(k, end - k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const float scale = weight.groups == 1 && weight.scale != nullptr ? weight.scale[o + r] : 1.0f;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) y[n * kChunk + r] = sum(acc[r][n]) * scale;
    }
}

template <typename W, int R>
static inline void all_rows(const Weight<W>& weight, int64_t o, const float* x, int64_t x_stride, int64_t M, int64_t I, const W* next,
                            float* y) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4, next = nullptr) dots<W, R, 4>(weight, o, x + m * x_stride, x_stride, I, next, y + m * kChunk);
    x += m * x_stride;
    y += m * kChunk;
    if (M - m == 1) dots<W, R, 1>(weight, o, x, x_stride, I, next, y);
    if (M - m == 2) dots<W, R, 2>(weight, o, x, x_stride, I, next, y);
    if (M - m == 3) dots<W, R, 3>(weight, o, x, x_stride, I, next, y);
}

template <typename T, typename W>
static void few_rows(const LinearTask& task) {
    const Weight<W> weight(task);
    const int64_t chunks = (task.O + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
        const float* x = static_cast<const float*>(task.x);
        int64_t x_stride = task.x_stride;
        if (sizeof(T) < sizeof(float)) {
            float* wide = linear_scratch(task.M * task.I);
            for (int64_t m = 0; m < task.M; ++m) {
                const T* row = static_cast<const T*>(task.x) + m * task.x_stride;
                for (int64_t k = 0; k < task.I; ++k) wide[m * task.I + k] = widen(row[k]);
            }
            x = wide;
            x_stride = task.I;
        }
        float y[kFewRows * kChunk];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t first = c * kChunk, last = first + kChunk < task.O ? first + kChunk : task.O;
            int64_t o = first;
            for (; o + kRowsW <= last; o += kRowsW) {
                const W* next = o + 2 * kRowsW <= task.O ? weight.row(o + kRowsW) : nullptr;
                all_rows<W, kRowsW>(weight, o, x, x_stride, task.M, task.I, next, y + o - first);
            }
            for (; o < last; ++o) all_rows<W, 1>(weight, o, x, x_stride, task.M, task.I, nullptr, y + o - first);
            for (int64_t m = 0; m < task.M; ++m) finish<T>(task, m, first, last - first, y + m * kChunk);
        }
    }
}

}  // namespace ISA
}  // namespace llava_fast
