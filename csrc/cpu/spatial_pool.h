// Spatial pooling of maps whose rows are gathered from a table; see kernels/spatial_pool.py for the formula.
//
// Letters: M table rows, D width, K maps of H x W cells, resized to out_H x out_W.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

enum class PoolMode : int { average, max, bilinear };

struct PoolShape {
    int64_t M, D, K, H, W, out_H, out_W;
};

// One axis as a sparse matrix with `taps` entries an output, by output and, for the backward pass, by input.
struct PoolAxis {
    int64_t taps;
    const int64_t* index;           // [outputs * taps] input cell
    const double* weight;           // [outputs * taps]
    const int64_t* inverse_start;   // [inputs + 1]
    const int64_t* inverse_output;  // output that reads the input
    const double* inverse_weight;
};

// Columns of a row of whole registers.
static inline int64_t padded(int64_t D) {
    return (D + 31) / 32 * 32;
}

struct PoolReader {
    int64_t k, y, x;
};

struct PoolTask {
    DType dtype;
    PoolMode mode;
    PoolShape shape;
    PoolAxis y, x;
    double divisor;         // cells of a window for the average, else 1
    const int64_t* source;  // [K, H, W] table row of each cell
    const void* table;      // [M, D]
    void* out;              // forward: [K * out_H * out_W, D]
    // backward
    const void* grad;             // [K * out_H * out_W, D]
    void* grad_table;             // [M, D]
    const int64_t* reader_start;  // [M + 1] cells that read each table row: a stable counting sort of source
    const PoolReader* readers;    // [K * H * W]
    void* winner;                 // max: scratch [K * out_H * out_W, padded(D)], fp32 or, for fp64, fp64
    bool stream;                  // write around the caches
    int threads;
};

void spatial_pool_forward_portable(const PoolTask& task);
void spatial_pool_backward_portable(const PoolTask& task);
void spatial_pool_forward_avx2(const PoolTask& task);
void spatial_pool_backward_avx2(const PoolTask& task);
void spatial_pool_forward_avx512(const PoolTask& task);
void spatial_pool_backward_avx512(const PoolTask& task);

// Pointers to contiguous arrays; throw std::invalid_argument for a source entry outside [0, M).
void spatial_pool_forward(DType dtype, PoolMode mode, const PoolShape& shape, const void* table, const int64_t* source, void* out,
                          int threads);
// table is read for PoolMode::max alone and may be null otherwise.
void spatial_pool_backward(DType dtype, PoolMode mode, const PoolShape& shape, const void* grad, const void* table, const int64_t* source,
                           void* grad_table, int threads);

}  // namespace llava_fast
