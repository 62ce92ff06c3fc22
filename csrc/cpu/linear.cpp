#include "cpu/linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

namespace llava_fast {

namespace {

template <typename T>
void widen_all(const void* from, int64_t n, std::vector<float>& to) {
    to.resize(n);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(widen(static_cast<const T*>(from)[i]));
}

// Of two rows of x that go to one of out, two threads would each write a part.
void check_rows(const int64_t* rows, int64_t M, int64_t out_rows) {
    bool ascending = true;
    for (int64_t m = 0; m < M; ++m) {
        if (rows[m] < 0 || rows[m] >= out_rows) {
            throw std::invalid_argument("rows[" + std::to_string(m) + "] is " + std::to_string(rows[m]) + ", expected a row of out, 0 to " +
                                        std::to_string(out_rows - 1));
        }
        ascending &= m == 0 || rows[m] > rows[m - 1];
    }
    if (ascending) return;  // as layouts are
    std::vector<char> taken(out_rows, 0);
    for (int64_t m = 0; m < M; ++m) {
        if (taken[rows[m]]++ != 0) throw std::invalid_argument("rows must differ, got " + std::to_string(rows[m]) + " twice");
    }
}

// Waking threads costs some 10 us, the time one core takes to read 100 KB or to do some two million multiply-adds.
int useful_threads(const LinearTask& task) {
    const int64_t share = std::max(task.I * task.O / 65536, task.M * task.I * task.O / 2000000);
    return static_cast<int>(std::clamp<int64_t>(share, 1, std::max(task.threads, 1)));
}

}  // namespace

void linear(LinearTask task, const void* bias, DType bias_type, int64_t out_rows) {
    if (task.rows == nullptr && task.M > out_rows) {
        throw std::invalid_argument("out has " + std::to_string(out_rows) + " rows, expected " + std::to_string(task.M));
    }
    if (task.rows != nullptr) check_rows(task.rows, task.M, out_rows);
    if (task.scale != nullptr && task.group < 1) {
        throw std::invalid_argument("group must be at least 1, got " + std::to_string(task.group));
    }
    if (bias != nullptr && bias_type == DType::e4m3) throw std::invalid_argument("the bias must be fp32, bf16, fp16 or fp64, got e4m3");
    std::vector<float> wide_bias;
    if (bias != nullptr && bias_type == DType::bf16) widen_all<bf16>(bias, task.O, wide_bias);
    if (bias != nullptr && bias_type == DType::f16) widen_all<f16>(bias, task.O, wide_bias);
    if (bias != nullptr && bias_type == DType::f64) widen_all<double>(bias, task.O, wide_bias);
    task.bias = wide_bias.empty() ? static_cast<const float*>(bias) : wide_bias.data();
    if (task.M == 0 || task.O == 0) return;
    task.threads = useful_threads(task);
#if LLAVA_FAST_LEVEL >= 3
    if (current_isa() == Isa::amx) return linear_amx(task);
#endif
    LLAVA_FAST_CHOOSE(linear)(task);
}

}  // namespace llava_fast
