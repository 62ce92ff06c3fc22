// llava_fast._cpu: pointers and sizes in, nothing of torch; the Python side allocates and checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/isa.h"
#include "cpu/probe.h"
#include "cpu/spatial_pool.h"
#include "pool_types.h"

namespace py = pybind11;
using namespace llava_fast;

namespace llava_fast {
void bind_attention(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_linear(py::module_& m);
void bind_rowwise(py::module_& m);
void bind_sampling(py::module_& m);
}  // namespace llava_fast

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of llava_fast";
    m.def("supported_isas", &supported_isas, "Instruction sets of this machine, best last");
    m.def("isa", [] { return isa_name(current_isa()); }, "The instruction set in use");
    m.def("set_isa", &set_isa, "Use another instruction set (for tests)", py::arg("name"));

    m.def("fma_rate", &fma_rate, "fp32 operations a second of the arithmetic units", py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "copy_past_caches",
        [](std::uintptr_t to, std::uintptr_t from, int64_t bytes, int threads) {
            copy_past_caches(pointer<void>(to), pointer<const void>(from), bytes, threads);
        },
        "Copy, written around the caches", py::call_guard<py::gil_scoped_release>());

    m.def("tile_rate", &tile_rate, "bf16 operations a second of the tile units, 0 where there are none", py::arg("threads"),
          py::call_guard<py::gil_scoped_release>());

    // With more threads alive than cores, libgomp's wait for work asleep, 20 us each time: a second caller's team has to replace the
    // first's.
    m.def(
        "release_threads",
        [] {
#if defined(_OPENMP) && (_OPENMP >= 201811 || (defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9))
            omp_pause_resource_all(omp_pause_soft);
#endif
        },
        "End the calling thread's team; it is made anew when it is next needed", py::call_guard<py::gil_scoped_release>());

    bind_pool_types(m);
    bind_cross_entropy(m);
    bind_rowwise(m);
    bind_sampling(m);
    m.def(
        "spatial_pool_forward",
        [](DType dtype, PoolMode mode, const PoolShape& shape, std::uintptr_t table, std::uintptr_t source, std::uintptr_t out,
           int threads) {
            spatial_pool_forward(dtype, mode, shape, pointer<const void>(table), pointer<const int64_t>(source), pointer<void>(out),
                                 threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "spatial_pool_backward",
        [](DType dtype, PoolMode mode, const PoolShape& shape, std::uintptr_t grad, std::uintptr_t table, std::uintptr_t source,
           std::uintptr_t grad_table, int threads) {
            spatial_pool_backward(dtype, mode, shape, pointer<const void>(grad), pointer<const void>(table), pointer<const int64_t>(source),
                                  pointer<void>(grad_table), threads);
        },
        py::call_guard<py::gil_scoped_release>());
    bind_attention(m);
    bind_linear(m);
}
