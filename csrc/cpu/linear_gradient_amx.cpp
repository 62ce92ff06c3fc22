// Products of the backward pass on tiles of bf16 at fp32's accuracy; linear_amx.cpp says how, and what becomes of infinities.
//
// A is the left operand, so that sums lie as `out` does, and B, whose rows are pairs already, the right one: of the four layouts only a
// transposed A is transposed on its way. A block of B (kDepth of K by as many columns as stay in L2) is split and packed once, and A's
// panels of 32 rows pass, each packed once a block. K is cut into depths, which are added up in `out`.
#define ISA amx
#include "cpu/linear_gradient.h"
#include "cpu/linear_parts.h"
#include "cpu/linear_tiles.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kDepth = 384;  // 17 panels of B in L2: the 1024 columns of a 0.5b decoder are one block for each of two threads
constexpr int kPartsA = 3;
constexpr int64_t kAheadB = 8;        // rows of B that are fetched before they are packed
constexpr int64_t kAround = 1 << 22;  // numbers of `out`, more than a cache would keep

static inline vec load_upto(const float* from, int64_t count) {
    return count <= 0 ? splat(0.0f) : load_some(from, count < kWidth ? count : kWidth);
}

template <typename T>
struct Product {
    static constexpr int P = kParts<T>;
    const ProductTask& task;
    const int64_t depths, depth, tile;       // tile: elements of a tile of B in all steps and parts
    int64_t first_m, end_m, first_n, end_n;  // this thread's panels
    int64_t blocks, most;                    // blocks of B, and panels of the largest
    const bool around;                       // whether `out` is written around the caches, whole lines once
    float* sums = nullptr;
    bf16 *left = nullptr, *right = nullptr;

    Product(const ProductTask& task, int64_t splits, int64_t share)
        : task(task),
          depths(task.K > kDepth ? ceil_div(task.K, kDepth) : 1),
          depth(ceil_div(ceil_div(task.K, depths), kStep) * kStep),
          tile(depth * kTile * P),
          around(!task.add && depths == 1 && task.N % kTile == 0 && task.out_stride % kTile == 0 && task.M * task.N >= kAround &&
                 reinterpret_cast<uintptr_t>(task.out) % 64 == 0) {
        const int64_t rows = ceil_div(task.M, kPanel), columns = ceil_div(task.N, kPanel), column_splits = task.threads / splits;
        first_m = rows * (share % splits) / splits;
        end_m = rows * (share % splits + 1) / splits;
        first_n = columns * (share / splits) / column_splits;
        end_n = columns * (share / splits + 1) / column_splits;
        const int64_t room = 4 * tile > 0 && 4 * tile < kHeld ? kHeld / (4 * tile) : 1;
        blocks = ceil_div(end_n - first_n, room);
        most = blocks == 0 ? 0 : ceil_div(end_n - first_n, blocks);
    }

    // In products of two panels: packing a panel takes as long as one or two of them.
    int64_t cost() const { return (end_m - first_m) * (end_n - first_n + 2 * blocks) + end_n - first_n; }

    int64_t floats() const { return 4 * kSums + (depth * kPartsA * kPanel + 2 * tile * most) / 2; }

    // A's panel from row m on, `count` of K from `begin` on: two tiles for each step and part, zero past the ends.
    void pack_rows(int64_t m, int64_t begin, int64_t count) const {
        bf16* to = left;
        for (int64_t k = 0; k < count; k += kStep, to += (kPartsA - 1) * 2 * kTileSize) {
            for (int64_t i = 0; i < kPanel; ++i, to += kStep) {
                __m512i packed[kPartsA] = {};
                const float* from = task.a + (m + i) * task.a_stride + begin + k;
                if (m + i < task.M) join(load_upto(from, count - k), load_upto(from + kWidth, count - k - kWidth), packed);
#pragma GCC unroll 3
                for (int p = 0; p < kPartsA; ++p) _mm512_store_si512(to + p * 2 * kTileSize, packed[p]);
            }
        }
    }

    void pack_columns(int64_t m, int64_t begin, int64_t count) const {
        bf16* to = left;
        for (int64_t k = 0; k < count; k += kStep, to += (kPartsA - 1) * 2 * kTileSize) {
            for (int64_t t = 0; t < 2; ++t) {
                vec r[2][kWidth];
#pragma GCC unroll 2
                for (int64_t h = 0; h < 2; ++h) {
#pragma GCC unroll 16
                    for (int64_t i = 0; i < kWidth; ++i) {
                        const int64_t at = k + h * kWidth + i;
                        const float* from = task.a + (begin + at) * task.a_stride + m + t * kTile;
                        r[h][i] = load_upto(from, at < count ? task.M - m - t * kTile : 0);
                    }
                    transpose(r[h]);
                }
#pragma GCC unroll 16
                for (int64_t i = 0; i < kTile; ++i, to += kStep) {
                    __m512i packed[kPartsA];
                    join(r[0][i], r[1][i], packed);
#pragma GCC unroll 3
                    for (int p = 0; p < kPartsA; ++p) _mm512_store_si512(to + p * 2 * kTileSize, packed[p]);
                }
            }
        }
    }

    // B's block: `panels` from panel n on.
    void pack_block(int64_t n, int64_t panels, int64_t begin, int64_t count) const {
        const T* b = static_cast<const T*>(task.b);
        for (int64_t k = 0; k < ceil_div(count, kStep) * kStep; k += 2) {
            const T *first = b + (begin + k) * task.b_stride, *second = first + task.b_stride;
            bf16* to = right + k / kStep * P * kTileSize + k % kStep * kTile;
            for (int64_t j = 0; j < 2 * panels; ++j) {
                const int64_t column = n * kPanel + j * kTile, some = task.N - column < kWidth ? task.N - column : kWidth;
                const vec zero = splat(0.0f);
                __builtin_prefetch(first + column + kAheadB * task.b_stride);
                __builtin_prefetch(second + column + kAheadB * task.b_stride);
                pair<P>(k < count && some > 0 ? load_some(first + column, some) : zero,
                        k + 1 < count && some > 0 ? load_some(second + column, some) : zero, to + j * tile);
            }
        }
    }

    // The sums of four tiles to rows m .. and columns n .. of `out`.
    void write(int64_t m, int64_t n, bool add) const {
        for (int64_t i = 0; i < kPanel && m + i < task.M; ++i) {
            for (int64_t h = 0; h < 2; ++h) {
                const int64_t left_over = task.N - n - h * kTile, some = left_over < kWidth ? left_over : kWidth;
                if (some <= 0) continue;
                float* to = task.out + (m + i) * task.out_stride + n + h * kTile;
                const vec sum = load(sums + (i / kTile * 2 + h) * kSums + i % kTile * kTile);
                if (around) {
                    _mm512_stream_ps(to, sum);
                } else {
                    store_some(to, add ? load_some(to, some) + sum : sum, some);
                }
            }
        }
    }

    void block(int64_t n, int64_t panels, int64_t d) const {
        const int64_t begin = d * depth, rest = task.K - begin, count = rest < 0 ? 0 : rest < depth ? rest : depth;
        const int64_t steps = ceil_div(count, kStep);
        pack_block(n, panels, begin, count);
        for (int64_t m = first_m; m < end_m; ++m) {
            if (task.a_transposed) {
                pack_columns(m * kPanel, begin, count);
            } else {
                pack_rows(m * kPanel, begin, count);
            }
            for (int64_t i = 0; i < panels; ++i) {
                const auto fetch = [&](int64_t s) {
                    if (around) return;
                    for (int64_t row = kPanel * s / steps; row < kPanel * (s + 1) / steps; ++row) {
                        const float* to = task.out + (m * kPanel + row) * task.out_stride + (n + i) * kPanel;
                        __builtin_prefetch(to);
                        __builtin_prefetch(to + kTile);
                    }
                };
                products<kPartsA, P, 2>({left, kStep, 2 * kTileSize}, right + 2 * i * tile, tile, steps, sums, fetch);
                write(m * kPanel, (n + i) * kPanel, task.add || d > 0);
            }
        }
    }

    // scratch: `floats` of them.
    void run(float* scratch) {
        if (end_m == first_m || end_n == first_n) return;
        sums = scratch;
        left = reinterpret_cast<bf16*>(sums + 4 * kSums);
        right = left + depth * kPartsA * kPanel;
        const TileShapes shapes;
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t n = first_n + (end_n - first_n) * b / blocks, end = first_n + (end_n - first_n) * (b + 1) / blocks;
            for (int64_t d = 0; d < depths; ++d) block(n, end - n, d);
        }
        _mm_sfence();  // what went around the caches
    }
};

template <typename T>
static void on_tiles(const ProductTask& task) {
    int64_t splits = 1, best = 0, floats = 0;
    for (int64_t some = 1; some <= task.threads; ++some) {
        if (task.threads % some) continue;
        int64_t cost = 0, needed = 0;
        for (int64_t share = 0; share < task.threads; ++share) {
            const Product<T> part(task, some, share);
            cost = part.cost() > cost ? part.cost() : cost;
            needed = part.floats() > needed ? part.floats() : needed;
        }
        if (some > 1 && cost >= best) continue;
        splits = some;
        best = cost;
        floats = needed;
    }
    const Scratch scratch(task.threads, floats);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t share = 0; share < task.threads; ++share) Product<T>(task, splits, share).run(scratch.of(share));
}

}  // namespace ISA

void product_amx(const ProductTask& task) {
    if (task.b_type == DType::bf16) return ISA::on_tiles<bf16>(task);
    ISA::on_tiles<float>(task);
}

}  // namespace llava_fast
