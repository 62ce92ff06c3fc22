#include <pybind11/pybind11.h>

#include "cpu/sampling.h"
#include "pool_types.h"

namespace llava_fast {

void bind_sampling(pybind11::module_& m) {
    m.def(
        "sampling",
        [](int64_t S, int64_t V, int64_t stride, std::uintptr_t logits, std::uintptr_t temperature, std::uintptr_t seeds,
           std::uintptr_t steps, std::uintptr_t top_k, bool top_k_int32, std::uintptr_t top_p, DType top_p_dtype, std::uintptr_t min_p,
           DType min_p_dtype, std::uintptr_t repetition, std::uintptr_t presence, std::uintptr_t frequency, std::uintptr_t counts,
           std::uintptr_t tokens, std::uintptr_t kept, int threads) {
            sampling({S,
                      V,
                      stride,
                      pointer<const float>(logits),
                      pointer<const float>(temperature),
                      pointer<const int64_t>(seeds),
                      pointer<const int64_t>(steps),
                      pointer<const void>(top_k),
                      pointer<const void>(top_p),
                      pointer<const void>(min_p),
                      top_k_int32,
                      top_p_dtype,
                      min_p_dtype,
                      pointer<const float>(repetition),
                      pointer<const float>(presence),
                      pointer<const float>(frequency),
                      pointer<const int32_t>(counts),
                      pointer<int64_t>(tokens),
                      pointer<float>(kept),
                      threads});
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def(
        "argmax",
        [](int64_t S, int64_t V, int64_t stride, std::uintptr_t logits, std::uintptr_t tokens, int threads) {
            SamplingTask task{};
            task.S = S, task.V = V, task.stride = stride, task.logits = pointer<const float>(logits);
            task.tokens = pointer<int64_t>(tokens), task.threads = threads;
            argmax(task);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace llava_fast
