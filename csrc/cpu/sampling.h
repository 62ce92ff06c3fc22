// The next token of each row of logits; kernels/sampling.py says what it is.
//
// Letters: S rows, V vocabulary. Tokens depend neither on the number of threads nor, but for the border of top-p's set, on the
// instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

struct SamplingTask {
    int64_t S, V, stride;  // stride: elements from row to row
    const float* logits;   // [S, V]
    // By row, [S]; all but the first three may be null.
    const float* temperature;
    const int64_t *seeds, *steps;
    const void *top_k, *top_p, *min_p;  // int64 or int32; float types
    bool top_k_int32;
    DType top_p_dtype, min_p_dtype;
    const float *repetition, *presence, *frequency;
    const int32_t* counts;  // [S, V] or null
    int64_t* tokens;        // [S]
    float* kept;            // [S, V] or null: the logits that are drawn from, -infinity for what the filters leave out; for tests
    int threads;
};

// One row's parameters, as sampling() reads them for the kernels. For an array that is null: what has no effect.
struct SamplingRow {
    float temperature;
    int64_t top_k;  // V: all
    float excess;   // 1 - top_p; 0: all
    float min_p;    // 0: all
    int64_t seed, step;
    float repetition, presence, frequency;
};

static inline bool filters(const SamplingRow& row, int64_t V) {
    return row.temperature > 0 && (row.top_k < V || row.excess > 0 || row.min_p > 0);
}

// The best of a range of a row's tokens.
struct Pick {
    float score;
    int64_t token;
};

// NaN is the largest score, and of equal ones the first is taken.
static inline bool beats(const Pick& a, const Pick& b) {
    const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
    return (a_nan || b_nan ? a_nan && !b_nan : a.score > b.score) || ((a.score == b.score || (a_nan && b_nan)) && a.token < b.token);
}

// picks [S, parts]: the best of each of `parts` ranges of a row; of a row that filters, all in the first.
void sampling_portable(const SamplingTask& task, const SamplingRow* rows, int64_t parts, Pick* picks);
void argmax_portable(const SamplingTask& task, int64_t parts, Pick* picks);
void sampling_avx2(const SamplingTask& task, const SamplingRow* rows, int64_t parts, Pick* picks);
void sampling_avx512(const SamplingTask& task, const SamplingRow* rows, int64_t parts, Pick* picks);
void argmax_avx2(const SamplingTask& task, int64_t parts, Pick* picks);
void argmax_avx512(const SamplingTask& task, int64_t parts, Pick* picks);

// Both throw std::invalid_argument for an empty vocabulary, sampling also for types it does not know.
void sampling(SamplingTask task);
void argmax(SamplingTask task);  // of the task's S, V, stride, logits, tokens and threads alone

}  // namespace llava_fast
