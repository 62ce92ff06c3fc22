// Runs the row-wise kernels over odd shapes in every type and instruction set, on buffers of exactly the right size, and holds
// them against plain loops in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/rowwise.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

using namespace llava_fast;

namespace {

template <typename T>
std::vector<T> values(int64_t n, int64_t seed) {
    std::vector<T> out(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) narrow(static_cast<float>((i * 7919 + seed * 31) % 61 - 30) / 16.0f, &out[i]);
    return out;
}

template <typename T>
double at(const std::vector<T>& x, int64_t i) {
    return static_cast<double>(widen(x[static_cast<size_t>(i)]));
}

void near(double ours, double expected, double tolerance, const char* what) {
    if (!(std::fabs(ours - expected) <= tolerance * (1 + std::fabs(expected)))) {
        throw std::runtime_error(std::string(what) + ": " + std::to_string(ours) + ", expected " + std::to_string(expected));
    }
}

template <typename T>
void norms(DType dtype, int64_t rows, int64_t D, bool centred, double tolerance) {
    const auto x = values<T>(rows * D, 1), residual = values<T>(rows * D, 2), weight = values<T>(D, 3), bias = values<T>(D, 4);
    const auto grad = values<T>(rows * D, 5);
    std::vector<T> out(x.size()), sum(x.size()), grad_x(x.size());
    std::vector<float> stats(static_cast<size_t>(centred ? 2 * rows : rows)), grad_weight(weight.size()), grad_bias(weight.size());
    NormTask task{};
    task.dtype = task.weight_dtype = dtype, task.T = rows, task.D = D, task.eps = 0.1f, task.threads = 2;
    task.x = x.data(), task.residual = residual.data(), task.weight = weight.data(), task.bias = centred ? bias.data() : nullptr;
    task.out = out.data(), task.sum = sum.data(), task.stats = stats.data();
    norm_forward(task);
    task.x = sum.data(), task.grad = grad.data(), task.grad_x = grad_x.data();
    task.grad_weight = grad_weight.data(), task.grad_bias = centred ? grad_bias.data() : nullptr;
    norm_backward(task);
    std::vector<double> expected_weight(weight.size());
    for (int64_t t = 0; t < rows; ++t) {
        double mean = 0, variance = 0, with_normed = 0, plain = 0;
        for (int64_t i = 0; i < D; ++i) mean += centred ? at(sum, t * D + i) / static_cast<double>(D) : 0;
        for (int64_t i = 0; i < D; ++i) variance += std::pow(at(sum, t * D + i) - mean, 2) / static_cast<double>(D);
        const double scale = 1 / std::sqrt(variance + 0.1);
        for (int64_t i = 0; i < D; ++i) {
            const double normed = (at(sum, t * D + i) - mean) * scale, g = at(grad, t * D + i) * at(weight, i);
            near(at(sum, t * D + i), at(x, t * D + i) + at(residual, t * D + i), tolerance, "sum");
            near(at(out, t * D + i), normed * at(weight, i) + (centred ? at(bias, i) : 0), tolerance, "norm");
            expected_weight[static_cast<size_t>(i)] += at(grad, t * D + i) * normed;
            with_normed += g * normed / static_cast<double>(D);
            plain += centred ? g / static_cast<double>(D) : 0;
        }
        for (int64_t i = 0; i < D; ++i) {
            const double normed = (at(sum, t * D + i) - mean) * scale, g = at(grad, t * D + i) * at(weight, i);
            near(at(grad_x, t * D + i), scale * (g - with_normed * normed - plain), tolerance, "grad_x");
        }
    }
    for (int64_t i = 0; i < D; ++i) near(grad_weight[i], expected_weight[static_cast<size_t>(i)], tolerance * 10, "grad_weight");
}

template <typename T, typename C>
void ropes(DType dtype, DType cache_dtype, int64_t rows, int64_t H, int64_t G, int64_t d, double tolerance) {
    const int64_t stride = (H + 2 * G) * d;
    const auto fused = values<T>(rows * stride, 1), cos = values<T>(rows * d / 2, 2), sin = values<T>(rows * d / 2, 3);
    std::vector<T> q_out(static_cast<size_t>(rows * H * d));
    std::vector<C> k_cache(static_cast<size_t>(rows * G * d)), v_cache(k_cache.size());
    std::vector<int64_t> slots(static_cast<size_t>(rows));
    for (int64_t t = 0; t < rows; ++t) slots[t] = t == 1 ? -1 : rows - 1 - t;
    RopeTask task{};
    task.dtype = task.table_dtype = dtype, task.T = rows, task.d = d, task.cos = cos.data(), task.sin = sin.data(), task.threads = 2;
    task.q = {fused.data(), stride, d, H}, task.k = {fused.data() + H * d, stride, d, G},
    task.v = {fused.data() + (H + G) * d, stride, d, G};
    task.q_out = q_out.data(), task.k_out = k_cache.data(), task.v_out = v_cache.data();
    task.cache_dtype = cache_dtype, task.cache_rows = rows, task.slots = slots.data();
    rope(task);
    auto rotated = [&](int64_t t, int64_t head, int64_t i) {
        const double a = at(fused, t * stride + head * d + i % (d / 2)), b = at(fused, t * stride + head * d + d / 2 + i % (d / 2));
        const double c = at(cos, t * d / 2 + i % (d / 2)), s = at(sin, t * d / 2 + i % (d / 2));
        return i < d / 2 ? a * c - b * s : b * c + a * s;
    };
    for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i < H * d; ++i) near(at(q_out, t * H * d + i), rotated(t, i / d, i % d), tolerance, "q");
        for (int64_t i = 0; i < G * d && slots[t] >= 0; ++i) {
            near(at(k_cache, slots[t] * G * d + i), rotated(t, H + i / d, i % d), tolerance, "k");
            near(at(v_cache, slots[t] * G * d + i), at(fused, t * stride + (H + G) * d + i), tolerance, "v");
        }
    }
    slots[0] = rows;
    try {
        rope(task);
    } catch (const std::invalid_argument&) {
        return;
    }
    throw std::runtime_error("a slot outside the cache was taken");
}

template <typename T>
void activations(DType dtype, int64_t rows, int64_t F, double tolerance) {
    const auto x = values<T>(rows * 2 * F, 1), grad = values<T>(rows * 2 * F, 2);
    std::vector<T> out(x.size()), gated(static_cast<size_t>(rows * F)), grad_x(x.size());
    const Activation kinds[] = {Activation::gelu, Activation::gelu_pytorch_tanh, Activation::quick_gelu, Activation::silu};
    for (const Activation kind : kinds) {
        auto exact = [&](double v) {
            const double inner = kind == Activation::quick_gelu ? 1.702 * v
                                 : kind == Activation::silu     ? v
                                                                : 1.5957691216 * (v + 0.044715 * v * v * v);
            return kind == Activation::gelu ? 0.5 * v * std::erfc(-v / std::sqrt(2.0)) : v / (1 + std::exp(-inner));
        };
        activation_forward({dtype, kind, rows * 2 * F, x.data(), nullptr, out.data(), 2, false, nullptr});
        activation_backward({dtype, kind, rows * 2 * F, x.data(), grad.data(), grad_x.data(), 2, false, nullptr});
        for (int64_t i = 0; i < rows * 2 * F; ++i) {
            near(at(out, i), exact(at(x, i)), tolerance, "activation");
            near(at(grad_x, i), at(grad, i) * (exact(at(x, i) + 1e-5) - exact(at(x, i) - 1e-5)) / 2e-5, tolerance + 1e-5, "its slope");
        }
    }
    swiglu_forward({dtype, rows, F, x.data(), nullptr, gated.data(), 2, false, nullptr});
    swiglu_backward({dtype, rows, F, x.data(), grad.data(), grad_x.data(), 2, false, nullptr});
    for (int64_t i = 0; i < rows * F; ++i) {
        const int64_t gate = i / F * 2 * F + i % F, up = gate + F;
        const double s = 1 / (1 + std::exp(-at(x, gate))), silu = at(x, gate) * s;
        near(at(gated, i), silu * at(x, up), tolerance, "swiglu");
        near(at(grad_x, gate), at(grad, i) * at(x, up) * (s + silu * (1 - s)), tolerance, "gradient of the gate");
        near(at(grad_x, up), at(grad, i) * silu, tolerance, "gradient of up");
    }
}

template <typename T>
void all(DType dtype, double tolerance) {
    for (const bool centred : {false, true}) {
        for (const int64_t D : {1, 7, 64, 123}) norms<T>(dtype, 35, D, centred, tolerance);
        norms<T>(dtype, 0, 64, centred, tolerance);
        norms<T>(dtype, 2100, 1003, centred, tolerance);  // written around the caches in fp32
    }
    ropes<T, T>(dtype, dtype, 5, 3, 1, 10, tolerance);
    ropes<T, float>(dtype, DType::f32, 3, 2, 2, 72, tolerance);
    ropes<T, e4m3>(dtype, DType::e4m3, 3, 2, 2, 64, 0.07);
    for (const int64_t F : {1, 17, 64, 123}) activations<T>(dtype, 5, F, tolerance);
    activations<T>(dtype, 1500, 1501, tolerance);
}

}  // namespace

int main() {
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        all<float>(DType::f32, 2e-5);
        all<bf16>(DType::bf16, 0.02);
        all<f16>(DType::f16, 0.003);
        std::printf("%s ok\n", isa.c_str());
    }
    std::printf("bounds ok\n");
    return 0;
}
