// Runs the linear op over odd shapes in every weight type and instruction set, on buffers of exactly the right size, and holds it
// against a plain loop in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/linear.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

using namespace llava_fast;

namespace {

struct Shape {
    int64_t M, I, O, group;
};

// Whole numbers of -7 to 7: every weight type holds them exactly.
int number_at(int64_t i) {
    return static_cast<int>((i * 7919) % 15) - 7;
}

void store(double value, float* to) {
    *to = static_cast<float>(value);
}
void store(double value, bf16* to) {
    narrow(static_cast<float>(value), to);
}
void store(double value, f16* to) {
    narrow(static_cast<float>(value), to);
}
void store(double value, int8_t* to) {
    *to = static_cast<int8_t>(value);
}

template <typename X, typename W>
void run(const Shape& s, DType dtype, WeightType type, double tolerance) {
    const bool quantised = type == WeightType::int8 || type == WeightType::int4;
    const int64_t groups = (s.I + s.group - 1) / s.group, stride = s.I + 3;
    std::vector<X> x((s.M - 1) * stride + s.I), residual(s.M * s.O), out((s.M + 2) * s.O), pre(s.M * s.O);
    std::vector<W> weight(type == WeightType::int4 ? s.O * s.I / 2 : s.O * s.I);
    std::vector<float> scale(s.O * groups), bias(s.O);
    std::vector<int64_t> rows(s.M);
    for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) store(number_at(i * 3) / 8.0, &x[i]);
    for (int64_t i = 0; i < s.M * s.O; ++i) store(number_at(i * 5) / 4.0, &residual[i]);
    for (int64_t i = 0; i < s.O * groups; ++i) scale[i] = 1.0f / static_cast<float>(1 << (i % 3));
    for (int64_t i = 0; i < s.O; ++i) bias[i] = static_cast<float>(number_at(i)) / 2.0f;
    for (int64_t m = 0; m < s.M; ++m) rows[m] = s.M + 1 - m;
    for (int64_t i = 0; i < s.O * s.I; i += type == WeightType::int4 ? 2 : 1) {
        if (type == WeightType::int4) {
            store(static_cast<int8_t>((number_at(i) + 8) | ((number_at(i + 1) + 8) << 4)), &weight[i / 2]);
        } else {
            store(number_at(i), &weight[i]);
        }
    }
    LinearTask task{};
    task.dtype = dtype;
    task.weight_type = type;
    task.M = s.M;
    task.I = s.I;
    task.O = s.O;
    task.x = x.data();
    task.x_stride = stride;
    task.weight = weight.data();
    task.scale = quantised ? scale.data() : nullptr;
    task.group = s.group;
    task.residual = residual.data();
    task.residual_stride = s.O;
    task.out = out.data();
    task.out_stride = s.O;
    task.rows = rows.data();
    task.pre = pre.data();
    task.threads = 2;
    linear(task, bias.data(), DType::f32, s.M + 2);
    for (int64_t m = 0; m < s.M; ++m) {
        for (int64_t o = 0; o < s.O; ++o) {
            double sum = bias[o];
            for (int64_t i = 0; i < s.I; ++i) {
                const double w = number_at(o * s.I + i) * (quantised ? static_cast<double>(scale[o * groups + i / s.group]) : 1.0);
                sum += w * static_cast<double>(widen(x[m * stride + i]));
            }
            const double expected = sum + static_cast<double>(widen(residual[m * s.O + o]));
            const double error = std::fabs(static_cast<double>(widen(out[rows[m] * s.O + o])) - expected);
            const double before = std::fabs(static_cast<double>(widen(pre[m * s.O + o])) - sum);
            if (std::fmax(error, before) > tolerance * (1.0 + std::fabs(expected) + std::fabs(sum))) {
                throw std::runtime_error("off by " + std::to_string(std::fmax(error, before)));
            }
        }
    }
}

}  // namespace

int main() {
    const Shape shapes[] = {{1, 2, 1, 2},      {1, 96, 37, 32}, {3, 588, 130, 64},  {8, 34, 7, 34},  {16, 70, 65, 32},
                            {17, 588, 33, 64}, {31, 34, 5, 34}, {20, 800, 100, 32}, {60, 64, 3, 64}, {100, 2400, 35, 32}};
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (const Shape& s : shapes) {
            run<float, float>(s, DType::f32, WeightType::f32, 1e-5);
            run<float, bf16>(s, DType::f32, WeightType::bf16, 1e-5);
            run<float, f16>(s, DType::f32, WeightType::f16, 1e-5);
            run<float, int8_t>(s, DType::f32, WeightType::int8, 1e-5);
            run<float, int8_t>(s, DType::f32, WeightType::int4, 1e-5);
            run<bf16, bf16>(s, DType::bf16, WeightType::bf16, 0.01);
            run<f16, int8_t>(s, DType::f16, WeightType::int4, 0.002);
        }
        std::printf("%s ok\n", isa.c_str());
    }
    const int64_t outside[] = {0, 3};
    const float x[2] = {}, weight[1] = {};
    float out[3];
    LinearTask task{};
    task.M = 2;
    task.I = task.O = task.x_stride = task.out_stride = task.group = task.threads = 1;
    task.x = x;
    task.weight = weight;
    task.out = out;
    task.rows = outside;
    try {
        linear(task, nullptr, DType::f32, 3);
    } catch (const std::invalid_argument&) {
        std::printf("bounds ok\n");
        return 0;
    }
    return 1;
}
