// The linear op for few rows of x; included by linear_kernels.h.
//
// Four rows of W at a time against up to eight rows of x, so that the chains of multiply-adds are independent and each weight is read
// once from memory and widened once or twice. The four rows come from four segments of W: as neighbours they would share a page, in
// which the hardware follows only one stream (2026-11, two threads, bf16: 15.5 of 23 GB/s with neighbours, 19.3 with segments, 22.2
// with the prefetch).
#pragma once

#include "cpu/linear_parts.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kFewRows = 16;
constexpr int64_t kSegments = 4;
constexpr int64_t kPiece = 16;  // outputs of a segment between two epilogues
constexpr int64_t kPieces = kSegments * kPiece;
constexpr int64_t kAhead = 1024;                   // bytes; 512 to 2048 are alike, 4096 is 10 % slower
constexpr int kRowsX = sizeof(vec) == 64 ? 8 : 4;  // with 16 registers a tile of 2 x 4 is what fits

// y[n * kPieces + r * kPiece] = W[o + r * apart] . x[n] for R rows of W and N of x.
template <typename W, int R, int N>
static inline void dots(const Weight<W>& weight, int64_t o, int64_t apart, const float* x, int64_t x_stride, int64_t I, float* y) {
    constexpr int64_t kLine = sizeof(W) == 4 ? 16 : 32;  // columns a prefetch
    const W* row = weight.row(o);
    const int64_t step_r = apart * weight.stride;
    const bool scaled = weight.groups > 1;
    vec acc[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    }
    for (int64_t g = 0, k = 0; k < I; ++g) {
        const int64_t end = k + weight.group < I ? k + weight.group : I;
        vec scale[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) scale[r] = splat(scaled ? weight.scale[(o + r * apart) * weight.groups + g] : 1.0f);
        const auto step = [&](int64_t at, auto... count) {
            vec w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                w[r] = load(place(row + r * step_r, at), count...);
                if (sizeof(W) == 1 && scaled) w[r] = w[r] * scale[r];
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const vec value = load(x + n * x_stride + at, count...);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[r][n] = fma(w[r], value, acc[r][n]);
            }
        };
        for (; k + kLine <= end; k += kLine) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(place(row + r * step_r, k)) + kAhead);
#pragma GCC unroll 4
            for (int64_t u = 0; u < kLine; u += kWidth) step(k + u);
        }
        for (; k + kWidth <= end; k += kWidth) step(k);
        if (k < end) step(k, end - k);
        k = end;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const float scale = weight.groups == 1 && weight.scale != nullptr ? weight.scale[o + r * apart] : 1.0f;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) y[n * kPieces + r * kPiece] = sum(acc[r][n]) * scale;
    }
}

// The same for int4, with x laid out by `split_columns`: bytes widen in one instruction, numbers in one and a half more, and a group's
// scale meets the table of 16 numbers and not each of them (2026-11, two threads, the layers of a 0.5b decoder: 9.7 to 8.0 ms with one
// row of x, 26 to 23 with eight).
template <typename W, int R, int N>
static inline void dots_of_pairs(const Weight<W>& weight, int64_t o, int64_t apart, const float* x, int64_t x_stride, int64_t I, float* y) {
    constexpr int64_t kPair = 2 * kWidth;
    const W* row = weight.row(o);
    const int64_t step_r = apart * weight.stride;
    vec acc[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
    }
    for (int64_t g = 0, k = 0; k < I; ++g) {
        const int64_t end = k + weight.group < I ? k + weight.group : I;
        vec table[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) table[r] = levels(weight.scale[(o + r * apart) * weight.groups + g]);
        const auto step = [&](int64_t at, auto... count) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const W* from = place(row + r * step_r, at);
                __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
                vec even, odd;
                pairs(from, table[r], even, odd, count...);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    const float* values = x + n * x_stride + at;
                    acc[r][n] = fma(even, load(values), acc[r][n]);
                    acc[r][n] = fma(odd, load(values + kWidth), acc[r][n]);
                }
            }
        };
        for (; k + kPair <= end; k += kPair) step(k);
        if (k < end) step(k, end - k);
        k = end;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) y[n * kPieces + r * kPiece] = sum(acc[r][n]);
    }
}

// A row of x for `dots_of_pairs`: of each 2 * kWidth columns the even ones, then the odd ones; zeros up to whole registers.
template <typename T>
static inline void split_columns(const T* from, int64_t I, float* to) {
    int64_t k = 0;
    for (; k + 2 * kWidth <= I; k += 2 * kWidth) {
        for (int64_t i = 0; i < kWidth; ++i) {
            to[k + i] = widen(from[k + 2 * i]);
            to[k + kWidth + i] = widen(from[k + 2 * i + 1]);
        }
    }
    for (int64_t i = 0; i < kWidth && k < I; ++i) {
        to[k + i] = k + 2 * i < I ? widen(from[k + 2 * i]) : 0.0f;
        to[k + kWidth + i] = k + 2 * i + 1 < I ? widen(from[k + 2 * i + 1]) : 0.0f;
    }
}

template <typename W>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<nibbles> = true;

// The same for M rows of x: R rows of W at a time, as many as leave registers for N chains each.
template <typename W, int rows_W, int N>
static inline void dots_of(int64_t M, const Weight<W>& weight, int64_t o, int64_t apart, const float* x, int64_t x_stride, int64_t I,
                           float* y) {
    if constexpr (N > 0) {
        if (M < N) return dots_of<W, rows_W, N - 1>(M, weight, o, apart, x, x_stride, I, y);
        constexpr int kTile = sizeof(vec) == 64 ? 24 : 8;
        constexpr int R = N * rows_W <= kTile ? rows_W : rows_W > 1 ? 2 : 1;
        for (int r = 0; r < rows_W; r += R) {
            if constexpr (kPaired<W>) {
                dots_of_pairs<W, R, N>(weight, o + r * apart, apart, x, x_stride, I, y + r * kPiece);
            } else {
                dots<W, R, N>(weight, o + r * apart, apart, x, x_stride, I, y + r * kPiece);
            }
        }
        x += N * x_stride;
        y += N * kPieces;
        if (M > N) dots_of<W, rows_W, N>(M - N, weight, o, apart, x, x_stride, I, y);
    }
}

template <typename T, typename W>
static void few_rows(const LinearTask& task) {
    const Weight<W> weight(task);
    const int64_t M = task.M, I = task.I;
    constexpr bool copied = kPaired<W> || sizeof(T) < sizeof(float);
    const int64_t stride = kPaired<W> ? ceil_div(I, 2 * kWidth) * 2 * kWidth : I;  // of the copy
    const Scratch scratch(task.threads, copied ? M * stride : 0);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t t = 0; t < task.threads; ++t) {
        const float* x = static_cast<const float*>(task.x);
        int64_t x_stride = task.x_stride;
        if (copied) {
            float* wide = scratch.of(t);
            for (int64_t m = 0; m < M; ++m) {
                const T* row = static_cast<const T*>(task.x) + m * task.x_stride;
                if (kPaired<W>) {
                    split_columns(row, I, wide + m * stride);
                } else {
                    for (int64_t k = 0; k < I; ++k) wide[m * stride + k] = widen(row[k]);
                }
            }
            x = wide;
            x_stride = stride;
        }
        float y[kFewRows * kPieces];
        const int64_t first = task.O * t / task.threads, last = task.O * (t + 1) / task.threads, apart = (last - first) / kSegments;
        for (int64_t i = 0; i < apart; i += kPiece) {
            const int64_t count = apart - i < kPiece ? apart - i : kPiece;
            for (int64_t j = 0; j < count; ++j) dots_of<W, kSegments, kRowsX>(M, weight, first + i + j, apart, x, x_stride, I, y + j);
            for (int64_t m = 0; m < M; ++m) {
                for (int64_t s = 0; s < kSegments; ++s) finish<T>(task, m, first + s * apart + i, count, y + m * kPieces + s * kPiece);
            }
        }
        const int64_t rest = first + apart * kSegments;
        for (int64_t o = rest; o < last; ++o) dots_of<W, 1, kRowsX>(M, weight, o, 0, x, x_stride, I, y + o - rest);
        for (int64_t m = 0; m < M && rest < last; ++m) finish<T>(task, m, rest, last - rest, y + m * kPieces);
    }
}

}  // namespace ISA
}  // namespace llava_fast
