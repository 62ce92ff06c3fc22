// The loops of the linear op, compiled once per instruction set; the including file defines ISA to the set's name.
//
// Few rows: every weight is read once from memory and used for all rows, so memory's speed is the limit; dot products along I, no
// packing. Many rows: the arithmetic is the limit; see linear_gemm.h.
//
// Only static and templated functions inside the namespace of the instruction set, and nothing from the standard library:
// see half.h for the reason.
#pragma once

#include "cpu/act.h"
#include "cpu/linear.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

// W's rows as registers of floats. The element type of int4 is a byte of two numbers.
template <typename W>
static inline const W* place(const W* row, int64_t k) {
    return row + k;
}
static inline const nibbles* place(const nibbles* row, int64_t k) {
    return row + k / 2;
}

template <typename W>
struct Weight {
    const W* data;
    int64_t stride;  // elements of W between rows
    const float* scale;
    int64_t group, groups;

    explicit Weight(const LinearTask& task)
        : data(static_cast<const W*>(task.weight)),
          stride(place(data, task.I) - data),
          scale(task.scale),
          group(task.scale == nullptr ? task.I : task.group),
          groups(task.scale == nullptr ? 1 : (task.I + task.group - 1) / task.group) {}
    const W* row(int64_t o) const { return data + o * stride; }
};

// y[0 .. n) are the sums of row m, columns o ..; adds the bias, activates, adds the residual and stores.
template <typename T, Act act>
static inline void finish_as(const LinearTask& task, int64_t m, int64_t o, int64_t n, const float* y) {
    T* out = static_cast<T*>(task.out) + (task.rows == nullptr ? m : task.rows[m]) * task.out_stride + o;
    const T* residual = task.residual == nullptr ? nullptr : static_cast<const T*>(task.residual) + m * task.residual_stride + o;
    T* pre = task.pre == nullptr ? nullptr : static_cast<T*>(task.pre) + m * task.O + o;
    const auto one = [&](int64_t j, auto... count) {
        vec v = load(y + j, count...);
        if (task.bias != nullptr) v = v + load(task.bias + o + j, count...);
        if (pre != nullptr) store(pre + j, v, count...);
        v = activate<act>(v);
        if (residual != nullptr) v = v + load(residual + j, count...);
        store(out + j, v, count...);
    };
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) one(j);
    if (j < n) one(j, n - j);
}

template <typename T>
static inline void finish(const LinearTask& task, int64_t m, int64_t o, int64_t n, const float* y) {
    switch (task.act) {
        case Act::none:
            return finish_as<T, Act::none>(task, m, o, n, y);
        case Act::gelu:
            return finish_as<T, Act::gelu>(task, m, o, n, y);
        case Act::gelu_tanh:
            return finish_as<T, Act::gelu_tanh>(task, m, o, n, y);
        case Act::quick_gelu:
            return finish_as<T, Act::quick_gelu>(task, m, o, n, y);
        case Act::silu:
            return finish_as<T, Act::silu>(task, m, o, n, y);
    }
}

}  // namespace ISA
}  // namespace llava_fast

#include "cpu/linear_gemm.h"
#include "cpu/linear_gemv.h"

namespace llava_fast {
namespace ISA {

template <typename T, typename W>
static void run(const LinearTask& task) {
    if (task.M <= kFewRows) {
        few_rows<T, W>(task);
    } else {
        many_rows<T, W>(task);
    }
}

template <typename T>
static void run_as(const LinearTask& task) {
    switch (task.weight_type) {
        case WeightType::f32:
            return run<T, float>(task);
        case WeightType::bf16:
            return run<T, bf16>(task);
        case WeightType::f16:
            return run<T, f16>(task);
        case WeightType::int8:
            return run<T, int8_t>(task);
        case WeightType::int4:
            return run<T, nibbles>(task);
    }
}

}  // namespace ISA

void LLAVA_FAST_JOIN(linear_, ISA)(const LinearTask& task) {
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
