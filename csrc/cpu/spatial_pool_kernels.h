// The loops of spatial pooling, compiled once per instruction set; the including file defines ISA to the set's name.
//
// The op moves bytes. A row is read from its start to its end (two of bf16 at once would share a page, and the processor prefetches one
// stream a page) and written once, around the caches where it will not be read soon. Backward is a gather too: a table row sums what its
// readers' outputs hand back, in a fixed order, so the result depends neither on threads nor on the instruction set (hence no fused
// multiply-adds).
#pragma once

#include "cpu/rows.h"
#include "cpu/spatial_pool.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kColumns = 2048;  // of a row at a time: sums stay in L1

// kPair numbers in fp64, for tables in fp64; not made to be fast.
struct doubles {
    double x[kPair];
};
static inline doubles operator+(doubles a, doubles b) {
    for (int64_t i = 0; i < kPair; ++i) a.x[i] += b.x[i];
    return a;
}
static inline doubles operator*(doubles a, doubles b) {
    for (int64_t i = 0; i < kPair; ++i) a.x[i] *= b.x[i];
    return a;
}
static inline doubles operator/(doubles a, doubles b) {
    for (int64_t i = 0; i < kPair; ++i) a.x[i] /= b.x[i];
    return a;
}
static inline pair operator/(pair x, pair y) {
    return {x.a / y.a, x.b / y.b};
}
static inline doubles load_pair(const double* p, int64_t n = kPair) {
    doubles a = {};
    for (int64_t i = 0; i < n; ++i) a.x[i] = p[i];
    return a;
}
static inline doubles load_ahead(const double* p, int64_t n) {
    return load_pair(p, n);
}
static inline void store_pair(double* p, doubles a, int64_t n = kPair) {
    for (int64_t i = 0; i < n; ++i) p[i] = a.x[i];
}
static inline pair splat_pair(double x, float) {
    return splat_pair(static_cast<float>(x));
}
static inline doubles splat_pair(double x, double) {
    doubles a;
    for (double& value : a.x) value = x;
    return a;
}

// a where `value` takes the maximum from `best`, which came before it: where it is greater or NaN, as in torch's max pooling; else b.
static inline vec choose(vec value, vec best, vec a, vec b) {
    return (value > best) | (value != value) ? a : b;
}
static inline pair choose(pair value, pair best, pair a, pair b) {
    return {choose(value.a, best.a, a.a, b.a), choose(value.b, best.b, a.b, b.b)};
}
static inline doubles choose(doubles value, doubles best, doubles a, doubles b) {
    for (int64_t i = 0; i < kPair; ++i) a.x[i] = (value.x[i] > best.x[i]) | (value.x[i] != value.x[i]) ? a.x[i] : b.x[i];
    return a;
}

// x where a is b, else 0.
static inline pair where_equal(pair a, pair b, pair x) {
    const vec zero = splat(0.0f);
    return {a.a == b.a ? x.a : zero, a.b == b.b ? x.b : zero};
}
static inline doubles where_equal(doubles a, doubles b, doubles x) {
    for (int64_t i = 0; i < kPair; ++i) x.x[i] = a.x[i] == b.x[i] ? x.x[i] : 0.0;
    return x;
}

template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

// acc[i] = f(acc[i], row[i]) for n columns, by pairs: `acc` has room for whole ones, in the order of pairs of T.
template <typename T, typename A, typename F>
static inline __attribute__((always_inline)) void update(A* acc, const T* row, int64_t n, const F& f) {
    each_pair(n, [&](int64_t i, int64_t m) { store_pair(acc + i, f(load_pair(acc + i), load_ahead(row + i, m))); });
}

// out[d] = acc[d] / divisor, where fill(acc, d, n) makes the sums of columns d to d + n from `start`.
template <typename T, typename F>
static inline __attribute__((always_inline)) void write_sums(const PoolTask& task, T* out, double start, const F& fill) {
    using A = typename Accumulator<T>::type;
    alignas(64) A acc[kColumns];
    const auto first = splat_pair(start, A()), divisor = splat_pair(task.divisor, A()), factor = splat_pair(1.0 / task.divisor, A());
    const int64_t whole = static_cast<int64_t>(task.divisor);
    const bool exact = (whole & (whole - 1)) == 0;  // a power of two; a division takes 16 cycles a register
    for (int64_t d = 0; d < task.shape.D; d += kColumns) {
        const int64_t n = task.shape.D - d < kColumns ? task.shape.D - d : kColumns;
        for (int64_t i = 0; i < n; i += kPair) store_pair(acc + i, first);
        fill(acc, d, n);
        write_row(out + d, n, task.stream, [&](int64_t i, int64_t) {
            const auto total = load_pair(acc + i);
            return exact ? total * factor : total / divisor;
        });
    }
}

template <typename T>
static void forward(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    const T* table = static_cast<const T*>(task.table);
    const bool max = task.mode == PoolMode::max;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < s.K * s.out_H * s.out_W; ++r) {
            const int64_t k = r / (s.out_H * s.out_W), oy = r / s.out_W % s.out_H, ox = r % s.out_W;
            const int64_t* cells = task.source + k * s.H * s.W;
            write_sums(task, static_cast<T*>(task.out) + r * s.D, max ? -static_cast<double>(__builtin_inff()) : 0.0,
                       [&](A* acc, int64_t d, int64_t n) {
                           for (int64_t j = 0; j < task.y.taps * task.x.taps; ++j) {
                               const int64_t ty = oy * task.y.taps + j / task.x.taps, tx = ox * task.x.taps + j % task.x.taps;
                               const T* row = table + cells[task.y.index[ty] * s.W + task.x.index[tx]] * s.D + d;
                               if (max) {
                                   update(acc, row, n, [](auto best, auto value) { return choose(value, best, value, best); });
                               } else {
                                   const auto weight =
                                       splat_pair(static_cast<A>(task.y.weight[ty]) * static_cast<A>(task.x.weight[tx]), A());
                                   update(acc, row, n, [&](auto sum, auto value) { return sum + weight * value; });
                               }
                           }
                       });
        }
        if (task.stream) fence();  // not after each row, where the next one would wait for it
    }
}

// task.winner[r, d] = the tap that gave output row r its maximum, as a number of the accumulators' type, in the order of pairs of T.
template <typename T>
static void find_winners(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    const T* table = static_cast<const T*>(task.table);
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < s.K * s.out_H * s.out_W; ++r) {
            const int64_t k = r / (s.out_H * s.out_W), oy = r / s.out_W % s.out_H, ox = r % s.out_W;
            const int64_t* cells = task.source + k * s.H * s.W;
            alignas(64) A best[kColumns], tap[kColumns];
            for (int64_t d = 0; d < s.D; d += kColumns) {
                const int64_t n = s.D - d < kColumns ? s.D - d : kColumns;
                for (int64_t j = 0; j < task.y.taps * task.x.taps; ++j) {
                    const int64_t y = oy * task.y.taps + j / task.x.taps, x = ox * task.x.taps + j % task.x.taps;
                    const T* row = table + cells[y * s.W + x] * s.D + d;
                    const auto number = splat_pair(static_cast<double>(j), A());
                    each_pair(n, [&](int64_t i, int64_t m) {
                        const auto value = load_ahead(row + i, m), old = j == 0 ? value : load_pair(best + i);
                        store_pair(tap + i, j == 0 ? number : choose(value, old, number, load_pair(tap + i)));
                        store_pair(best + i, choose(value, old, value, old));
                    });
                }
                write_row(static_cast<A*>(task.winner) + r * padded(s.D) + d, padded(n), task.stream,
                          [&](int64_t i, int64_t) { return load_pair(tap + i); });
            }
        }
        if (task.stream) fence();
    }
}

template <typename T>
static void backward(const PoolTask& task) {
    using A = typename Accumulator<T>::type;
    const PoolShape s = task.shape;
    if (task.mode == PoolMode::max) find_winners<T>(task);
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t m = 0; m < s.M; ++m) {
            write_sums(task, static_cast<T*>(task.grad_table) + m * s.D, 0.0, [&](A* acc, int64_t d, int64_t n) {
                for (int64_t e = task.reader_start[m]; e < task.reader_start[m + 1]; ++e) {
                    const PoolReader cell = task.readers[e];
                    for (int64_t i = task.y.inverse_start[cell.y]; i < task.y.inverse_start[cell.y + 1]; ++i) {
                        for (int64_t j = task.x.inverse_start[cell.x]; j < task.x.inverse_start[cell.x + 1]; ++j) {
                            const int64_t r = (cell.k * s.out_H + task.y.inverse_output[i]) * s.out_W + task.x.inverse_output[j];
                            const T* grad = static_cast<const T*>(task.grad) + r * s.D + d;
                            if (task.mode == PoolMode::max) {
                                const A* winner = static_cast<const A*>(task.winner) + r * padded(s.D) + d;
                                const auto tap =
                                    splat_pair(static_cast<double>(cell.y % task.y.taps * task.x.taps + cell.x % task.x.taps), A());
                                each_pair(n, [&](int64_t p, int64_t count) {
                                    const auto value = where_equal(load_pair(winner + p), tap, load_ahead(grad + p, count));
                                    store_pair(acc + p, load_pair(acc + p) + value);
                                });
                            } else {
                                const auto weight =
                                    splat_pair(static_cast<A>(task.y.inverse_weight[i]) * static_cast<A>(task.x.inverse_weight[j]), A());
                                update(acc, grad, n, [&](auto sum, auto value) { return sum + weight * value; });
                            }
                        }
                    }
                }
            });
        }
        if (task.stream) fence();  // not after each row, where the next one would wait for it
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
