#include "cpu/cross_entropy.h"

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace llava_fast {

void cross_entropy(const CrossEntropyTask& task) {
    if (task.dtype == DType::f64 || task.dtype == DType::e4m3) {
        throw std::invalid_argument(std::string("cross-entropy takes fp32, bf16 and fp16 logits, got ") +
                                    (task.dtype == DType::f64 ? "fp64" : "e4m3"));
    }
    for (int64_t r = 0; r < task.rows; ++r) {
        if (task.labels[r] < 0 || task.labels[r] >= task.vocab) {
            throw std::invalid_argument("labels[" + std::to_string(r) + "] is " + std::to_string(task.labels[r]) +
                                        ", expected a row of the weight, 0 to " + std::to_string(task.vocab - 1));
        }
    }
    LLAVA_FAST_CHOOSE(cross_entropy)(task);
}

}  // namespace llava_fast
