// Rotary embedding by rows, into new rows or into a cache; the including file defines ISA.
#pragma once

#include "cpu/rows.h"
#include "cpu/rowwise.h"

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

// write(x, out) for each head of row t, past the caches where `stream` asks for it.
template <typename T, typename F>
static inline __attribute__((always_inline)) void write_heads(const RopeRows& rows, int64_t t, T* out, int64_t d, bool stream,
                                                              const F& write) {
    const T* x = static_cast<const T*>(rows.x) + t * rows.row_stride;
    alignas(64) T block[2 * kMostHeadDim];
    const int64_t most = 2 * kMostHeadDim / d;  // heads in the block
    for (int64_t first = 0; first < rows.heads; first += most) {
        const int64_t count = rows.heads - first < most ? rows.heads - first : most;
        T* to = stream ? block : out + first * d;
        for (int64_t h = 0; h < count; ++h) {
            const T* head = x + (first + h) * rows.head_stride;
            fetch(head + rows.row_stride, d);
            write(head, to + h * d);
        }
        if (stream) stream_copy(out + first * d, block, count * d);
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

// Into a cache of another type, or with scales.
template <typename T>
static void convert_to_cache(const RopeTask& task, int64_t t, int64_t slot, const float* cos, const float* sin) {
    const int64_t d = task.d;
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
    const bool same = task.cache_dtype == task.dtype && !task.k_scale && !task.v_scale;
#pragma omp parallel num_threads(task.threads) if (task.threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < task.T; ++t) {
            float cos[kMostHeadDim / 2], sin[kMostHeadDim / 2];
            widen_row(task.table_dtype, task.cos, t * half, cos, half, 1.0f);
            widen_row(task.table_dtype, task.sin, t * half, sin, half, task.inverse ? -1.0f : 1.0f);
            const auto rotated = [&](const T* x, T* out) { rotate(x, cos, sin, out, half); };
            const auto copied = [&](const T* x, T* out) { std::memcpy(out, x, static_cast<size_t>(d) * sizeof(T)); };
            write_heads(task.q, t, static_cast<T*>(task.q_out) + t * task.q.heads * d, d, task.stream, rotated);
            const int64_t row = task.v_out ? task.slots[t] : t;
            if (row < 0 || task.k.heads == 0) continue;
            if (task.v_out && !same) {
                convert_to_cache<T>(task, t, row, cos, sin);
                continue;
            }
            write_heads(task.k, t, static_cast<T*>(task.k_out) + row * task.k.heads * d, d, task.stream, rotated);
            if (task.v_out) write_heads(task.v, t, static_cast<T*>(task.v_out) + row * task.k.heads * d, d, task.stream, copied);
        }
        if (task.stream) fence();
    }
}

}  // namespace ISA
}  // namespace llava_fast
