// The products of a linear op's backward pass, at fp32's accuracy: out (+)= A B.
//
//     gradient of x    A = dy [M, O], as it lies;   B = W [O, I]
//     gradient of W    A = dy transposed;           B = x [M, I]
//
// Letters: M rows and N columns of out, K of the sum. Results do not depend on threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

struct ProductTask {
    int64_t M, N, K;
    const float* a;  // [M, K], or [K, M] where a_transposed; rows a_stride elements apart
    int64_t a_stride;
    bool a_transposed;
    DType b_type;   // f32 or bf16
    const void* b;  // [K, N]
    int64_t b_stride;
    float* out;  // [M, N]
    int64_t out_stride;
    bool add;  // to what `out` holds
    int threads;
};

void product_amx(const ProductTask& task);

// For AMX alone: other instruction sets multiply no faster than a BLAS does. Throws std::invalid_argument where it is not in use, and for
// another b_type.
void product(const ProductTask& task);

}  // namespace llava_fast
