// Rows of logits to losses and, in place, to their gradients; see kernels/linear_cross_entropy.py for the formula.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

struct CrossEntropyTask {
    DType dtype;  // f32, bf16 or f16
    int64_t rows, vocab;
    void* logits;           // [rows, vocab]
    const int64_t* labels;  // [rows]
    float* loss;            // [rows] written, or null: lse is an input
    float* lse;             // [rows]
    const float* grad;      // [rows] incoming gradient of each loss, or null: `scale` for all of them
    float scale;
    float smoothing, z_loss;
    bool gradients;  // the logits become their gradients
    int threads;
};

void cross_entropy_portable(const CrossEntropyTask& task);
void cross_entropy_avx2(const CrossEntropyTask& task);
void cross_entropy_avx512(const CrossEntropyTask& task);

// Throws std::invalid_argument for another dtype and for a label outside [0, vocab).
void cross_entropy(const CrossEntropyTask& task);

}  // namespace llava_fast
