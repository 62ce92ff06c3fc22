// Runs the CPU kernels over odd shapes in every type, mode and instruction set, on buffers of exactly the right size, and holds
// them against a plain loop in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/spatial_pool.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

using namespace llava_fast;

namespace {

struct Case {
    PoolMode mode;
    PoolShape shape;
};

// Small multiples of 1/8: every type holds them exactly.
double value_at(int64_t i) {
    return static_cast<double>((i * 7919) % 61 - 30) / 8.0;
}

double place_weight(PoolMode mode, int64_t inputs, int64_t outputs, int64_t o, int64_t cell) {
    if (mode != PoolMode::bilinear) return cell / (inputs / outputs) == o ? 1.0 : 0.0;
    const double place = std::fmax((static_cast<double>(o) + 0.5) * static_cast<double>(inputs) / static_cast<double>(outputs) - 0.5, 0.0);
    const double clamped = std::fmin(place, static_cast<double>(inputs - 1));
    return std::fmax(0.0, 1.0 - std::fabs(clamped - static_cast<double>(cell)));
}

double expected(const Case& c, const std::vector<int64_t>& source, int64_t r, int64_t d) {
    const PoolShape& s = c.shape;
    const int64_t k = r / (s.out_H * s.out_W), oy = r / s.out_W % s.out_H, ox = r % s.out_W;
    double sum = 0, weights = 0, best = -INFINITY;
    for (int64_t y = 0; y < s.H; ++y) {
        for (int64_t x = 0; x < s.W; ++x) {
            const double w = place_weight(c.mode, s.H, s.out_H, oy, y) * place_weight(c.mode, s.W, s.out_W, ox, x);
            const double v = value_at(source[(k * s.H + y) * s.W + x] * s.D + d);
            sum += w * v;
            weights += w;
            if (w > 0) best = std::fmax(best, v);
        }
    }
    return c.mode == PoolMode::max ? best : sum / weights;
}

void require(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

template <typename T, typename A>
void run(const Case& c, DType dtype, double tolerance) {
    const PoolShape& s = c.shape;
    const int64_t rows = s.K * s.out_H * s.out_W, cells = s.K * s.H * s.W;
    std::vector<int64_t> source(cells);
    for (int64_t i = 0; i < cells; ++i) source[i] = (i * 31 + 3) % s.M;  // rows repeat where M is smaller than the cells
    std::vector<T> table(s.M * s.D), out(rows * s.D), grad(rows * s.D), grad_table(s.M * s.D);
    for (int64_t i = 0; i < s.M * s.D; ++i) narrow(static_cast<A>(value_at(i)), &table[i]);
    for (T& g : grad) narrow(A(1), &g);

    spatial_pool_forward(dtype, c.mode, s, table.data(), source.data(), out.data(), 2);
    for (int64_t i = 0; i < rows * s.D; ++i) {
        const double error = std::fabs(static_cast<double>(widen(out[i])) - expected(c, source, i / s.D, i % s.D));
        require(error <= tolerance, "forward is off by " + std::to_string(error));
    }
    // Each output hands back weights that sum to one, so ones hand back as many as there are outputs.
    spatial_pool_backward(dtype, c.mode, s, grad.data(), table.data(), source.data(), grad_table.data(), 2);
    double total = 0;
    for (const T& g : grad_table) total += static_cast<double>(widen(g));
    require(std::fabs(total - static_cast<double>(rows * s.D)) <= tolerance * static_cast<double>(rows * s.D), "backward loses gradient");
}

}  // namespace

int main() {
    const Case cases[] = {
        {PoolMode::average, {200, 5, 1, 13, 11, 6, 5}}, {PoolMode::average, {7, 300, 2, 4, 4, 2, 2}},
        {PoolMode::max, {200, 5, 1, 13, 11, 6, 5}},     {PoolMode::max, {7, 300, 2, 4, 4, 2, 2}},
        {PoolMode::max, {1, 1, 1, 1, 1, 1, 1}},         {PoolMode::bilinear, {90, 17, 2, 9, 5, 4, 7}},
        {PoolMode::bilinear, {3, 513, 1, 1, 3, 5, 2}},  {PoolMode::average, {4, 8, 0, 3, 3, 1, 1}},
    };
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (const Case& c : cases) {
            run<float, float>(c, DType::f32, 1e-5);
            run<double, double>(c, DType::f64, 1e-12);
            run<bf16, float>(c, DType::bf16, 0.02);
            run<f16, float>(c, DType::f16, 0.003);
        }
        std::printf("%s ok\n", isa.c_str());
    }
    const int64_t outside[] = {0, 1, 2, 4};
    const float table[4] = {};
    float out[1];
    try {
        spatial_pool_forward(DType::f32, PoolMode::average, {4, 1, 1, 2, 2, 1, 1}, table, outside, out, 1);
    } catch (const std::invalid_argument&) {
        std::printf("bounds ok\n");
        return 0;
    }
    return 1;
}
