// The linear op for many rows of x; included by linear_kernels.h.
//
// A job is a block of columns of the output: its part of W is widened and packed once, block by block of I, and stays in L2 while
// panels of kRows rows of x pass, each copied to L1. The inner kernel keeps a tile of kRows x 2 registers of sums. Jobs are split
// over O, so that no weight is widened twice, and over M too where there are more threads than that balances.
#pragma once

#include "cpu/linear_parts.h"

namespace llava_fast {
namespace ISA {

#if defined(__AVX512F__)
constexpr int64_t kRows = 14;
constexpr int64_t kMaxK = 384, kMaxColumns = 384;  // 0.6 MB of the 1 to 2 MB of L2; deeper blocks are as fast and round more
#elif defined(__AVX2__)
constexpr int64_t kRows = 6;
constexpr int64_t kMaxK = 384, kMaxColumns = 96;
#else
constexpr int64_t kRows = 4;
constexpr int64_t kMaxK = 384, kMaxColumns = 96;
#endif
constexpr int64_t kColumns = 2 * kWidth;
constexpr int64_t kMaxRows = 4096 / kRows * kRows;  // of a job: its sums are 6 MB
constexpr int64_t kStrideA = kMaxK + 16;            // not a power of two: the rows of a panel fall into different sets of L1

// c[m, 0 .. kColumns) (+)= sum over k of a[m, k] b[k, :]; each block of K is summed by itself, which also rounds less than one long chain.
template <int R>
static inline void tile(int64_t K, const float* __restrict a, const float* __restrict b, float* __restrict c, int64_t c_stride,
                        bool first) {
    vec acc[R][2];
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
        acc[m][0] = splat(0.0f);
        acc[m][1] = splat(0.0f);
    }
    for (int64_t k = 0; k < K; ++k) {
        const vec b0 = load(b), b1 = load(b + kWidth);
        __builtin_prefetch(b + 256);
        __builtin_prefetch(b + 256 + kWidth);
        b += kColumns;
#pragma GCC unroll 16
        for (int m = 0; m < R; ++m) {
            const vec value = splat(a[m * kStrideA + k]);
            acc[m][0] = fma(value, b0, acc[m][0]);
            acc[m][1] = fma(value, b1, acc[m][1]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
        float* to = c + m * c_stride;
        store(to, first ? acc[m][0] : load(to) + acc[m][0]);
        store(to + kWidth, first ? acc[m][1] : load(to + kWidth) + acc[m][1]);
    }
}

template <int R>
static inline void tile_of(int64_t rows, int64_t K, const float* a, const float* b, float* c, int64_t c_stride, bool first) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R>(K, a, b, c, c_stride, first);
        return tile_of<R - 1>(rows, K, a, b, c, c_stride, first);
    }
}

// packed[k, 0 .. kWidth) = W[o .. o + kWidth, begin + k], kColumns apart; rows past O are zero.
template <typename W>
static inline void pack_columns(const Weight<W>& weight, int64_t o, int64_t O, int64_t begin, int64_t K, float* packed) {
    for (int64_t k = 0; k < K; k += kWidth) {
        const int64_t count = K - k < kWidth ? K - k : kWidth;
        vec r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            if (o + i >= O) {
                r[i] = splat(0.0f);
                continue;
            }
            const W* from = place(weight.row(o + i), begin + k);
            r[i] = count == kWidth ? load(from) : load(from, count);
            if (sizeof(W) == 1) r[i] = r[i] * splat(weight.scale[(o + i) * weight.groups + (begin + k) / weight.group]);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            if (i < count) store(packed + (k + i) * kColumns, r[i]);
        }
    }
}

template <typename T>
static inline void pack_row(const T* from, int64_t K, float* to) {
    int64_t k = 0;
    for (; k + kWidth <= K; k += kWidth) store(to + k, load(from + k));
    if (k < K) store(to + k, load(from + k, K - k), K - k);
}

template <typename T, typename W>
static void many_rows(const LinearTask& task) {
    const Weight<W> weight(task);
    const int64_t row_panels = ceil_div(task.M, kRows), column_panels = ceil_div(task.O, kColumns);
    const int64_t row_threads = splits_of_rows(row_panels, column_panels, task.threads, 1, 0), column_threads = task.threads / row_threads;
    const int64_t splits = row_threads * ceil_div(ceil_div(row_panels, row_threads) * kRows, kMaxRows);
    const int64_t blocks = ceil_div(ceil_div(column_panels * kColumns, kMaxColumns), column_threads) * column_threads;
    const int64_t depths = ceil_div(task.I, kMaxK) > 0 ? ceil_div(task.I, kMaxK) : 1;
    const int64_t depth = ceil_div(ceil_div(task.I, depths), 32) * 32;  // so that a scale's group of 32 is not cut
    const int64_t width = ceil_div(column_panels, blocks) * kColumns;
    // With one block of I the sums live in one tile's rows, else in a buffer of the job's whole output.
    const int64_t waiting = depths > 1 ? ceil_div(row_panels, splits) * kRows : kRows;
    const Scratch scratch(task.threads, width * kMaxK + kRows * kStrideA + waiting * width);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t job = 0; job < splits * blocks; ++job) {
        const int64_t split = job % splits, block = job / splits;
        const int64_t first_m = row_panels * split / splits * kRows, end = row_panels * (split + 1) / splits * kRows;
        const int64_t last_m = end < task.M ? end : task.M;
        const int64_t first_panel = column_panels * block / blocks, panels = column_panels * (block + 1) / blocks - first_panel;
        const int64_t first_o = first_panel * kColumns;
        const int64_t columns = first_o + panels * kColumns < task.O ? panels * kColumns : task.O - first_o;
        if (panels == 0) continue;
        float *b = scratch.mine(), *a = b + width * kMaxK, *sums = a + kRows * kStrideA;
        for (int64_t d = 0, begin = 0; d < depths; ++d, begin += depth) {
            const int64_t K = begin + depth < task.I ? depth : task.I > begin ? task.I - begin : 0;
            for (int64_t o = 0; o < panels * kColumns; o += kWidth) {
                pack_columns(weight, first_o + o, task.O, begin, K, b + o / kColumns * (K * kColumns) + o % kColumns);
            }
            for (int64_t m = first_m; m < last_m; m += kRows) {
                const int64_t rows = last_m - m < kRows ? last_m - m : kRows;
                for (int64_t i = 0; i < rows; ++i)
                    pack_row(static_cast<const T*>(task.x) + (m + i) * task.x_stride + begin, K, a + i * kStrideA);
                float* c = depths > 1 ? sums + (m - first_m) * width : sums;
                for (int64_t p = 0; p < panels; ++p) tile_of<kRows>(rows, K, a, b + p * K * kColumns, c + p * kColumns, width, d == 0);
                if (d + 1 < depths) continue;
                for (int64_t i = 0; i < rows; ++i) finish<T>(task, m + i, first_o, columns, c + i * width);
            }
        }
    }
}

}  // namespace ISA
}  // namespace llava_fast
