// The backward pass of attention, compiled once per instruction set.
//
// A piece is one key-value head of a family: sequences that share key rows through their prefixes, alone otherwise. It recomputes the
// weights once, tile by tile, and does five products with them: keys outside, blocks of lanes inside, so that a tile's gradients of k
// and v stay in cache while the gradients of q add up in memory. One thread does a family in a fixed order: no atomics, and the same
// bits for any number of threads.
#pragma once

#include "cpu/attention_tile.h"

namespace llava_fast {
namespace ISA {

struct GradBlock {
    int64_t first, n;               // its lanes
    bool few;                       // the forward pass went by keys
    int columns;                    // registers
    int64_t lowest, highest;        // limits
    float *query, *grad;            // columns [d, columns * kWidth], the query times scale
    float *query_rows, *grad_rows;  // the same as rows [columns * kWidth, width]
    float* grad_query;              // [d up to kRows, columns * kWidth]
    float *lse, *delta, *limit;
};

// to[j, c:] += sum_i weights[j, i] rows[i, c:] for n keys rounded up to kRows, N registers of columns and kA lanes
template <int N, int64_t kA>
static void add_products(const float* weights, const float* rows, int64_t width, int64_t n, float* to) {
    for (int64_t j = 0; j < n; j += kRows) {
        product<N, kA, 1>(weights + j * kA, rows, width, kA, [&](int r, int i, vec sum) {
            float* place = to + (j + r) * kStride + i * kWidth;
            store(place, load(place) + sum);
        });
    }
}

template <int64_t kA>
static void add_all_products(const float* weights, const float* rows, int64_t width, int64_t n, float* to) {
    for (int64_t c = 0; c < width;) {
        const int64_t left = (width - c) / kWidth;
        if (left == 1) {
            add_products<1, kA>(weights, rows + c, width, n, to + c);
        } else if (left == 2 || left == 4) {
            add_products<2, kA>(weights, rows + c, width, n, to + c);
        } else {
            add_products<3, kA>(weights, rows + c, width, n, to + c);
        }
        c += kWidth * (left == 4 ? 2 : least(left, 3));
    }
}

// scores[j, lane] in the order of additions of the forward pass by keys. Of a single key the weight exp(s - lse) is 1 then; in the
// order of `dots` it was up to 9 roundings from 1.
static void few_dots(const float* keys, const GradBlock& block, int64_t n, int64_t width, float* scores) {
    for (int64_t j = 0; j < n; j += kWidth) {
        const Widened rows{keys + j * kStride};  // those past n are anything, and so are their scores
        vec products[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) products[i] = i < block.n ? dot_rows(rows, block.query_rows + i * width, width) : splat(0.0f);
        transpose(products);
        for (int64_t k = 0; k < kWidth; ++k) store(scores + (j + k) * kWidth, products[k]);
    }
}

template <int N>
static void backward_tile(const GradBlock& block, const float* keys, const float* values, int64_t first_key, int64_t n, int64_t d,
                          int64_t width, float* weights, float* grads, float* grad_keys, float* grad_values) {
    if (block.few) {
        few_dots(keys, block, n, width, weights);
    } else {
        dots<N>(keys, block.query, n, d, weights);
    }
    if (block.lowest < first_key + n) hide<N>(weights, first_key, n, block.limit);
    dots<N>(values, block.grad, n, d, grads);
    vec lse[N], delta[N], one[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        lse[i] = load(block.lse + i * kWidth);
        delta[i] = load(block.delta + i * kWidth);
        one[i] = splat(1.0f);
    }
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            float *weight = weights + (j * N + i) * kWidth, *grad = grads + (j * N + i) * kWidth;
            // Rounding may leave a score a little above lse.
            const vec p = exp_negative(load(weight) - lse[i]);
            store(weight, p);
            store(grad, p * (load(grad) - delta[i]));
        }
    }
    for (int64_t i = n * N * kWidth; i < up(n, kRows) * N * kWidth; ++i) weights[i] = grads[i] = 0.0f;
    add_all_products<N * kWidth>(weights, block.grad_rows, width, n, grad_values);
    add_all_products<N * kWidth>(grads, block.query_rows, width, n, grad_keys);
    weigh<N>(keys, grads, n, d, one, block.grad_query);
}

// Rows of lanes as rows: to[i * width + c] = factor * row i, column c; zero past d.
template <typename T>
static void gather_rows(const AttentionTask& task, const Sequence& seq, const Rows& rows, int64_t g, int64_t first, int64_t n,
                        int64_t lanes, float factor, float* to, int64_t width) {
    for (int64_t i = 0; i < lanes; ++i, to += width) {
        const T* from = lane_row<T>(task, seq, rows, g, first + least(i, n - 1));
        for (int64_t c = 0; c < width; c += kWidth) {
            store(to + c, i >= n ? splat(0.0f) : load(from + c, least(kWidth, task.d - c)) * splat(factor));
        }
    }
}

// Fills a block whose pointers are set.
static void prepare(const AttentionTask& task, const Sequence& seq, int64_t g, int64_t width, GradBlock& block) {
    const int64_t lanes = block.columns * kWidth, R = task.H / task.G, d = task.d;
    gather(task, seq, task.q, g, block.first, block.n, task.scale, block.query, lanes);
    gather(task, seq, task.grad_out, g, block.first, block.n, 1.0f, block.grad, lanes);
    LLAVA_FAST_BY_TYPE(task.q.type, gather_rows<T>(task, seq, task.q, g, block.first, block.n, lanes, task.scale, block.query_rows, width);
                       gather_rows<T>(task, seq, task.grad_out, g, block.first, block.n, lanes, 1.0f, block.grad_rows, width);)
    // delta adds up in the order of dout . v, so that the difference of the two is 0 where a lane sees one key.
    gather(task, seq, task.out, g, block.first, block.n, 1.0f, block.grad_query, lanes);
    for (int64_t i = 0; i < lanes; i += kWidth) {
        vec sum = splat(0.0f);
        for (int64_t c = 0; c < d; ++c) sum = fma(load(block.grad_query + c * lanes + i), load(block.grad + c * lanes + i), sum);
        store(block.delta + i, sum);
    }
    for (int64_t i = 0; i < up(d, kRows) * lanes; ++i) block.grad_query[i] = 0.0f;
    block.lowest = keys_of(seq);
    block.highest = 0;
    for (int64_t i = 0; i < lanes; ++i) {
        const int64_t lane = block.first + least(i, block.n - 1);
        const int64_t limit = limit_of(task, seq, lane / R);
        const float lse = task.lse[(seq.q_start + lane / R) * task.H + g * R + lane % R];
        block.limit[i] = static_cast<float>(limit);
        block.lowest = least(block.lowest, limit);
        block.highest = most(block.highest, limit);
        // Without a key, and for columns past the last lane, every weight is 0.
        block.lse[i] = i >= block.n || lse == -__builtin_inff() ? 3e38f : lse;
    }
}

template <typename T>
static void write_rows(const Rows& rows, const int64_t* row, int64_t n, int64_t g, int64_t d, const float* from, int64_t width) {
    for (int64_t i = 0; i < n; ++i, from += width) {
        T* to = static_cast<T*>(rows.data) + row[i] * rows.row + g * rows.head;
        for (int64_t c = 0; c < d; ++c) narrow(from[c], to + c);
    }
}

// How a family's memory is laid out: its blocks, the tile at hand, the gradients of its key rows, the blocks' columns.
struct FamilySizes {
    int64_t rows, blocks;         // its key rows; the most blocks of a sequence
    int64_t state, block_floats;  // floats of a block's columns, and of its GradBlock
    int64_t floats;               // of all
};

static FamilySizes family_sizes(const AttentionTask& task, int64_t family) {
    const int64_t d = task.d, R = task.H / task.G, width = up(d, kWidth);
    int64_t lanes = 0;
    for (int64_t m = task.family_start[family]; m < task.family_start[family + 1]; ++m) {
        lanes = most(lanes, task.sequences[task.family[m]].n_q * R);
    }
    FamilySizes sizes;
    sizes.rows = task.family_row_start[family + 1] - task.family_row_start[family];
    sizes.blocks = (lanes + kLanes - 1) / kLanes;
    sizes.state = kLanes * (2 * d + 2 * width + up(d, kRows) + 3);
    sizes.block_floats = static_cast<int64_t>(sizeof(GradBlock) / sizeof(float));
    sizes.floats = 2 * sizes.rows * width + kTile * (4 * kStride + 2 * kLanes) + sizes.blocks * (sizes.state + sizes.block_floats);
    return sizes;
}

static void backward_family(const AttentionTask& task, int64_t family, int64_t g, float* scratch) {
    const int64_t d = task.d, R = task.H / task.G, width = up(d, kWidth), columns = up(d, kRows);
    const int64_t* row = task.family_row + task.family_row_start[family];
    const FamilySizes sizes = family_sizes(task, family);
    const int64_t rows = sizes.rows, state = sizes.state;
    GradBlock* blocks = reinterpret_cast<GradBlock*>(scratch);
    float *keys = scratch + sizes.blocks * sizes.block_floats, *values = keys + kTile * kStride, *tile_k = values + kTile * kStride,
          *tile_v = tile_k + kTile * kStride;
    float *weights = tile_v + kTile * kStride, *grads = weights + kTile * kLanes;
    float *grad_k = grads + kTile * kLanes, *grad_v = grad_k + rows * width, *states = grad_v + rows * width;
    for (int64_t i = 0; i < 2 * rows * width; ++i) grad_k[i] = 0.0f;

    for (int64_t m = task.family_start[family]; m < task.family_start[family + 1]; ++m) {
        const Sequence& seq = task.sequences[task.family[m]];
        const int64_t lanes = seq.n_q * R, count = (lanes + kLanes - 1) / kLanes;
        int64_t highest = 0;
        for (int64_t b = 0; b < count; ++b) {
            GradBlock& block = blocks[b];
            block.first = b * kLanes;
            block.n = least(kLanes, lanes - block.first);
            block.columns = static_cast<int>((block.n + kWidth - 1) / kWidth);
            block.few = lanes <= kFewLanes;
            block.query = states + b * state;
            block.grad = block.query + d * kLanes;
            block.query_rows = block.grad + d * kLanes;
            block.grad_rows = block.query_rows + width * kLanes;
            block.grad_query = block.grad_rows + width * kLanes;
            block.lse = block.grad_query + columns * kLanes;
            block.delta = block.lse + kLanes;
            block.limit = block.delta + kLanes;
            prepare(task, seq, g, width, block);
            highest = most(highest, block.highest);
        }
        for (int64_t j = 0; j < highest; j += kTile) {
            const int64_t n = least(kTile, highest - j);
            copy(task, seq, task.k, nullptr, g, j, n, keys);
            copy(task, seq, task.v, nullptr, g, j, n, values);
            for (int64_t r = 0; r < up(n, kRows); ++r) {
                for (int64_t c = 0; c < width; ++c) tile_k[r * kStride + c] = tile_v[r * kStride + c] = 0.0f;
            }
            for (int64_t b = 0; b < count; ++b) {
                const int64_t seen = least(n, blocks[b].highest - j);
                if (seen <= 0) continue;
                switch (blocks[b].columns) {
                    case 1:
                        backward_tile<1>(blocks[b], keys, values, j, seen, d, width, weights, grads, tile_k, tile_v);
                        break;
                    case 2:
                        backward_tile<2>(blocks[b], keys, values, j, seen, d, width, weights, grads, tile_k, tile_v);
                        break;
                    default:
                        backward_tile<3>(blocks[b], keys, values, j, seen, d, width, weights, grads, tile_k, tile_v);
                }
            }
            for (int64_t r = 0; r < n; ++r) {
                const int64_t place = task.row_place[j + r < seq.shared ? seq.prefix + j + r : seq.start + j + r - seq.shared] * width;
                for (int64_t c = 0; c < width; ++c) {
                    grad_k[place + c] += tile_k[r * kStride + c];
                    grad_v[place + c] += tile_v[r * kStride + c];
                }
            }
        }
        float factor[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) factor[i] = task.scale;
        for (int64_t b = 0; b < count; ++b) {
            scatter(task, seq, task.grad_q, g, blocks[b].first, blocks[b].n, factor, blocks[b].grad_query, blocks[b].columns * kWidth);
        }
    }
    LLAVA_FAST_BY_TYPE(task.grad_k.type, write_rows<T>(task.grad_k, row, rows, g, d, grad_k, width);
                       write_rows<T>(task.grad_v, row, rows, g, d, grad_v, width);)
}

}  // namespace ISA

void LLAVA_FAST_JOIN(attention_backward_, ISA)(const AttentionTask& task) {
    int64_t floats = 0;
    for (int64_t f = 0; f < task.family_count; ++f) floats = ISA::most(floats, ISA::family_sizes(task, f).floats);
    const Scratch scratch(task.threads, floats);
#pragma omp parallel for schedule(dynamic, 1) num_threads(task.threads) if (task.threads > 1)
    for (int64_t i = 0; i < task.family_count * task.G; ++i) {
        ISA::backward_family(task, task.family_order[i / task.G], i % task.G, scratch.mine());
    }
}

}  // namespace llava_fast
