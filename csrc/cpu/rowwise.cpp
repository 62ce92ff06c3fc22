#include "cpu/rowwise.h"

#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/activation_curve.h"
#include "cpu/isa.h"
#include "cpu/stream.h"

namespace llava_fast {

namespace {

constexpr int64_t kFewElements = 1 << 15;  // a second thread costs more to wake than it saves: some 10 us

int threads_for(int threads, int64_t elements) {
    return elements < kFewElements ? 1 : threads;
}

// The kernels read anything else as one of the three.
void check_dtype(const char* what, DType dtype, bool or_e4m3 = false) {
    if (dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || (or_e4m3 && dtype == DType::e4m3)) return;
    throw std::invalid_argument(std::string(what) + " must be fp32, bf16" + (or_e4m3 ? ", fp16 or e4m3" : " or fp16") + ", got " +
                                (dtype == DType::f64 ? "fp64" : "e4m3"));
}

// Room for whole registers.
int64_t padded(int64_t D) {
    return (D + 31) / 32 * 32;
}

struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

std::unique_ptr<float, Free> floats(int64_t n) {
    return std::unique_ptr<float, Free>(static_cast<float*>(::operator new(static_cast<size_t>(n) * sizeof(float), std::align_val_t(64))));
}

}  // namespace

void norm_forward(NormTask task) {
    check_dtype("x", task.dtype), check_dtype("weight", task.weight_dtype);
    task.threads = threads_for(task.threads, task.T * task.D);
    const auto scratch = floats((2 + task.threads) * padded(task.D));
    task.scratch = scratch.get();
    task.centred = task.bias != nullptr;
    task.stream = streams(task.dtype, task.out, task.T, task.D) && reinterpret_cast<uintptr_t>(task.sum) % 64 == 0;
    LLAVA_FAST_CHOOSE(norm_forward)(task);
}

void norm_backward(NormTask task) {
    check_dtype("x", task.dtype), check_dtype("weight", task.weight_dtype);
    task.threads = threads_for(task.threads, task.T * task.D);
    task.centred = task.grad_bias != nullptr;
    const auto scratch = floats((1 + (task.centred ? 2 : 1) * kNormParts) * padded(task.D));
    task.scratch = scratch.get();
    task.stream = streams(task.dtype, task.grad_x, task.T, task.D);
    LLAVA_FAST_CHOOSE(norm_backward)(task);
}

void rope(RopeTask task) {
    check_dtype("q", task.dtype), check_dtype("cos", task.table_dtype);
    if (task.v_out) check_dtype("cache", task.cache_dtype, true);
    task.threads = threads_for(task.threads, task.T * (task.q.heads + task.k.heads) * task.d);
    for (int64_t t = 0; task.v_out && t < task.T; ++t) {
        if (task.slots[t] < -1 || task.slots[t] >= task.cache_rows) {
            throw std::invalid_argument("slots[" + std::to_string(t) + "] is " + std::to_string(task.slots[t]) +
                                        ", expected a row of the cache, 0 to " + std::to_string(task.cache_rows - 1) + ", or -1 for none");
        }
    }
    task.stream = streams(task.dtype, task.q_out, task.T * task.q.heads, task.d) && reinterpret_cast<uintptr_t>(task.k_out) % 64 == 0 &&
                  reinterpret_cast<uintptr_t>(task.v_out) % 64 == 0;
    LLAVA_FAST_CHOOSE(rope)(task);
}

void activation_forward(ActivationTask task) {
    check_dtype("x", task.dtype);
    task.threads = threads_for(task.threads, task.n);
    task.stream = streams(task.dtype, task.out, task.n / 64, 64);
    task.curve = &activation_curve(task.kind, false);
    LLAVA_FAST_CHOOSE(activation_forward)(task);
}

void activation_backward(ActivationTask task) {
    check_dtype("x", task.dtype);
    task.threads = threads_for(task.threads, task.n);
    task.stream = streams(task.dtype, task.out, task.n / 64, 64);
    task.curve = &activation_curve(task.kind, true);
    LLAVA_FAST_CHOOSE(activation_backward)(task);
}

void swiglu_forward(SwigluTask task) {
    check_dtype("gate_up", task.dtype);
    task.threads = threads_for(task.threads, task.T * task.F);
    task.stream = streams(task.dtype, task.out, task.T, task.F);
    task.curve = &activation_curve(Activation::silu, false);
    LLAVA_FAST_CHOOSE(swiglu_forward)(task);
}

void swiglu_backward(SwigluTask task) {
    check_dtype("gate_up", task.dtype);
    task.threads = threads_for(task.threads, task.T * task.F);
    task.stream = streams(task.dtype, task.out, 2 * task.T, task.F);
    task.curve = &activation_curve(Activation::silu, false);
    LLAVA_FAST_CHOOSE(swiglu_backward)(task);
}

}  // namespace llava_fast
