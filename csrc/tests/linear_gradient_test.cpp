// Runs the products of the backward pass over odd shapes in both layouts and both types of B, on buffers of exactly the right size, and
// holds them against a plain loop in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/linear_gradient.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

using namespace llava_fast;

namespace {

// Of 15 values in steps of 1/8, which bf16 holds exactly.
float number_at(int64_t i) {
    return static_cast<float>((i * 7919) % 15 - 7) / 8.0f;
}

template <typename B>
void run(int64_t M, int64_t N, int64_t K, bool a_transposed, bool add, DType type, int threads, int64_t gap = 1) {
    const int64_t rows = a_transposed ? K : M, columns = a_transposed ? M : K, a_stride = columns + 2, b_stride = N + 3,
                  out_stride = N + gap;
    std::vector<float> a((rows - 1) * a_stride + columns);
    const int64_t size = (M - 1) * out_stride + N;
    const std::unique_ptr<float[], void (*)(float*)> made(new (std::align_val_t(64)) float[size],
                                                          [](float* p) { operator delete[](p, std::align_val_t(64)); });
    float* out = made.get();
    std::fill(out, out + size, 2.0f);
    std::vector<B> b((K - 1) * b_stride + N);
    for (size_t i = 0; i < a.size(); ++i) a[i] = number_at(static_cast<int64_t>(i) * 3) / 3.0f;
    for (size_t i = 0; i < b.size(); ++i) narrow(number_at(static_cast<int64_t>(i) * 5), &b[i]);
    product({M, N, K, a.data(), a_stride, a_transposed, type, b.data(), b_stride, out, out_stride, add, threads});
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = add ? 2.0 : 0.0;
            for (int64_t k = 0; k < K; ++k) {
                const float left = a_transposed ? a[k * a_stride + m] : a[m * a_stride + k];
                sum += static_cast<double>(left) * static_cast<double>(widen(b[k * b_stride + n]));
            }
            const double error = std::fabs(static_cast<double>(out[m * out_stride + n]) - sum);
            if (error > 1e-5 * (1.0 + std::fabs(sum))) throw std::runtime_error("off by " + std::to_string(error));
        }
    }
}

}  // namespace

int main() {
    // The last two: two blocks of B in fp32 and in bf16, each with two depths.
    const int64_t shapes[][3] = {{1, 1, 1},    {33, 17, 5},    {32, 32, 32},   {70, 100, 800},
                                 {5, 600, 31}, {100, 65, 386}, {40, 600, 760}, {3, 1740, 740}};
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (const auto& [M, N, K] : shapes) {
            for (int kind = 0; kind < 12 && isa == "amx"; ++kind) {
                run<float>(M, N, K, kind & 1, kind & 2, DType::f32, 1 + kind / 4);
                run<bf16>(M, N, K, kind & 1, kind & 2, DType::bf16, 1 + kind / 4);
            }
        }
        for (int threads = 1; threads < 4 && isa == "amx"; ++threads) {  // large enough to be written around the caches, where lines allow
            for (int64_t gap : {0, 1, 16}) {
                run<float>(4100, 1024, 3, true, false, DType::f32, threads, gap);
                run<bf16>(4100, 1024, 3, false, gap == 16, DType::bf16, threads, gap);
            }
        }
        std::printf("%s ok\n", isa.c_str());
    }
    set_isa("portable");
    try {
        product({1, 1, 1, nullptr, 1, false, DType::f32, nullptr, 1, nullptr, 1, false, 1});
    } catch (const std::invalid_argument&) {
        std::printf("bounds ok\n");
        return 0;
    }
    return 1;
}
