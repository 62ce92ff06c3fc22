// The loops of spatial pooling, compiled once per instruction set; the including file defines ISA to the set's name.
//
// The op moves bytes and hardly computes, so plain loops over the width that the compiler vectorises reach the memory's speed
// and intrinsics would add nothing. Backward is a gather too: a table row sums what its readers' outputs hand back, in a
// fixed order, so the result depends neither on threads nor on the instruction set and no accumulator is kept in memory.
//
// Only static and templated functions inside the namespace of the instruction set, and nothing from the standard library:
// see half.h for the reason.
#pragma once

#include "cpu/spatial_pool.h"
#include "half.h"

#define LLAVA_FAST_JOIN_(a, b) a##b
#define LLAVA_FAST_JOIN(a, b) LLAVA_FAST_JOIN_(a, b)

namespace llava_fast {
namespace ISA {

constexpr int64_t kBlock = 256;  // columns a pass: the accumulators stay in L1, rows are read 512 bytes or more at a time

template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

template <typename T, typename A>
static inline void add_scaled(A* __restrict acc, const T* __restrict row, A weight, int64_t n) {
    for (int64_t d = 0; d < n; ++d) acc[d] += weight * widen(row[d]);
}

template <typename T, typename A>
static inline void store_divided(T* __restrict out, const A* __restrict acc, A divisor, int64_t n) {
    for (int64_t d = 0; d < n; ++d) narrow(acc[d] / divisor, &out[d]);
}

// A later value wins where it is greater or NaN, as in torch's max pooling.
template <typename T, typename A>
static inline void keep_greater(A* __restrict best, const T* __restrict row, int64_t n) {
    for (int64_t d = 0; d < n; ++d) {
        A value = widen(row[d]);
        best[d] = (value > best[d]) | (value != value) ? value : best[d];
    }
}

template <typename T, typename A>
static inline void keep_greater_tap(A* __restrict best, int32_t* __restrict arg, const T* __restrict row, int32_t tap, int64_t n) {
    for (int64_t d = 0; d < n; ++d) {
        A value = widen(row[d]);
        bool wins = (value > best[d]) | (value != value);
        best[d] = wins ? value : best[d];
        arg[d] = wins ? tap : arg[d];
    }
}

template <typename T, typename A>
static inline void add_chosen(A* __restrict acc, const T* __restrict grad, const int32_t* __restrict arg, int32_t tap, int64_t n) {
    for (int64_t d = 0; d < n; ++d) acc[d] += arg[d] == tap ? widen(grad[d]) : A(0);
}

template <typename T>
static void forward(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    const T* table = static_cast<const T*>(task.table);
    T* out = static_cast<T*>(task.out);
    const A divisor = static_cast<A>(task.divisor);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t r = 0; r < s.K * s.out_H * s.out_W; ++r) {
        const int64_t k = r / (s.out_H * s.out_W), oy = r / s.out_W % s.out_H, ox = r % s.out_W;
        const int64_t* cells = task.source + k * s.H * s.W;
        A acc[kBlock];
        for (int64_t d = 0; d < s.D; d += kBlock) {
            const int64_t n = s.D - d < kBlock ? s.D - d : kBlock;
            for (int64_t i = 0; i < n; ++i) acc[i] = 0;
            for (int64_t j = 0; j < task.y.taps * task.x.taps; ++j) {
                const int64_t ty = oy * task.y.taps + j / task.x.taps, tx = ox * task.x.taps + j % task.x.taps;
                const T* row = table + cells[task.y.index[ty] * s.W + task.x.index[tx]] * s.D + d;
                if (task.mode != PoolMode::max) {
                    add_scaled(acc, row, static_cast<A>(task.y.weight[ty]) * static_cast<A>(task.x.weight[tx]), n);
                } else if (j == 0) {
                    for (int64_t i = 0; i < n; ++i) acc[i] = widen(row[i]);
                } else {
                    keep_greater(acc, row, n);
                }
            }
            store_divided(out + r * s.D + d, acc, divisor, n);
        }
    }
}

// task.argmax[r, d] = the tap that gave output row r its maximum.
template <typename T>
static void find_argmax(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    const T* table = static_cast<const T*>(task.table);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t r = 0; r < s.K * s.out_H * s.out_W; ++r) {
        const int64_t k = r / (s.out_H * s.out_W), oy = r / s.out_W % s.out_H, ox = r % s.out_W;
        const int64_t* cells = task.source + k * s.H * s.W;
        A best[kBlock];
        for (int64_t d = 0; d < s.D; d += kBlock) {
            const int64_t n = s.D - d < kBlock ? s.D - d : kBlock;
            int32_t* arg = task.argmax + r * s.D + d;
            for (int64_t j = 0; j < task.y.taps * task.x.taps; ++j) {
                const int64_t ty = oy * task.y.taps + j / task.x.taps, tx = ox * task.x.taps + j % task.x.taps;
                const T* row = table + cells[task.y.index[ty] * s.W + task.x.index[tx]] * s.D + d;
                if (j == 0) {
                    for (int64_t i = 0; i < n; ++i) {
                        best[i] = widen(row[i]);
                        arg[i] = 0;
                    }
                } else {
                    keep_greater_tap(best, arg, row, static_cast<int32_t>(j), n);
                }
            }
        }
    }
}

// Adds to acc what the outputs that read `cell` hand back to it, columns d to d + n.
template <typename T, typename A>
static inline void add_readers(const PoolTask& task, A* acc, int64_t cell, int64_t d, int64_t n) {
    const PoolShape s = task.shape;
    const int64_t k = cell / (s.H * s.W), y = cell / s.W % s.H, x = cell % s.W;
    for (int64_t i = task.y.inverse_start[y]; i < task.y.inverse_start[y + 1]; ++i) {
        for (int64_t j = task.x.inverse_start[x]; j < task.x.inverse_start[x + 1]; ++j) {
            const int64_t r = (k * s.out_H + task.y.inverse_output[i]) * s.out_W + task.x.inverse_output[j];
            const T* grad = static_cast<const T*>(task.grad) + r * s.D + d;
            if (task.mode == PoolMode::max) {
                const int64_t tap = task.y.inverse_tap[i] * task.x.taps + task.x.inverse_tap[j];
                add_chosen(acc, grad, task.argmax + r * s.D + d, static_cast<int32_t>(tap), n);
            } else {
                add_scaled(acc, grad, static_cast<A>(task.y.inverse_weight[i]) * static_cast<A>(task.x.inverse_weight[j]), n);
            }
        }
    }
}

template <typename T>
static void backward(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    T* grad_table = static_cast<T*>(task.grad_table);
    const A divisor = static_cast<A>(task.divisor);
    if (task.mode == PoolMode::max) find_argmax<T>(task);
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t m = 0; m < s.M; ++m) {
        A acc[kBlock];
        for (int64_t d = 0; d < s.D; d += kBlock) {
            const int64_t n = s.D - d < kBlock ? s.D - d : kBlock;
            for (int64_t i = 0; i < n; ++i) acc[i] = 0;
            for (int64_t e = task.reader_start[m]; e < task.reader_start[m + 1]; ++e) add_readers<T>(task, acc, task.reader_cell[e], d, n);
            store_divided(grad_table + m * s.D + d, acc, divisor, n);
        }
    }
}

}  // namespace ISA

void LLAVA_FAST_JOIN(spatial_pool_forward_, ISA)(const PoolTask& task) {
    switch (task.dtype) {
        case DType::f32:
            return ISA::forward<float>(task);
        case DType::f64:
            return ISA::forward<double>(task);
        case DType::bf16:
            return ISA::forward<bf16>(task);
        case DType::f16:
            return ISA::forward<f16>(task);
        case DType::e4m3:  // Python takes the four above
            return;
    }
}

void LLAVA_FAST_JOIN(spatial_pool_backward_, ISA)(const PoolTask& task) {
    switch (task.dtype) {
        case DType::f32:
            return ISA::backward<float>(task);
        case DType::f64:
            return ISA::backward<double>(task);
        case DType::bf16:
            return ISA::backward<bf16>(task);
        case DType::f16:
            return ISA::backward<f16>(task);
        case DType::e4m3:  // Python takes the four above
            return;
    }
}

}  // namespace llava_fast
