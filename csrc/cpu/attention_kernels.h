// The forward pass of attention, compiled once per instruction set.
//
// Many lanes (prefill, training, the vision tower): a piece is a block of lanes of one key-value head; keys come in tiles, with a
// running maximum and sum. Few lanes (decode): the op reads keys and values once and little else, so a piece is a range of keys, all
// heads of it: rows are read in the order in which they lie in memory. A second pass joins the ranges.
#pragma once

#include "cpu/attention_tile.h"

namespace llava_fast {
namespace ISA {

// The state of up to kLanes lanes between tiles.
struct Block {
    int64_t g, first, n;      // its lanes
    int columns;              // registers
    int64_t lowest, highest;  // limits
    float *query, *sum;       // [d, columns * kWidth] and, up to kRows, the same
    float *largest, *total, *limit;
};

// Fetches the keys and values of the tile that comes next, a few lines between two products of the tile at hand, so that the products do
// not wait for lines of their own. Streams of lines that ascend, 16 rows at a time, are what the hardware reads ahead of.
struct Ahead {
    static constexpr int64_t kStreams = 16;
    const char* rows[2 * kTile];
    int64_t count = 0, lines = 0, row = 0, line = 0, share = 0;

    // Keys [j, j + n) of the piece's heads, in `turns` turns.
    void begin(const AttentionTask& task, const Sequence& seq, const Piece& piece, int64_t j, int64_t n, int64_t turns) {
        count = row = line = 0;
        const int64_t size = task.k.type == DType::f32 ? 4 : task.k.type == DType::e4m3 ? 1 : 2;
        const Rows* both[] = {&task.k, &task.v};
        for (const Rows* tensor : both) {
            for (int64_t r = 0; r < n; ++r) {
                const int64_t place = key_offset(task, seq, *tensor, j + r) + piece.g * tensor->head;
                rows[count++] = static_cast<const char*>(tensor->data) + place * size;
            }
        }
        lines = (piece.heads * task.d * size + 63) / 64;
        share = (count * lines + turns - 1) / turns;
    }
    void operator()() {
        for (int64_t i = 0; i < share && row < count; ++i) {
            __builtin_prefetch(rows[row] + line * 64);
            if (++row % kStreams != 0 && row != count) continue;
            if (++line < lines) {
                row = (row - 1) / kStreams * kStreams;
            } else {
                line = 0;
            }
        }
    }
};

template <int N>
static void forward_tile(const Block& block, const float* keys, const float* values, int64_t first_key, int64_t n, int64_t d, float* scores,
                         Ahead& ahead) {
    dots<N>(keys, block.query, n, d, scores, ahead);
    if (block.lowest < first_key + n) hide<N>(scores, first_key, n, block.limit);
    vec top[N], factor[N], total[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) top[i] = load(block.largest + i * kWidth);
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) top[i] = max(top[i], load(scores + (j * N + i) * kWidth));
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        factor[i] = exp_negative(load(block.largest + i * kWidth) - top[i]);
        total[i] = load(block.total + i * kWidth) * factor[i];
        store(block.largest + i * kWidth, top[i]);
    }
    for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            const vec p = exp_negative(load(scores + (j * N + i) * kWidth) - top[i]);
            total[i] = total[i] + p;
            store(scores + (j * N + i) * kWidth, p);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store(block.total + i * kWidth, total[i]);
    weigh<N>(values, scores, n, d, factor, block.sum, ahead);
}

// Floats of a block's state.
static inline int64_t state_size(int64_t d) {
    return kLanes * (2 * up(d, kRows) + 3);
}

static void forward_lanes(const AttentionTask& task, const Piece& piece, float* scratch) {
    const Sequence& seq = task.sequences[piece.sequence];
    const int64_t d = task.d, columns = up(d, kRows), R = task.H / task.G;
    const int64_t count = (piece.last - piece.first + kLanes - 1) / kLanes, state = state_size(d);
    float *keys = scratch, *values = keys + kTile * kStride, *scores = values + kTile * kStride, *states = scores + kTile * kLanes;
    Block blocks[kMaxLanes / kLanes];  // those of a head together
    int64_t highest = 0;
    for (int64_t b = 0; b < piece.heads * count; ++b) {
        Block& block = blocks[b];
        block.g = piece.g + b / count;
        block.first = piece.first + b % count * kLanes;
        block.n = least(kLanes, piece.last - block.first);
        block.columns = static_cast<int>((block.n + kWidth - 1) / kWidth);
        const int64_t width = block.columns * kWidth;
        block.query = states + b * state;
        block.sum = block.query + kLanes * columns;
        block.largest = block.sum + kLanes * columns;
        block.total = block.largest + kLanes;
        block.limit = block.total + kLanes;
        gather(task, seq, task.q, block.g, block.first, block.n, task.scale, block.query, width);
        for (int64_t i = 0; i < columns * width; ++i) block.sum[i] = 0.0f;
        block.lowest = keys_of(seq);
        block.highest = 0;
        for (int64_t i = 0; i < width; ++i) {
            const int64_t limit = limit_of(task, seq, (block.first + least(i, block.n - 1)) / R);
            block.limit[i] = static_cast<float>(limit);
            block.lowest = least(block.lowest, limit);
            block.highest = most(block.highest, limit);
            block.largest[i] = -1e30f;  // above what hide() leaves: a lane that sees nothing has a sum of zero
            block.total[i] = 0.0f;
        }
        highest = most(highest, block.highest);
    }
    Ahead ahead;
    for (int64_t j = 0; j < highest; j += kTile) {
        const int64_t n = least(kTile, highest - j), next = most(0, least(kTile, highest - j - kTile));
        ahead.begin(task, seq, piece, j + kTile, next, piece.heads * count * (up(n, kRows) + up(d, kRows)) / kRows);
        for (int64_t b = 0; b < piece.heads * count; ++b) {
            if (b % count == 0) {
                copy(task, seq, task.k, task.k_scale, blocks[b].g, j, n, keys);
                copy(task, seq, task.v, task.v_scale, blocks[b].g, j, n, values);
            }
            const int64_t seen = least(n, blocks[b].highest - j);
            if (seen <= 0) continue;
            switch (blocks[b].columns) {
                case 1:
                    forward_tile<1>(blocks[b], keys, values, j, seen, d, scores, ahead);
                    break;
                case 2:
                    forward_tile<2>(blocks[b], keys, values, j, seen, d, scores, ahead);
                    break;
                default:
                    forward_tile<3>(blocks[b], keys, values, j, seen, d, scores, ahead);
            }
        }
    }
    for (int64_t b = 0; b < piece.heads * count; ++b) {
        Block& block = blocks[b];
        for (int64_t i = 0; i < block.n; ++i) {
            const float total = block.total[i];
            if (task.lse != nullptr) {
                float* lse = task.lse + (seq.q_start + (block.first + i) / R) * task.H + block.g * R + (block.first + i) % R;
                *lse = total == 0.0f ? -__builtin_inff() : block.largest[i] + __builtin_logf(total);
            }
            block.total[i] = total == 0.0f ? 0.0f : 1.0f / total;
        }
        scatter(task, seq, task.out, block.g, block.first, block.n, block.total, block.sum, block.columns * kWidth);
    }
}

// to[l][c] += sum_k weights[l][k] * values[k][c] for L lanes and columns [c, c + U * kWidth), the last of which may be cut off by d.
template <int L, int U, typename Values>
static inline void add_columns(const Values& values, const float* weights, int64_t c, int64_t d, float* to, int64_t size) {
    constexpr int64_t kLine = kWidth * sizeof(float) / sizeof(*values[0]);
    vec total[L][U];
#pragma GCC unroll 8
    for (int i = 0; i < L * U; ++i) total[i / U][i % U] = load(to + i / U * size + c + i % U * kWidth);
    const int64_t left = d - c - (U - 1) * kWidth;
    for (int64_t k = 0; k < kWidth; ++k) {
        for (int64_t u = 0; u < U * kWidth; u += kLine) values.fetch(k, c + u);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
            const auto* from = values[k] + c + u * kWidth;
            const vec x = u == U - 1 && left < kWidth ? load(from, left) : load(from);
#pragma GCC unroll 2
            for (int l = 0; l < L; ++l) total[l][u] = fma(splat(weights[l * kChunk + k]), x, total[l][u]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < L * U; ++i) store(to + i / U * size + c + i % U * kWidth, total[i / U][i % U]);
}

template <int L, typename Values>
static inline void add_rows(const Values& values, const float* weights, int64_t d, float* to, int64_t size) {
    int64_t c = 0;
    for (; c + 3 * kWidth < d; c += 4 * kWidth) add_columns<L, 4>(values, weights, c, d, to, size);
    for (; c < d; c += kWidth) add_columns<L, 1>(values, weights, c, d, to, size);
}

// use(keys, their length) for kWidth keys of a head, which are widened where several lanes read them.
template <typename T, typename F>
static inline void with_rows(const T* const* rows, int64_t head, int64_t d, int64_t lanes, float* wide, F&& use) {
    InPlace<T> from;
    for (int k = 0; k < kWidth; ++k) from.rows[k] = rows[k] + head;
    if (lanes == 1) {
        use(from, d);
        return;
    }
    constexpr int64_t kLine = kWidth * sizeof(float) / sizeof(T);
    const int64_t whole = d / kWidth * kWidth;
    for (int k = 0; k < kWidth; ++k) {
        float* to = wide + k * kStride;
        for (int64_t c = 0; c < whole; c += kWidth) {
            if (c % kLine == 0) from.fetch(k, c);
            store(to + c, load(from[k] + c));
        }
        if (whole < d) store(to + whole, load(from[k] + whole, d - whole));
    }
    use(Widened{wide}, up(d, kWidth));
}

template <typename E>
static void forward_keys(const AttentionTask& task, const Piece& piece, float* scratch) {
    const Sequence& seq = task.sequences[piece.sequence];
    const int64_t d = task.d, G = task.G, R = task.H / G, lanes = seq.n_q * R, size = partial_size(d), n = piece.last - piece.first;
    float *queries = scratch, *scores = queries + G * lanes * size, *wide = scores + G * lanes * kChunk;
    float* partial = task.partial + piece.partial * size;
    for (int64_t g = 0; g < G; ++g) {
        const float factor = task.scale * (task.k_scale == nullptr ? 1.0f : task.k_scale[g]);
        for (int64_t l = 0; l < lanes; ++l) {
            float* to = queries + (g * lanes + l) * size;
            for (int64_t c = 0; c < size; ++c) to[c] = partial[(g * lanes + l) * size + c] = 0.0f;
            LLAVA_FAST_BY_TYPE(
                task.q.type, for (int64_t c = 0; c < d; ++c) { to[c] = factor * widen(lane_row<T>(task, seq, task.q, g, l)[c]); })
        }
    }
    int64_t limit[kFewLanes];
    for (int64_t l = 0; l < lanes; ++l) limit[l] = limit_of(task, seq, l / R) - piece.first;
    // Lane k takes keys k * steps, k * steps + 1, ...: kWidth streams that each read rows in the order of memory. Neighbouring keys in the
    // lanes would share pages, in which the hardware follows only one stream (a bf16 cache, 16 x 64: 12 GB/s of 23).
    const int64_t steps = (n + kWidth - 1) / kWidth;
    const E* rows[kWidth];
    const auto find = [&](const auto& tensor, int64_t j) {
        for (int64_t k = 0; k < kWidth; ++k) {
            rows[k] = static_cast<const E*>(tensor.data) + key_offset(task, seq, tensor, piece.first + least(k * steps + j, n - 1));
        }
    };
    for (int64_t j = 0; j < steps; ++j) {
        find(task.k, j);
        for (int64_t g = 0; g < G; ++g) {
            with_rows(rows, g * task.k.head, d, lanes, wide, [&](const auto& keys, int64_t length) {
                for (int64_t l = 0; l < lanes; ++l) {
                    float* to = scores + (g * lanes + l) * kChunk + j * kWidth;
                    store(to, dot_rows(keys, queries + (g * lanes + l) * size, length));
                    const int64_t seen = least(limit[l], n);
                    for (int64_t k = seen < n || n < steps * kWidth ? 0 : kWidth; k < kWidth; ++k) {
                        if (k * steps + j >= seen) to[k] = -3e38f;
                    }
                }
            });
        }
    }
    for (int64_t i = 0; i < G * lanes; ++i) {
        vec top = splat(-1e30f), total = splat(0.0f);
        for (int64_t j = 0; j < steps * kWidth; j += kWidth) top = max(top, load(scores + i * kChunk + j));
        top = splat(largest(top));
        for (int64_t j = 0; j < steps * kWidth; j += kWidth) {
            const vec p = exp_negative(load(scores + i * kChunk + j) - top);
            total = total + p;
            store(scores + i * kChunk + j, p);
        }
        float part[kWidth];
        store(part, top);
        partial[(i + 1) * size - 2] = part[0];
        partial[(i + 1) * size - 1] = sum(total);
    }
    for (int64_t j = 0; j < steps; ++j) {
        find(task.v, j);
        for (int64_t g = 0; g < G; ++g) {
            with_rows(rows, g * task.v.head, d, lanes, wide, [&](const auto& values, int64_t length) {
                int64_t i = g * lanes;
                for (; i + 1 < (g + 1) * lanes; i += 2) {
                    add_rows<2>(values, scores + i * kChunk + j * kWidth, length, partial + i * size, size);
                }
                if (i < (g + 1) * lanes) add_rows<1>(values, scores + i * kChunk + j * kWidth, length, partial + i * size, size);
            });
        }
    }
}

// The partial results of one sequence and key-value head become its rows of the output.
static void join(const AttentionTask& task, int64_t few, int64_t g, float* out) {
    const Sequence& seq = task.sequences[task.few[few]];
    const int64_t d = task.d, R = task.H / task.G, lanes = seq.n_q * R, size = partial_size(d);
    const int64_t parts = (task.few_partial[few + 1] - task.few_partial[few]) / (task.G * lanes);
    const float scale = task.v_scale == nullptr ? 1.0f : task.v_scale[g];
    for (int64_t l = 0; l < lanes; ++l) {
        const float* first = task.partial + (task.few_partial[few] + g * lanes + l) * size;
        const int64_t step = task.G * lanes * size;
        float top = -1e30f, total = 0.0f;
        for (int64_t p = 0; p < parts; ++p) top = first[p * step + size - 2] > top ? first[p * step + size - 2] : top;
        for (int64_t c = 0; c < size; ++c) out[c] = 0.0f;
        for (int64_t p = 0; p < parts; ++p) {
            float factor[kWidth];
            store(factor, exp_negative(splat(first[p * step + size - 2] - top)));
            total += factor[0] * first[p * step + size - 1];
            for (int64_t c = 0; c < d; ++c) out[c] += factor[0] * first[p * step + c];
        }
        const float inverse = total == 0.0f ? 0.0f : scale / total;
        LLAVA_FAST_BY_TYPE(task.out.type, T* to = const_cast<T*>(lane_row<T>(task, seq, task.out, g, l));
                           for (int64_t c = 0; c < d; ++c) narrow(out[c] * inverse, to + c);)
        if (task.lse != nullptr) {
            const float lse = total == 0.0f ? -__builtin_inff() : top + __builtin_logf(total);
            task.lse[(seq.q_start + l / R) * task.H + g * R + l % R] = lse;
        }
    }
}

static void run_piece(const AttentionTask& task, const Piece& piece, float* scratch) {
    if (piece.g >= 0) {
        forward_lanes(task, piece, scratch);
    } else if (task.k.type == DType::e4m3) {
        forward_keys<e4m3>(task, piece, scratch);
    } else {
        LLAVA_FAST_BY_TYPE(task.k.type, forward_keys<T>(task, piece, scratch))
    }
}

// Floats of the largest piece and of `join`.
static int64_t forward_scratch(const AttentionTask& task) {
    const int64_t size = partial_size(task.d);
    int64_t floats = size;
    for (int64_t i = 0; i < task.piece_count; ++i) {
        const Piece& piece = task.pieces[i];
        const int64_t lanes = piece.g >= 0 ? piece.last - piece.first : task.sequences[piece.sequence].n_q * task.H;
        const int64_t blocks = piece.heads * ((lanes + kLanes - 1) / kLanes);
        floats = most(floats, piece.g >= 0 ? kTile * (2 * kStride + kLanes) + blocks * state_size(task.d)
                                           : lanes * (size + kChunk) + kWidth * kStride);
    }
    return floats;
}

}  // namespace ISA

void LLAVA_FAST_JOIN(attention_forward_, ISA)(const AttentionTask& task) {
    const Scratch scratch(task.threads, ISA::forward_scratch(task));
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < task.piece_count; ++i) ISA::run_piece(task, task.pieces[i], scratch.mine());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < task.few_count * task.G; ++i) ISA::join(task, i / task.G, i % task.G, scratch.mine());
    }
}

}  // namespace llava_fast
