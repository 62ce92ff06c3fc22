#include "cpu/rowwise.h"

#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace llava_fast {

namespace {

constexpr int64_t kFewElements = 1 << 15;  // a second thread costs more to wake than it saves: some 10 us
constexpr int64_t kManyBytes = 8 << 20;    // outputs that no cache would keep until they are read

int threads_for(int threads, int64_t elements) {
    return elements < kFewElements ? 1 : threads;
}

bool streams(DType dtype, int64_t elements) {
    return elements * (dtype == DType::f32 ? 4 : 2) >= kManyBytes;
}

struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

std::unique_ptr<float, Free> floats(int64_t n) {
    return std::unique_ptr<float, Free>(static_cast<float*>(::operator new(static_cast<size_t>(n) * sizeof(float), std::align_val_t(64))));
}

}  // namespace

void norm_forward(NormTask task) {
    task.threads = threads_for(task.threads, task.T * task.D);
    const auto scratch = floats((2 + task.threads) * task.D);
    task.scratch = scratch.get();
    task.centred = task.bias != nullptr;
    task.stream = streams(task.dtype, task.T * task.D);
    LLAVA_FAST_CHOOSE(norm_forward)(task);
}

void norm_backward(NormTask task) {
    task.threads = threads_for(task.threads, task.T * task.D);
    task.centred = task.grad_bias != nullptr;
    const auto scratch = floats((1 + (task.centred ? 2 : 1) * kNormParts) * task.D);
    task.scratch = scratch.get();
    task.stream = streams(task.dtype, task.T * task.D);
    LLAVA_FAST_CHOOSE(norm_backward)(task);
}

void rope(RopeTask task) {
    task.threads = threads_for(task.threads, task.T * (task.q.heads + task.k.heads) * task.d);
    for (int64_t t = 0; task.v_out && t < task.T; ++t) {
        if (task.slots[t] < -1 || task.slots[t] >= task.cache_rows) {
            throw std::invalid_argument("slots[" + std::to_string(t) + "] is " + std::to_string(task.slots[t]) +
                                        ", expected a row of the cache, 0 to " + std::to_string(task.cache_rows - 1) + ", or -1 for none");
        }
    }
    LLAVA_FAST_CHOOSE(rope)(task);
}

void activation_forward(ActivationTask task) {
    task.threads = threads_for(task.threads, task.n);
    task.stream = streams(task.dtype, task.n);
    LLAVA_FAST_CHOOSE(activation_forward)(task);
}

void activation_backward(ActivationTask task) {
    task.threads = threads_for(task.threads, task.n);
    task.stream = streams(task.dtype, task.n);
    LLAVA_FAST_CHOOSE(activation_backward)(task);
}

void swiglu_forward(SwigluTask task) {
    task.threads = threads_for(task.threads, task.T * task.F);
    task.stream = streams(task.dtype, task.T * task.F);
    LLAVA_FAST_CHOOSE(swiglu_forward)(task);
}

void swiglu_backward(SwigluTask task) {
    task.threads = threads_for(task.threads, task.T * task.F);
    task.stream = streams(task.dtype, 2 * task.T * task.F);
    LLAVA_FAST_CHOOSE(swiglu_backward)(task);
}

}  // namespace llava_fast
