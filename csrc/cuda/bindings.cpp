// llava_fast._cuda: device pointers, sizes and a stream in. cudart is linked statically, so importing needs no driver.
#include <pybind11/pybind11.h>

#include "cuda/spatial_pool.h"
#include "pool_types.h"

namespace py = pybind11;
using namespace llava_fast;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of llava_fast";
    bind_pool_types(m);
    m.def("spatial_pool_forward", [](DType dtype, PoolMode mode, const PoolShape& shape, std::uintptr_t table, std::uintptr_t source,
                                     std::uintptr_t out, std::uintptr_t stream) {
        spatial_pool_forward_cuda(dtype, mode, shape, pointer<const void>(table), pointer<const int64_t>(source), pointer<void>(out),
                                  pointer<void>(stream));
    });
    m.def("spatial_pool_backward", [](DType dtype, PoolMode mode, const PoolShape& shape, std::uintptr_t grad, std::uintptr_t table,
                                      std::uintptr_t source, std::uintptr_t grad_table, std::uintptr_t stream) {
        spatial_pool_backward_cuda(dtype, mode, shape, pointer<const void>(grad), pointer<const void>(table),
                                   pointer<const int64_t>(source), pointer<void>(grad_table), pointer<void>(stream));
    });
}
