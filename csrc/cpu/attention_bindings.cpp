#include <pybind11/pybind11.h>

#include "cpu/attention.h"

namespace py = pybind11;

namespace llava_fast {

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_attention(py::module_& m) {
    py::class_<Rows>(m, "Rows", py::module_local()).def(py::init([](std::uintptr_t data, DType type, int64_t row, int64_t head) {
        return Rows{pointer<void>(data), type, row, head, 0};
    }));
    py::class_<AttentionTask>(m, "AttentionTask", py::module_local())
        .def(py::init([](int64_t T, int64_t K, int64_t S, int64_t H, int64_t G, int64_t d, bool causal, float scale, const Rows& q,
                         const Rows& k, const Rows& v, const Rows& out, std::uintptr_t lse, std::uintptr_t q_index, int threads,
                         bool invariant) {
            AttentionTask task{};
            task.T = T;
            task.K = K;
            task.S = S;
            task.H = H;
            task.G = G;
            task.d = d;
            task.causal = causal;
            task.scale = scale;
            task.q = q;
            task.k = k;
            task.v = v;
            task.out = out;
            task.lse = pointer<float>(lse);
            task.q_index = pointer<const int64_t>(q_index);
            task.threads = threads;
            task.invariant = invariant;
            return task;
        }));
    m.def(
        "attention_forward",
        [](const AttentionTask& task, std::uintptr_t cu_q, std::uintptr_t cu_k, std::uintptr_t used, std::uintptr_t prefix) {
            attention_forward(task, {pointer<const int32_t>(cu_q), pointer<const int32_t>(cu_k), pointer<const int32_t>(used),
                                     pointer<const int32_t>(prefix), nullptr, 0, 0});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "attention_backward",
        [](AttentionTask task, const Rows& grad_out, const Rows& grad_q, const Rows& grad_k, const Rows& grad_v, std::uintptr_t cu_q,
           std::uintptr_t cu_k, std::uintptr_t used, std::uintptr_t prefix) {
            task.grad_out = grad_out;
            task.grad_q = grad_q;
            task.grad_k = grad_k;
            task.grad_v = grad_v;
            attention_backward(task, {pointer<const int32_t>(cu_q), pointer<const int32_t>(cu_k), pointer<const int32_t>(used),
                                      pointer<const int32_t>(prefix), nullptr, 0, 0});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "paged_attention",
        [](AttentionTask task, std::uintptr_t cu_q, std::uintptr_t lengths, std::uintptr_t block_table, int64_t blocks, int64_t block,
           int64_t cache_blocks, int64_t k_page, int64_t v_page, std::uintptr_t k_scale, std::uintptr_t v_scale) {
            task.block = block;
            task.k.page = k_page;
            task.v.page = v_page;
            task.k_scale = pointer<const float>(k_scale);
            task.v_scale = pointer<const float>(v_scale);
            attention_forward(task, {pointer<const int32_t>(cu_q), nullptr, pointer<const int32_t>(lengths), nullptr,
                                     pointer<const int32_t>(block_table), blocks, cache_blocks});
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace llava_fast
