// The linear op on AMX: products of bf16 tiles, which are exact in fp32, summed in fp32.
//
// Every fp32 number is the sum of three bf16 (8 + 8 + 8 of its 24 bits), every fp16 number of two. With W in bf16 the product needs
// three tile products for fp32 x, at 14 times the rate of AVX-512; with both in fp32, the six of nine that are above 2^-24.
//
// A tile product sums 16 pairs, then their even and odd halves, then adds that to the accumulators, so chains are short; each
// kMaxK columns of I start anew. It takes numbers below 2^-126 as zero: of an x below 1e-33 the last parts are lost.
// An infinity in x stays one (its other parts are zero) unless it meets a zero; an infinity in W may give NaN instead.
//
// Letters: a step is 32 columns of I. A panel is 32 rows of x or of W, two tiles. W's tile is the left operand, 16 rows of O by a step;
// x's the right one, a step by 16 rows of x in pairs of columns; the sums are y transposed. Blocks of x's rows are split and packed so
// that they stay in L2 while the panels of W pass; W in bf16 is multiplied where it lies. The order of sums depends on I alone: a row's
// result does not depend on how many others there are, as long as these tiles compute it (linear_amx below), nor on threads.
#define ISA amx
#include "cpu/linear_parts.h"
#include "cpu/linear_tiles.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kMaxK = 1152;
constexpr int64_t kAheadX = 1024;  // bytes

// 16 rows of x from m on, K columns from begin on: a tile for each step and part, zero past the ends.
template <typename T>
static void pack_x(const LinearTask& task, int64_t m, int64_t begin, int64_t K, bf16* to) {
    constexpr int P = kParts<T>;
    for (int64_t k = 0; k < ceil_div(K, kStep) * kStep; k += kWidth) {
        const int64_t count = K - k < kWidth ? K - k : kWidth;
        vec r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            const T* from = static_cast<const T*>(task.x) + (m + i) * task.x_stride + begin + k;
            r[i] = m + i >= task.M || count <= 0 ? splat(0.0f) : load_some(from, count);
            __builtin_prefetch(from + kAheadX / sizeof(T));
        }
        transpose(r);
        bf16* tile = to + k / kStep * P * kTileSize + k % kStep * kTile;
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; i += 2) pair<P>(r[i], r[i + 1], tile + i * kTile);
    }
}

// 32 numbers of a row of W as P bf16 each; those from `count` on are zero, or -8 scale in int4, which meets
// zeros of x. int8 with one part waits for its scale.
template <int P, typename W>
static inline void parts_of(const Weight<W>& weight, int64_t o, int64_t k, int64_t count, __m512i (&packed)[P]) {
    const W* from = place(weight.row(o), k);
    if constexpr (P == 1 && sizeof(W) == 2) {
        packed[0] = count < kStep ? _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, from) : _mm512_loadu_si512(from);
    } else {
        vec half[2];
#pragma GCC unroll 2
        for (int64_t h = 0; h < 2; ++h) {
            const int64_t left = count - h * kWidth;
            half[h] = left <= 0 ? splat(0.0f) : load_some(place(from, h * kWidth), left < kWidth ? left : kWidth);
            if (P > 1 && sizeof(W) == 1) half[h] = half[h] * splat(weight.scale[o * weight.groups + k / weight.group]);
        }
        join(half[0], half[1], packed);
    }
}

// A panel of W from row o on, K columns from begin on: two tiles for each step and part, zero past the ends.
template <int P, typename W>
static void pack_w(const Weight<W>& weight, int64_t o, int64_t O, int64_t begin, int64_t K, bf16* to) {
    for (int64_t k = 0; k < K; k += kStep) {
        for (int64_t i = 0; i < kPanel; ++i, to += kStep) {
            __m512i packed[P] = {};
            if (o + i < O) parts_of(weight, o + i, begin + k, K - k < kStep ? K - k : kStep, packed);
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p) _mm512_store_si512(to + p * 2 * kTileSize, packed[p]);
        }
        to += (P - 1) * 2 * kTileSize;
    }
}

// Rows m .. m + 16 and columns o .. o + 32 of the output from the sums of two tiles, times the columns' scales where there are any.
template <typename T>
static void finish_tiles(const LinearTask& task, int64_t m, int64_t o, const float* first, const float* second, const float* scale) {
    const int64_t rows = task.M - m < kTile ? task.M - m : kTile, columns = task.O - o < kPanel ? task.O - o : kPanel;
    alignas(64) float y[kTile * kPanel];
    for (int64_t t = 0; t < 2; ++t) {
        vec r[kWidth];
        for (int i = 0; i < kWidth; ++i) r[i] = load((t == 0 ? first : second) + i * kTile);
        transpose(r);
        const int64_t left = columns - t * kTile;
        const vec factor = scale == nullptr || left <= 0 ? splat(1.0f) : load_some(scale + o + t * kTile, left < kWidth ? left : kWidth);
        for (int i = 0; i < kWidth; ++i) store(y + i * kPanel + t * kTile, r[i] * factor);
    }
    for (int64_t i = 0; i < rows; ++i) finish<T>(task, m + i, o, columns, y + i * kPanel);
}

// How the work is cut up: I into depths, O into panels of W, M into blocks of panels of x.
template <typename T, typename W, int PW>
struct Job {
    static constexpr int PX = kParts<T>;
    const LinearTask& task;
    const Weight<W> weight;
    const int64_t depths, depth, x_tile;
    int64_t first_w, end_w, first_x, end_x;  // this thread's panels
    int64_t held = 1, waiting = 1;           // depths of x that are packed at a time; panels of W whose sums wait for the next
    int64_t blocks, most;                    // blocks of x, and panels of the largest
    int64_t from = 0, panels = 0;            // the block at hand
    float *sums = nullptr, *added = nullptr;
    bf16 *w = nullptr, *x = nullptr;

    // Thread `share` of those that were asked for, in `splits` groups that differ in their rows of x.
    Job(const LinearTask& task, int64_t splits, int64_t share)
        : task(task),
          weight(task),
          depths(task.I > kMaxK ? ceil_div(task.I, kMaxK) : 1),
          depth(ceil_div(ceil_div(task.I, depths), kStep) * kStep),
          x_tile(depth * kTile * PX) {
        const int64_t x_panels = ceil_div(task.M, kPanel), w_panels = ceil_div(task.O, kPanel), w_splits = task.threads / splits;
        first_w = w_panels * (share / splits) / w_splits;
        end_w = w_panels * (share / splits + 1) / w_splits;
        first_x = x_panels * (share % splits) / splits;
        end_x = x_panels * (share % splits + 1) / splits;
        // Few rows of x are packed whole; of many, one depth at a time.
        if (depths == 1 || (end_x - first_x) * 4 * x_tile * depths <= kHeld) {
            held = depths;
        } else {
            waiting = end_w - first_w;
        }
        const int64_t bytes = 4 * x_tile * held + 16 * kSums * waiting, room = bytes < kHeld ? kHeld / bytes : 1;
        blocks = ceil_div(end_x - first_x, room);
        most = blocks == 0 ? 0 : ceil_div(end_x - first_x, blocks);
    }

    int64_t floats() const { return 4 * kSums * (1 + most * waiting) + (depth * PW * kPanel + x_tile * 2 * most * held) / 2; }
    int64_t columns(int64_t d) const { return task.I - d * depth < depth ? task.I - d * depth : depth; }
    bf16* packed(int64_t d, int64_t tile) const { return x + (d % held * panels * 2 + tile) * x_tile; }

    // The rows of the next panel of W, a share of them for each panel of x, and the lines of y that will be written.
    void ahead(int64_t s, int64_t i, int64_t p, int64_t next_w, int64_t next_d, bool last) const {
        const char* next = reinterpret_cast<const char*>(place(weight.row(next_w * kPanel), next_d * depth + s * kStep));
        constexpr int64_t bytes = kStep * sizeof(W);
        for (int64_t r = kPanel * i / panels; r < kPanel * (i + 1) / panels; ++r) {
            const char* line = next + r * weight.stride * static_cast<int64_t>(sizeof(W));
            for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(line + b, _MM_HINT_T1);
        }
        const int64_t m = (from + i) * kPanel + s;
        if (!last || s >= kPanel || m >= task.M) return;
        const T* to = static_cast<const T*>(task.out) + (task.rows == nullptr ? m : task.rows[m]) * task.out_stride + p * kPanel;
        __builtin_prefetch(to);
        __builtin_prefetch(to + kTile);
    }

    // Depth d of panel p of W with the block of x; next_*: what comes after.
    void multiply(int64_t p, int64_t d, int64_t next_w, int64_t next_d) const {
        const int64_t K = columns(d), steps = ceil_div(K, kStep);
        const bool last = d + 1 == depths;
        Left left{w, kStep, 2 * kTileSize};
        if (PW == 1 && sizeof(W) == 2 && (p + 1) * kPanel <= task.O && K % kStep == 0) {
            left = {reinterpret_cast<const bf16*>(place(weight.row(p * kPanel), d * depth)), task.I, kStep};
        } else {
            pack_w<PW>(weight, p * kPanel, task.O, d * depth, K, w);
        }
        for (int64_t i = 0; i < panels; ++i) {
            const int64_t m = (from + i) * kPanel;
            float *to = sums + ((p - first_w) % waiting * panels + i) * 4 * kSums, *c = d == 0 ? to : added;
            const auto fetch = [&](int64_t s) { ahead(s, i, p, next_w, next_d, last); };
            if (m + kTile < task.M) {
                products<PW, PX, 2>(left, packed(d, 2 * i), x_tile, steps, c, fetch);
            } else {
                products<PW, PX, 1>(left, packed(d, 2 * i), x_tile, steps, c, fetch);
            }
            for (int64_t j = 0; j < 4 * kSums && d > 0; j += kWidth) store(to + j, load(to + j) + load(added + j));
            for (int64_t n = 0; n < 2 && last && m + n * kTile < task.M; ++n) {
                const float* scale = PW == 1 && sizeof(W) == 1 ? task.scale : nullptr;
                finish_tiles<T>(task, m + n * kTile, p * kPanel, to + n * kSums, to + (n + 2) * kSums, scale);
            }
        }
    }

    // scratch: `floats` of them.
    void run(float* scratch) {
        if (end_x == first_x || end_w == first_w) return;
        sums = scratch;
        added = sums + 4 * kSums * most * waiting;
        w = reinterpret_cast<bf16*>(added + 4 * kSums);
        x = w + depth * PW * kPanel;
        const TileShapes shapes;
        for (int64_t b = 0; b < blocks; ++b) {
            from = first_x + (end_x - first_x) * b / blocks;
            panels = first_x + (end_x - first_x) * (b + 1) / blocks - from;
            for (int64_t begin = 0; begin < depths; begin += held) {
                for (int64_t d = begin; d < begin + held; ++d) {
                    for (int64_t t = 0; t < 2 * panels; ++t)
                        pack_x<T>(task, from * kPanel + t * kTile, d * depth, columns(d), packed(d, t));
                }
                for (int64_t u = first_w * held; u < end_w * held; ++u) {
                    multiply(u / held, begin + u % held, (u + 1) / held, begin + (u + 1) % held);
                }
            }
        }
    }
};

template <typename T, typename W, int PW>
static void on_tiles(const LinearTask& task) {
    const int64_t splits = splits_of_rows(ceil_div(task.M, kPanel), ceil_div(task.O, kPanel), task.threads, 0, 2);
    int64_t floats = 0;
    for (int64_t share = 0; share < task.threads; ++share) {
        const int64_t needed = Job<T, W, PW>(task, splits, share).floats();
        floats = needed > floats ? needed : floats;
    }
    const Scratch scratch(task.threads, floats);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t share = 0; share < task.threads; ++share) Job<T, W, PW>(task, splits, share).run(scratch.of(share));
}

template <typename T>
static void run_as(const LinearTask& task) {
    switch (task.weight_type) {
        case WeightType::f32:
            return on_tiles<T, float, kParts<float>>(task);
        case WeightType::bf16:
            return on_tiles<T, bf16, kParts<bf16>>(task);
        case WeightType::f16:
            return on_tiles<T, f16, kParts<f16>>(task);
        case WeightType::int8:
            return task.group >= task.I ? on_tiles<T, int8_t, 1>(task) : on_tiles<T, int8_t, 3>(task);
        case WeightType::int4:
            return on_tiles<T, nibbles, kParts<nibbles>>(task);
    }
}

}  // namespace ISA

void linear_amx(const LinearTask& task) {
    // Few rows read W at memory's speed without tiles; at 9 to 16, W in bf16 does so only with them (2026-11: 10.0 against 7.0 GB/s).
    if (!task.invariant && task.M <= (task.weight_type == WeightType::bf16 ? 8 : 16)) return linear_avx512(task);
    switch (task.dtype) {
        case DType::f32:
            return ISA::run_as<float>(task);
        case DType::bf16:
            return ISA::run_as<bf16>(task);
        case DType::f16:
            return ISA::run_as<f16>(task);
        case DType::f64:
        case DType::e4m3:
            return;  // refused by the caller
    }
}

}  // namespace llava_fast
