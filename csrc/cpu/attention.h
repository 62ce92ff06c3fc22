// Attention of packed rows against contiguous or paged keys; see kernels/varlen_attention.py for the formula.
//
// Letters: T query rows, K key rows, S sequences, H heads, G key-value heads, R = H / G, d head dim. A lane is one query row of one
// head: sequence s has n_q * R lanes for each key-value head. The keys of a sequence are numbered from 0: its prefix, then its own;
// lane i sees those below its limit.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kChunk = 64;      // keys a thread takes at a time where there are few lanes
constexpr int64_t kFewLanes = 8;    // up to here keys are read row by row and not in tiles
constexpr int64_t kMaxLanes = 480;  // of a piece, over its heads: 10 blocks with AVX-512, 20 with AVX2

// A [rows, heads, d] array; strides in elements, the last dimension is contiguous.
struct Rows {
    void* data;
    DType type;
    int64_t row, head;
    int64_t page = 0;  // of a cache in blocks: from one to the next
};

struct Sequence {
    int64_t q_start, n_q;    // its query rows
    int64_t prefix, shared;  // the first row of its prefix, and how many
    int64_t start, own;      // its own key rows; with a block table only `own` is used
    const int32_t* table;    // its row of the block table, or null
};

// Static, as is partial_size: files of several instruction sets include this, and the linker may keep any of their inline functions.
static inline int64_t keys_of(const Sequence& s) {
    return s.shared + s.own;
}

// A piece of work of the forward pass: lanes [first, last) of key-value heads [g, g + heads), or, where g < 0, keys [first, last) for all
// heads.
struct Piece {
    int64_t sequence, g, heads, first, last;
    int64_t partial;  // where g < 0: its place in the list of partial results
    double cost;
};

struct AttentionTask {
    int64_t T, K, S, H, G, d;
    bool causal;
    float scale;
    Rows q, k, v, out;
    float* lse;                      // [T, H] or null
    const int64_t* q_index;          // [T] or null
    int64_t block;                   // rows of a block of the cache
    const float *k_scale, *v_scale;  // [G] or null
    int threads;
    bool invariant;  // few lanes are treated as many are: a row's sums keep their order
    // filled in by attention.cpp
    const Sequence* sequences;
    const Piece* pieces;
    int64_t piece_count;
    const int64_t* few;          // sequences of few lanes, and where their partial results begin; both null without any
    const int64_t* few_partial;  // [few_count + 1]
    int64_t few_count;
    float* partial;
    // backward
    Rows grad_out, grad_q, grad_k, grad_v;
    // Families: sequences that share key rows, ascending; one that shares none is alone.
    const int64_t* family;            // [S] their members
    const int64_t* family_start;      // [family_count + 1]
    const int64_t* family_row;        // the key rows of each, ascending
    const int64_t* family_row_start;  // [family_count + 1]
    const int64_t* row_place;         // [K] the place of a row among its family's, or -1
    const int64_t* family_order;      // [family_count] the most work first
    int64_t family_count;
};

struct AttentionIndex {
    const int32_t *cu_q, *cu_k, *used, *prefix;  // cu_k null where there is a block table; used is then the lengths
    const int32_t* block_table;                  // [S, blocks] or null
    int64_t blocks, cache_blocks;
};

// Floats of a partial result: d rounded up to whole registers, and a cache line that ends with the largest score and the sum.
static inline int64_t partial_size(int64_t d) {
    return (d + 15) / 16 * 16 + 16;
}

void attention_forward_portable(const AttentionTask& task);
void attention_backward_portable(const AttentionTask& task);
void attention_forward_avx2(const AttentionTask& task);
void attention_backward_avx2(const AttentionTask& task);
void attention_forward_avx512(const AttentionTask& task);
void attention_backward_avx512(const AttentionTask& task);

// Both throw std::invalid_argument for lengths, ranges or blocks that do not fit.
void attention_forward(AttentionTask task, const AttentionIndex& index);
void attention_backward(AttentionTask task, const AttentionIndex& index);

}  // namespace llava_fast
