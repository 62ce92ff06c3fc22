#include <pybind11/pybind11.h>

#include "cpu/rowwise.h"

namespace py = pybind11;

namespace llava_fast {

namespace {

// Addresses come as integers; 0 is null.
template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Address = std::uintptr_t;

}  // namespace

void bind_rowwise(py::module_& m) {
    py::enum_<Activation>(m, "Activation", py::module_local())
        .value("gelu", Activation::gelu)
        .value("gelu_pytorch_tanh", Activation::gelu_pytorch_tanh)
        .value("quick_gelu", Activation::quick_gelu)
        .value("silu", Activation::silu);
    const py::call_guard<py::gil_scoped_release> released;
    m.def(
        "norm_forward",
        [](DType dtype, DType weight_dtype, int64_t T, int64_t D, float eps, Address x, Address residual, Address weight, Address bias,
           Address out, Address sum, Address stats, int threads) {
            NormTask task{};
            task.dtype = dtype, task.weight_dtype = weight_dtype, task.T = T, task.D = D, task.eps = eps, task.threads = threads;
            task.x = at<void>(x), task.residual = at<void>(residual), task.weight = at<void>(weight), task.bias = at<void>(bias);
            task.out = at<void>(out), task.sum = at<void>(sum), task.stats = at<float>(stats);
            norm_forward(task);
        },
        released);
    m.def(
        "norm_backward",
        [](DType dtype, DType weight_dtype, int64_t T, int64_t D, Address grad, Address grad_sum, Address x, Address weight, Address stats,
           Address grad_x, Address grad_weight, Address grad_bias, int threads) {
            NormTask task{};
            task.dtype = dtype, task.weight_dtype = weight_dtype, task.T = T, task.D = D, task.threads = threads;
            task.x = at<void>(x), task.weight = at<void>(weight), task.stats = at<float>(stats);
            task.grad = at<void>(grad), task.grad_sum = at<void>(grad_sum), task.grad_x = at<void>(grad_x);
            task.grad_weight = at<float>(grad_weight), task.grad_bias = at<float>(grad_bias);
            norm_backward(task);
        },
        released);
    m.def(
        "rope",
        [](DType dtype, DType table_dtype, int64_t T, int64_t d, Address cos, Address sin, bool inverse, Address q, int64_t q_row,
           int64_t q_head, int64_t H, Address q_out, Address k, int64_t k_row, int64_t k_head, int64_t G, Address k_out, int threads) {
            RopeTask task{};
            task.dtype = dtype, task.table_dtype = table_dtype, task.T = T, task.d = d, task.threads = threads;
            task.cos = at<void>(cos), task.sin = at<void>(sin), task.inverse = inverse;
            task.q = {at<void>(q), q_row, q_head, H}, task.q_out = at<void>(q_out);
            task.k = {at<void>(k), k_row, k_head, G}, task.k_out = at<void>(k_out);
            rope(task);
        },
        released);
    m.def(
        "rope_into_cache",
        [](DType dtype, DType table_dtype, int64_t T, int64_t d, Address cos, Address sin, Address q, int64_t q_row, int64_t q_head,
           int64_t H, Address q_out, Address k, int64_t k_row, int64_t k_head, int64_t G, Address v, int64_t v_row, int64_t v_head,
           DType cache_dtype, int64_t cache_rows, Address k_cache, Address v_cache, Address slots, Address k_scale, Address v_scale,
           int threads) {
            RopeTask task{};
            task.dtype = dtype, task.table_dtype = table_dtype, task.T = T, task.d = d, task.threads = threads;
            task.cos = at<void>(cos), task.sin = at<void>(sin);
            task.q = {at<void>(q), q_row, q_head, H}, task.q_out = at<void>(q_out);
            task.k = {at<void>(k), k_row, k_head, G}, task.k_out = at<void>(k_cache);
            task.v = {at<void>(v), v_row, v_head, G}, task.v_out = at<void>(v_cache);
            task.cache_dtype = cache_dtype, task.cache_rows = cache_rows, task.slots = at<int64_t>(slots);
            task.k_scale = at<float>(k_scale), task.v_scale = at<float>(v_scale);
            rope(task);
        },
        released);
    m.def(
        "activation_forward",
        [](DType dtype, Activation kind, int64_t n, Address x, Address out, int threads) {
            activation_forward({dtype, kind, n, at<void>(x), nullptr, at<void>(out), threads, false, nullptr});
        },
        released);
    m.def(
        "activation_backward",
        [](DType dtype, Activation kind, int64_t n, Address x, Address grad, Address out, int threads) {
            activation_backward({dtype, kind, n, at<void>(x), at<void>(grad), at<void>(out), threads, false, nullptr});
        },
        released);
    m.def(
        "swiglu_forward",
        [](DType dtype, int64_t T, int64_t F, Address gate_up, Address out, int threads) {
            swiglu_forward({dtype, T, F, at<void>(gate_up), nullptr, at<void>(out), threads, false, nullptr});
        },
        released);
    m.def(
        "swiglu_backward",
        [](DType dtype, int64_t T, int64_t F, Address gate_up, Address grad, Address out, int threads) {
            swiglu_backward({dtype, T, F, at<void>(gate_up), at<void>(grad), at<void>(out), threads, false, nullptr});
        },
        released);
}

}  // namespace llava_fast
