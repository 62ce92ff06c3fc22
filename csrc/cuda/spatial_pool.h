// Spatial pooling on a CUDA device; letters and formula as in cpu/spatial_pool.h and kernels/spatial_pool.py.
#pragma once

#include "cpu/spatial_pool.h"

namespace llava_fast {

// Device pointers to contiguous arrays and a cudaStream_t. Nothing is waited for; throws std::runtime_error where the launch
// is refused. A source entry outside [0, M) stops the kernel with a device-side assertion.
void spatial_pool_forward_cuda(DType dtype, PoolMode mode, const PoolShape& shape, const void* table, const int64_t* source, void* out,
                               void* stream);

// grad_table must be zero; it is fp32, or fp64 where dtype is.
void spatial_pool_backward_cuda(DType dtype, PoolMode mode, const PoolShape& shape, const void* grad, const void* table,
                                const int64_t* source, void* grad_table, void* stream);

}  // namespace llava_fast
