// What the forward and the backward pass of attention share: lanes gathered into columns, keys copied into rows, and two products.
//
// Scores are kept transposed, a row a key and a column a lane, so that a register holds one key's scores for kWidth lanes: no sum or
// maximum over keys ever crosses a register, and keys and values are read as numbers to broadcast, in the order in which they lie in
// memory. Nothing is transposed but queries and outputs, once for each block of lanes.
#pragma once

#include "cpu/attention.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // accumulators: kRows x kColumns registers, 24 of 32
#else
constexpr int kRows = 4;  // 12 of 16
#endif
constexpr int kColumns = 3;
constexpr int64_t kLanes = kColumns * kWidth;  // lanes of a block
constexpr int64_t kTile = 64;                  // keys of a tile
constexpr int64_t kStride = kMaxHeadDim + 16;  // of a copied key or value: constant, so that rows are at constant offsets
constexpr float kLog2e = 1.44269504088896341f;

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// e^x for x <= 0 (or a little above) to within |x| / 2 + 1.5 roundings, 0 below -104; NaN stays NaN. The polynomial is 2^r's best of
// degree 6 on [-1/2, 1/2]. Scores keep the unit of lse: in powers of two lse would be rounded twice more.
static inline vec exp_negative(vec x) {
    x = max(splat(-200.0f), x * splat(kLog2e));
    const vec n = round(x);
    const vec r = x - n;
    vec p = splat(1.5353362e-4f);
    p = fma(p, r, splat(1.3398875e-3f));
    p = fma(p, r, splat(9.6184369e-3f));
    p = fma(p, r, splat(5.5503324e-2f));
    p = fma(p, r, splat(2.4022648e-1f));
    p = fma(p, r, splat(6.9314718e-1f));
    p = fma(p, r, splat(1.0f));
    return scale2(p, n);
}

// Where key j lies in k or v.
static inline int64_t key_offset(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t j) {
    if (seq.table != nullptr) return seq.table[j / task.block] * rows.page + j % task.block * rows.row;
    return (j < seq.shared ? seq.prefix + j : seq.start + j - seq.shared) * rows.row;
}

// How many keys the lane sees that belongs to query row t of the sequence.
static inline int64_t limit_of(const AttentionTask& task, const Sequence& seq, int64_t t) {
    if (!task.causal) return keys_of(seq);
    const int64_t place = task.q_index != nullptr ? task.q_index[seq.q_start + t] : seq.own - seq.n_q + t;
    return seq.shared + most(0, least(place + 1, seq.own));
}

template <typename T>
static inline const T* lane_row(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t lane) {
    const int64_t R = task.H / task.G;
    return static_cast<const T*>(rows.data) + (seq.q_start + lane / R) * rows.row + (g * R + lane % R) * rows.head;
}

// Rows of lanes [first, first + n) become columns: to[c * width + i] = factor * row i, column c; columns past n are zero.
template <typename T>
static void gather_as(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t first, int64_t n, float factor,
                      float* to, int64_t width) {
    for (int64_t i = 0; i < width; i += kWidth) {
        const T* from[kWidth];
        for (int64_t k = 0; k < kWidth; ++k) from[k] = lane_row<T>(task, seq, rows, g, first + least(i + k, n - 1));
        for (int64_t c = 0; c < task.d; c += kWidth) {
            const int64_t left = least(task.d - c, kWidth);
            vec r[kWidth];
#pragma GCC unroll 16
            for (int64_t k = 0; k < kWidth; ++k) {
                r[k] = i + k >= n ? splat(0.0f) : (left == kWidth ? load(from[k] + c) : load(from[k] + c, left)) * splat(factor);
            }
            transpose(r);
            for (int64_t k = 0; k < left; ++k) store(to + (c + k) * width + i, r[k]);
        }
    }
}

// The inverse, without padding: row i, column c = from[c * width + i] * factor[i].
template <typename T>
static void scatter_as(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t first, int64_t n,
                       const float* factor, const float* from, int64_t width) {
    for (int64_t i = 0; i < n; i += kWidth) {
        for (int64_t c = 0; c < task.d; c += kWidth) {
            const int64_t left = least(task.d - c, kWidth);
            vec r[kWidth];
#pragma GCC unroll 16
            for (int64_t k = 0; k < kWidth; ++k) r[k] = k < left ? load(from + (c + k) * width + i) * load(factor + i) : splat(0.0f);
            transpose(r);
            for (int64_t k = 0; k < least(kWidth, n - i); ++k) {
                T* to = const_cast<T*>(lane_row<T>(task, seq, rows, g, first + i + k)) + c;
                if (left == kWidth) {
                    store(to, r[k]);
                } else {
                    store(to, r[k], left);
                }
            }
        }
    }
}

// Keys or values [j, j + n) of head g, times factor, as rows kStride apart; zero up to whole registers.
template <typename T>
static void copy_as(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t j, int64_t n, float factor,
                    float* to) {
    const int64_t whole = task.d / kWidth * kWidth;
    for (int64_t r = 0; r < n; ++r, to += kStride) {
        const T* from = static_cast<const T*>(rows.data) + key_offset(task, seq, rows, j + r) + g * rows.head;
        for (int64_t c = 0; c < whole; c += kWidth) store(to + c, load(from + c) * splat(factor));
        if (whole < task.d) store(to + whole, load(from + whole, task.d - whole) * splat(factor));
    }
}

#define LLAVA_FAST_BY_TYPE(type, call) \
    switch (type) {                    \
        case DType::f32: {             \
            typedef float T;           \
            call;                      \
            break;                     \
        }                              \
        case DType::bf16: {            \
            typedef bf16 T;            \
            call;                      \
            break;                     \
        }                              \
        default: {                     \
            typedef f16 T;             \
            call;                      \
        }                              \
    }

static void gather(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t first, int64_t n, float factor,
                   float* to, int64_t width) {
    LLAVA_FAST_BY_TYPE(rows.type, gather_as<T>(task, seq, rows, g, first, n, factor, to, width))
}

static void scatter(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t first, int64_t n,
                    const float* factor, const float* from, int64_t width) {
    LLAVA_FAST_BY_TYPE(rows.type, scatter_as<T>(task, seq, rows, g, first, n, factor, from, width))
}

static void copy(const AttentionTask& task, const Sequence& seq, const Rows& rows, const float* scale, int64_t g, int64_t j, int64_t n,
                 float* to) {
    const float factor = scale == nullptr ? 1.0f : scale[g];
    if (rows.type == DType::e4m3) {
        copy_as<e4m3>(task, seq, rows, g, j, n, factor, to);
    } else {
        LLAVA_FAST_BY_TYPE(rows.type, copy_as<T>(task, seq, rows, g, j, n, factor, to))
    }
}

// done(r, i, register i of sum_k a(r, k) b[k, :]) for kRows rows and N registers of columns; a(r, k) = a[r * kA + k * kB].
template <int N, int64_t kA, int64_t kB, typename Store>
static inline void product(const float* a, const float* b, int64_t b_stride, int64_t n, Store&& done) {
    vec sum[kRows][N];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum[r][i] = splat(0.0f);
    }
    for (int64_t k = 0; k < n; ++k) {
        vec x[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) x[i] = load(b + k * b_stride + i * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const vec y = splat(a[r * kA + k * kB]);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) sum[r][i] = fma(y, x[i], sum[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) done(r, i, sum[r][i]);
    }
}

constexpr int64_t kAhead = 512;  // bytes of a row to fetch ahead (two threads, bf16: 17 GB/s without, 26 with, 22 with 1024)

// kWidth keys of one head, or as many values, where they lie; fetched ahead as they are read.
template <typename T>
struct InPlace {
    const T* rows[kWidth];
    const T* operator[](int64_t k) const { return rows[k]; }
    void fetch(int64_t k, int64_t c) const { __builtin_prefetch(reinterpret_cast<const char*>(rows[k] + c) + kAhead); }
};

// The same in L1, kStride apart: an array of pointers is half of the loads then, and fetching ahead a third.
struct Widened {
    const float* first;
    const float* operator[](int64_t k) const { return first + k * kStride; }
    void fetch(int64_t, int64_t) const {}
};

// Lane k of the result is the product of keys[k] with q.
template <typename Keys>
static inline vec dot_rows(const Keys& keys, const float* q, int64_t d) {
    vec dots[kWidth];
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) dots[k] = splat(0.0f);
    const int64_t whole = d / kWidth * kWidth;
    // A cache line of a row at a time: rows a power of two apart share a set of L1, which would have dropped the line by the next turn.
    constexpr int64_t kLine = kWidth * sizeof(float) / sizeof(*keys[0]);
    int64_t c = 0;
    for (; c + kLine <= d; c += kLine) {
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) {
            keys.fetch(k, c);
#pragma GCC unroll 4
            for (int64_t u = 0; u < kLine; u += kWidth) dots[k] = fma(load(q + c + u), load(keys[k] + c + u), dots[k]);
        }
    }
    for (; c < whole; c += kWidth) {
        const vec x = load(q + c);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) dots[k] = fma(x, load(keys[k] + c), dots[k]);
    }
    if (whole < d) {
        const vec x = load(q + whole);
#pragma GCC unroll 16
        for (int k = 0; k < kWidth; ++k) dots[k] = fma(x, load(keys[k] + whole, d - whole), dots[k]);
    }
    return sums(dots);
}

struct Nothing {
    void operator()() const {}
};

// scores[j, lane] = key j . column `lane`, for n keys rounded up to kRows; `between` is called after each kRows of them.
template <int N, typename Between = Nothing>
static void dots(const float* keys, const float* columns, int64_t n, int64_t d, float* scores, Between&& between = {}) {
    for (int64_t j = 0; j < n; j += kRows) {
        product<N, kStride, 1>(keys + j * kStride, columns, N * kWidth, d,
                               [&](int r, int i, vec sum) { store(scores + ((j + r) * N + i) * kWidth, sum); });
        between();
    }
}

// columns[c, lane] = factor[lane] * columns[c, lane] + sum_j weights[j, lane] * values[j, c]
template <int N, typename Between = Nothing>
static void weigh(const float* values, const float* weights, int64_t n, int64_t d, const vec* factor, float* columns,
                  Between&& between = {}) {
    for (int64_t c = 0; c < d; c += kRows) {
        product<N, 1, kStride>(values + c, weights, N * kWidth, n, [&](int r, int i, vec sum) {
            float* place = columns + ((c + r) * N + i) * kWidth;
            store(place, fma(load(place), factor[i], sum));
        });
        between();
    }
}

// Scores of keys that a lane does not see become less than any score: -1.5e38 or -infinity.
template <int N>
static void hide(float* scores, int64_t first_key, int64_t n, const float* limit) {
    for (int64_t j = 0; j < n; ++j) {
        for (int i = 0; i < N; ++i) {
            float* place = scores + (j * N + i) * kWidth;
            const vec beyond = min(splat(0.0f), load(limit + i * kWidth) - splat(static_cast<float>(first_key + j) + 0.5f));
            store(place, fma(beyond, splat(3e38f), load(place)));
        }
    }
}

}  // namespace ISA
}  // namespace llava_fast
