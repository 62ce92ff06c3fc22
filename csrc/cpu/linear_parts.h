// What every path of the linear op shares: W's rows, and what is done to finished sums. The including file defines ISA.
//
// Only static and templated functions inside the namespace of the instruction set, and nothing from the standard library:
// see half.h for the reason.
#pragma once

#include "cpu/act.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"
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

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// How many ways to split M: the most loaded thread decides. Packing a panel of W costs as much as `for_columns` products of two panels,
// packing a panel of x as much as `for_rows`.
static inline int64_t splits_of_rows(int64_t row_panels, int64_t column_panels, int64_t threads, int64_t for_columns, int64_t for_rows) {
    int64_t best = 1, best_cost = 0;
    for (int64_t splits = 1; splits <= threads; ++splits) {
        if (threads % splits) continue;
        const int64_t rows = ceil_div(row_panels, splits), columns = ceil_div(column_panels, threads / splits);
        const int64_t cost = rows * columns + for_columns * columns + for_rows * rows;
        if (splits == 1 || cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
    }
    return best;
}

}  // namespace ISA
}  // namespace llava_fast
