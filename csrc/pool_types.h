// What the bindings of both extensions share. The types are local to each module: the two may be loaded side by side.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/spatial_pool.h"

namespace llava_fast {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline void bind_pool_types(pybind11::module_& m) {
    namespace py = pybind11;
    py::enum_<DType>(m, "DType", py::module_local())
        .value("float32", DType::f32)
        .value("float64", DType::f64)
        .value("bfloat16", DType::bf16)
        .value("float16", DType::f16)
        .value("float8_e4m3fn", DType::e4m3);
    py::enum_<PoolMode>(m, "PoolMode", py::module_local())
        .value("average", PoolMode::average)
        .value("max", PoolMode::max)
        .value("bilinear", PoolMode::bilinear);
    py::class_<PoolShape>(m, "PoolShape", py::module_local())
        .def(py::init([](int64_t M, int64_t D, int64_t K, int64_t H, int64_t W, int64_t out_H, int64_t out_W) {
            return PoolShape{M, D, K, H, W, out_H, out_W};
        }));
}

}  // namespace llava_fast
