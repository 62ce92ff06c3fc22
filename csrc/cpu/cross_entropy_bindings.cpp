#include <pybind11/pybind11.h>

#include "cpu/cross_entropy.h"
#include "pool_types.h"

namespace llava_fast {

void bind_cross_entropy(pybind11::module_& m) {
    m.def(
        "cross_entropy",
        [](DType dtype, int64_t rows, int64_t vocab, std::uintptr_t logits, std::uintptr_t labels, std::uintptr_t loss, std::uintptr_t lse,
           std::uintptr_t grad, float scale, float smoothing, float z_loss, bool gradients, int threads) {
            cross_entropy({dtype, rows, vocab, pointer<void>(logits), pointer<const int64_t>(labels), pointer<float>(loss),
                           pointer<float>(lse), pointer<const float>(grad), scale, smoothing, z_loss, gradients, threads});
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace llava_fast
