// Rotary embedding by rows, into new rows or into a cache; the including file defines ISA.
#pragma once

#include "cpu/rowwise.h"
#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kMostHeadDim = 512;

static void widen_row(DType dtype, const void* x, int64_t offset, float* out, int64_t n, float sign) {
    each(n, [&](int64_t i, int64_t m) {
        const int64_t at = offset + i;
        const vec value = dtype == DType::f32    ? load_some(static_cast<const float*>(x) + at, m)
                          : dtype == DType::bf16 ? load_some(static_cast<const bf16*>(x) + at, m)
                                                 : load_some(static_cast<const f16*>(x) + at, m);
        store_some(out + i, value * splat(sign), m);
    });
}

template <typename T, typename Out>
static inline void rotate(const T* x, const float* cos, const float* sin, Out* out, int64_t half) {
    each(half, [&](int64_t i, int64_t n) {
        const vec a = load_some(x + i, n), b = load_some(x + half + i, n), c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(out + i, a * c - b * s, n);
        store_some(out + half + i, fma(b, c, a * s), n);
    });
}

// What the next row will read: see load_ahead in rows.h.
template <typename T>
static inline void fetch(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i);
}

template <typename T>
static void rotate_heads(const RopeRows& rows, int64_t t, const float* cos, const float* sin, void* out, int64_t d) {
    const T* x = static_cast<const T*>(rows.x) + t * rows.row_stride;
    T* to = static_cast<T*>(out) + t * rows.heads * d;
    for (int64_t h = 0; h < rows.heads; ++h) {
        fetch(x + h * rows.head_stride + rows.row_stride, d);
        rotate(x + h * rows.head_stride, cos, sin, to + h * d, d / 2);
    }
}

template <typename T>
static void put(const float* values, T* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) narrow(values[i], out + i);
}

static void put_scaled(float* values, const float* scale, DType dtype, void* out, int64_t offset, int64_t n) {
    if (scale) {
        for (int64_t i = 0; i < n; ++i) values[i] /= *scale;
    }
    switch (dtype) {
        case DType::f32:
            return put(values, static_cast<float*>(out) + offset, n);
        case DType::bf16:
            return put(values, static_cast<bf16*>(out) + offset, n);
        case DType::f16:
            return put(values, static_cast<f16*>(out) + offset, n);
        case DType::e4m3:
            return put(values, static_cast<e4m3*>(out) + offset, n);
        case DType::f64:
            return;
    }
}

template <typename T>
static void write_cache(const RopeTask& task, int64_t t, const float* cos, const float* sin) {
    const int64_t d = task.d, slot = task.slots[t];
    if (slot < 0) return;
    const T *k = static_cast<const T*>(task.k.x) + t * task.k.row_stride, *v = static_cast<const T*>(task.v.x) + t * task.v.row_stride;
    float values[kMostHeadDim];
    for (int64_t g = 0; g < task.k.heads; ++g) {
        const int64_t to = (slot * task.k.heads + g) * d;
        fetch(k + g * task.k.head_stride + task.k.row_stride, d);
        fetch(v + g * task.v.head_stride + task.v.row_stride, d);
        rotate(k + g * task.k.head_stride, cos, sin, values, d / 2);
        put_scaled(values, task.k_scale ? task.k_scale + g : nullptr, task.cache_dtype, task.k_out, to, d);
        each(d, [&](int64_t i, int64_t n) { store_some(values + i, load_some(v + g * task.v.head_stride + i, n), n); });
        put_scaled(values, task.v_scale ? task.v_scale + g : nullptr, task.cache_dtype, task.v_out, to, d);
    }
}

template <typename T>
static void rope(const RopeTask& task) {
    const int64_t d = task.d, half = d / 2;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t t = 0; t < task.T; ++t) {
        float cos[kMostHeadDim / 2], sin[kMostHeadDim / 2];
        widen_row(task.table_dtype, task.cos, t * half, cos, half, 1.0f);
        widen_row(task.table_dtype, task.sin, t * half, sin, half, task.inverse ? -1.0f : 1.0f);
        rotate_heads<T>(task.q, t, cos, sin, task.q_out, d);
        if (task.v_out) {
            write_cache<T>(task, t, cos, sin);
        } else if (task.k.heads > 0) {
            rotate_heads<T>(task.k, t, cos, sin, task.k_out, d);
        }
    }
}

}  // namespace ISA
}  // namespace llava_fast
