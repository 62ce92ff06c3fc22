// y = act(x W^T + b) + residual with W stored narrow and widened in registers; see kernels/linear.py for the formula.
//
// Letters: M rows of x, I inputs, O outputs. Accumulation is fp32. Results do not depend on threads. A row's depends on the
// instruction set and on whether there are few rows or many, which take other paths: each path's sums have an order of their own.
// With `invariant`, few rows take the path of many.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

enum class WeightType : int { f32, bf16, f16, int8, int4 };
enum class Act : int { none, gelu, gelu_tanh, quick_gelu, silu };

struct LinearTask {
    DType dtype;  // of x, residual, out and pre: f32, bf16 or f16
    WeightType weight_type;
    Act act;
    int64_t M, I, O;
    const void* x;  // [M, I], rows x_stride elements apart
    int64_t x_stride;
    const void* weight;    // [O, I]; int4: [O, I / 2] bytes, the low four bits first, 8 added to each number
    const float* scale;    // [O, ceil(I / group)] for int8 and int4
    int64_t group;         // a multiple of 32, or I
    const float* bias;     // [O] or null
    const void* residual;  // [M, O] or null
    int64_t residual_stride;
    void* out;  // row m goes to row rows[m], or m where rows is null
    int64_t out_stride;
    const int64_t* rows;
    void* pre;  // null, or contiguous [M, O]: the values before act
    int threads;
    bool invariant;
};

void linear_portable(const LinearTask& task);
void linear_avx2(const LinearTask& task);
void linear_avx512(const LinearTask& task);
void linear_amx(const LinearTask& task);

// The whole op. bias_type: of task.bias, given as `bias`. out_rows: rows of out. Throws std::invalid_argument for an entry of rows
// outside [0, out_rows) or there twice, a group below 1 and a bias in e4m3.
void linear(LinearTask task, const void* bias, DType bias_type, int64_t out_rows);

}  // namespace llava_fast
