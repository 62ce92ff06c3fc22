#include <pybind11/pybind11.h>

#include "cpu/linear.h"
#include "cpu/linear_gradient.h"

namespace py = pybind11;

namespace llava_fast {

void bind_linear(py::module_& m) {
    py::enum_<WeightType>(m, "WeightType", py::module_local())
        .value("float32", WeightType::f32)
        .value("bfloat16", WeightType::bf16)
        .value("float16", WeightType::f16)
        .value("int8", WeightType::int8)
        .value("int4", WeightType::int4);
    py::enum_<Act>(m, "Act", py::module_local())
        .value("none", Act::none)
        .value("gelu", Act::gelu)
        .value("gelu_pytorch_tanh", Act::gelu_tanh)
        .value("quick_gelu", Act::quick_gelu)
        .value("silu", Act::silu);
    m.def(
        "linear",
        [](DType dtype, WeightType weight_type, Act act, int64_t M, int64_t I, int64_t O, std::uintptr_t x, int64_t x_stride,
           std::uintptr_t weight, std::uintptr_t scale, int64_t group, std::uintptr_t bias, DType bias_type, std::uintptr_t residual,
           int64_t residual_stride, std::uintptr_t out, int64_t out_stride, int64_t out_rows, std::uintptr_t rows, std::uintptr_t pre,
           int threads, bool invariant) {
            LinearTask task{};
            task.dtype = dtype;
            task.weight_type = weight_type;
            task.act = act;
            task.M = M;
            task.I = I;
            task.O = O;
            task.x = reinterpret_cast<const void*>(x);
            task.x_stride = x_stride;
            task.weight = reinterpret_cast<const void*>(weight);
            task.scale = reinterpret_cast<const float*>(scale);
            task.group = group;
            task.residual = reinterpret_cast<const void*>(residual);
            task.residual_stride = residual_stride;
            task.out = reinterpret_cast<void*>(out);
            task.out_stride = out_stride;
            task.rows = reinterpret_cast<const int64_t*>(rows);
            task.pre = reinterpret_cast<void*>(pre);
            task.threads = threads;
            task.invariant = invariant;
            linear(task, reinterpret_cast<const void*>(bias), bias_type, out_rows);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "product",
        [](int64_t M, int64_t N, int64_t K, std::uintptr_t a, int64_t a_stride, bool a_transposed, DType b_type, std::uintptr_t b,
           int64_t b_stride, std::uintptr_t out, int64_t out_stride, bool add, int threads) {
            product({M, N, K, reinterpret_cast<const float*>(a), a_stride, a_transposed, b_type, reinterpret_cast<const void*>(b), b_stride,
                     reinterpret_cast<float*>(out), out_stride, add, threads});
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace llava_fast
