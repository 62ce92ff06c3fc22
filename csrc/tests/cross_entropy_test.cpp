// Runs the cross-entropy of rows over odd widths in every type and instruction set, on buffers of exactly the right size, and holds
// it against a plain loop in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/cross_entropy.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

using namespace llava_fast;

namespace {

void require(double value, double expected, double tolerance, const char* what) {
    if (!(std::fabs(value - expected) <= tolerance)) {
        throw std::runtime_error(std::string(what) + " is " + std::to_string(value) + ", expected " + std::to_string(expected));
    }
}

template <typename T>
void run(DType dtype, int64_t rows, int64_t vocab, double tolerance) {
    const double smoothing = 0.125, z_loss = 0.0625, scale = 0.5;
    std::vector<T> logits(rows * vocab);
    for (int64_t i = 0; i < rows * vocab; ++i) narrow(static_cast<float>((i * 7919) % 61 - 30) / 8.0f, &logits[i]);
    std::vector<int64_t> labels(rows);
    for (int64_t r = 0; r < rows; ++r) labels[r] = r % 2 == 0 ? vocab - 1 : 0;
    std::vector<float> loss(rows), lse(rows), grad(rows, static_cast<float>(scale));
    std::vector<T> one = logits, two = logits;
    CrossEntropyTask task{dtype,
                          rows,
                          vocab,
                          one.data(),
                          labels.data(),
                          loss.data(),
                          lse.data(),
                          nullptr,
                          static_cast<float>(scale),
                          static_cast<float>(smoothing),
                          static_cast<float>(z_loss),
                          true,
                          2};
    cross_entropy(task);
    task.logits = two.data();
    task.loss = nullptr;
    task.grad = grad.data();
    cross_entropy(task);
    for (int64_t r = 0; r < rows; ++r) {
        double total = 0, sum = 0;
        for (int64_t v = 0; v < vocab; ++v) {
            const double z = static_cast<double>(widen(logits[r * vocab + v]));
            total += std::exp(z);
            sum += z;
        }
        const double log_sum = std::log(total), at_label = static_cast<double>(widen(logits[r * vocab + labels[r]]));
        const double mean = sum / static_cast<double>(vocab);
        require(lse[r], log_sum, 1e-5, "lse");
        require(loss[r], log_sum - (1 - smoothing) * at_label - smoothing * mean + z_loss * log_sum * log_sum, 1e-5, "loss");
        for (int64_t v = 0; v < vocab; ++v) {
            const double z = static_cast<double>(widen(logits[r * vocab + v]));
            double expected = (1 + 2 * z_loss * log_sum) * std::exp(z - log_sum) - smoothing / static_cast<double>(vocab);
            expected = scale * (expected - (v == labels[r] ? 1 - smoothing : 0));
            require(static_cast<double>(widen(one[r * vocab + v])), expected, tolerance, "gradient");
            require(static_cast<double>(widen(two[r * vocab + v])), expected, tolerance, "gradient from lse");
        }
    }
}

}  // namespace

int main() {
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (int64_t vocab : {1, 7, 8, 33, 1024, 1031, 3000}) {
            for (int64_t rows : {0, 1, 3}) {
                run<float>(DType::f32, rows, vocab, 1e-6);
                run<bf16>(DType::bf16, rows, vocab, 0.003);
                run<f16>(DType::f16, rows, vocab, 0.0005);
            }
        }
        std::printf("%s ok\n", isa.c_str());
    }
    float logits[2] = {}, loss[1], lse[1];
    const int64_t outside[] = {2};
    try {
        cross_entropy({DType::f32, 1, 2, logits, outside, loss, lse, nullptr, 1.0f, 0.0f, 0.0f, true, 1});
    } catch (const std::invalid_argument&) {
        std::printf("bounds ok\n");
        return 0;
    }
    return 1;
}
