// What:  the plain version of spatial pooling, one thread an output value; the correct one that faster ones are held against.
// How:   block.x walks the width (neighbouring threads read neighbouring columns of one table row), grid.x the output rows.
//        Backward adds with atomics, since bilinear windows overlap and sources may repeat: in fp32 and in no fixed order.
// Build: nvcc -std=c++17 -O3 -Icsrc -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a
//        -gencode arch=compute_90,code=compute_90 -cubin|-c csrc/cuda/spatial_pool.cu   (setup.py does it)
// Run:   LLAVA_FAST_KERNELS=spatial_pool=cuda; never the default, as it has not been measured on a device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <stdexcept>
#include <string>

#include "cuda/spatial_pool.h"

namespace llava_fast {

namespace {

template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

// One axis of one output: `taps` input cells that start at `first`, or two clamped neighbours with weights.
struct Window {
    int64_t taps, first, last;
    double high_weight;

    __device__ int64_t cell(int64_t tap) const { return first + tap < last ? first + tap : last; }
    __device__ double weight(PoolMode mode, int64_t tap) const {
        return mode != PoolMode::bilinear ? 1.0 : (tap == 0 ? 1.0 - high_weight : high_weight);
    }
};

__device__ Window window(PoolMode mode, int64_t inputs, int64_t outputs, int64_t o) {
    if (mode != PoolMode::bilinear) {
        const int64_t taps = inputs / outputs;
        return {taps, o * taps, inputs - 1, 0.0};
    }
    const double place = fmax(static_cast<double>(inputs) / static_cast<double>(outputs) * (static_cast<double>(o) + 0.5) - 0.5, 0.0);
    const int64_t low = min(static_cast<int64_t>(place), inputs - 1);
    return {2, low, inputs - 1, fmin(place - static_cast<double>(low), 1.0)};
}

__device__ int64_t checked(int64_t row, int64_t rows) {
    assert(row >= 0 && row < rows);
    return row;
}

template <typename T>
__global__ void forward_kernel(PoolMode mode, PoolShape s, const T* table, const int64_t* source, T* out) {
    using A = typename Accumulator<T>::type;
    const int64_t r = blockIdx.x;
    const int64_t* cells = source + r / (s.out_H * s.out_W) * s.H * s.W;
    const Window wy = window(mode, s.H, s.out_H, r / s.out_W % s.out_H), wx = window(mode, s.W, s.out_W, r % s.out_W);
    const A divisor = mode == PoolMode::average ? static_cast<A>(wy.taps * wx.taps) : A(1);
    for (int64_t d = threadIdx.x; d < s.D; d += blockDim.x) {
        A acc = 0;
        for (int64_t j = 0; j < wy.taps * wx.taps; ++j) {
            const int64_t y = j / wx.taps, x = j % wx.taps;
            const A value = static_cast<A>(table[checked(cells[wy.cell(y) * s.W + wx.cell(x)], s.M) * s.D + d]);
            if (mode == PoolMode::max) {
                acc = j == 0 || value > acc || value != value ? value : acc;
            } else {
                acc += static_cast<A>(wy.weight(mode, y)) * static_cast<A>(wx.weight(mode, x)) * value;
            }
        }
        out[r * s.D + d] = static_cast<T>(acc / divisor);
    }
}

template <typename T, typename A = typename Accumulator<T>::type>
__global__ void backward_kernel(PoolMode mode, PoolShape s, const T* grad, const T* table, const int64_t* source, A* grad_table) {
    const int64_t r = blockIdx.x;
    const int64_t* cells = source + r / (s.out_H * s.out_W) * s.H * s.W;
    const Window wy = window(mode, s.H, s.out_H, r / s.out_W % s.out_H), wx = window(mode, s.W, s.out_W, r % s.out_W);
    const A divisor = mode == PoolMode::average ? static_cast<A>(wy.taps * wx.taps) : A(1);
    for (int64_t d = threadIdx.x; d < s.D; d += blockDim.x) {
        const A g = static_cast<A>(grad[r * s.D + d]) / divisor;
        A best = 0;
        int64_t chosen = 0;
        for (int64_t j = 0; j < wy.taps * wx.taps; ++j) {
            const int64_t y = j / wx.taps, x = j % wx.taps;
            const int64_t at = checked(cells[wy.cell(y) * s.W + wx.cell(x)], s.M) * s.D + d;
            if (mode == PoolMode::max) {
                const A value = static_cast<A>(table[at]);
                const bool wins = j == 0 || value > best || value != value;
                best = wins ? value : best;
                chosen = wins ? at : chosen;
            } else {
                atomicAdd(grad_table + at, static_cast<A>(wy.weight(mode, y)) * static_cast<A>(wx.weight(mode, x)) * g);
            }
        }
        if (mode == PoolMode::max) atomicAdd(grad_table + chosen, g);
    }
}

int threads_for(int64_t D) {
    return D >= 256 ? 256 : static_cast<int>((D + 31) / 32 * 32);
}

void check_launch() {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("spatial_pool: ") + cudaGetErrorString(error));
}

template <typename F>
void with_type(DType dtype, const F& run) {
    switch (dtype) {
        case DType::f32:
            return run(float{});
        case DType::f64:
            return run(double{});
        case DType::bf16:
            return run(__nv_bfloat16{});
        case DType::f16:
            return run(__half{});
        case DType::e4m3:  // Python takes the four above
            return;
    }
}

}  // namespace

void spatial_pool_forward_cuda(DType dtype, PoolMode mode, const PoolShape& s, const void* table, const int64_t* source, void* out,
                               void* stream) {
    const int64_t rows = s.K * s.out_H * s.out_W;
    if (rows == 0 || s.D == 0) return;
    with_type(dtype, [&](auto value) {
        using T = decltype(value);
        forward_kernel<T><<<static_cast<unsigned>(rows), threads_for(s.D), 0, static_cast<cudaStream_t>(stream)>>>(
            mode, s, static_cast<const T*>(table), source, static_cast<T*>(out));
    });
    check_launch();
}

void spatial_pool_backward_cuda(DType dtype, PoolMode mode, const PoolShape& s, const void* grad, const void* table, const int64_t* source,
                                void* grad_table, void* stream) {
    const int64_t rows = s.K * s.out_H * s.out_W;
    if (rows == 0 || s.D == 0) return;
    with_type(dtype, [&](auto value) {
        using T = decltype(value);
        using A = typename Accumulator<T>::type;
        backward_kernel<T><<<static_cast<unsigned>(rows), threads_for(s.D), 0, static_cast<cudaStream_t>(stream)>>>(
            mode, s, static_cast<const T*>(grad), static_cast<const T*>(table), source, static_cast<A*>(grad_table));
    });
    check_launch();
}

}  // namespace llava_fast
