#include "cpu/activation_curve.h"

#include <cmath>

namespace llava_fast {

namespace {

constexpr double kPi = 3.14159265358979323846;

// Less the half, for x >= 0.
double exact(Activation kind, bool slope, double x) {
    if (kind == Activation::gelu) {
        return 0.5 * std::erf(x / std::sqrt(2.0)) + (slope ? x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * kPi) : 0.0);
    }
    double u = x, du = 1.0;  // of x sigmoid(u)
    if (kind == Activation::gelu_pytorch_tanh) {
        const double k = 2.0 * std::sqrt(2.0 / kPi);
        u = k * (x + 0.044715 * x * x * x), du = k * (1.0 + 3.0 * 0.044715 * x * x);
    } else if (kind == Activation::quick_gelu) {
        u = 1.702 * x, du = 1.702;
    }
    const double t = 0.5 * std::tanh(0.5 * u);
    return t + (slope ? x * (0.25 - t * t) * du : 0.0);
}

// Through the four Chebyshev nodes of each interval.
Curve make(Activation kind, bool slope) {
    const double end = kind == Activation::silu ? 16.5 : kind == Activation::quick_gelu ? 9.7 : 5.5;
    Curve curve{};
    curve.step = static_cast<float>(end / (kIntervals - 1));
    const double half = 0.5 * curve.step;
    for (int n = 0; n + 1 < kIntervals; ++n) {
        double c[4] = {};
        for (int k = 0; k < 4; ++k) {
            const double angle = kPi * (k + 0.5) / 4;
            const double value = exact(kind, slope, n * static_cast<double>(curve.step) + half * std::cos(angle));
            for (int j = 0; j < 4; ++j) c[j] += value * std::cos(j * angle) * (j == 0 ? 0.25 : 0.5);
        }
        curve.coefficient[0][n] = static_cast<float>(c[0] - c[2]);
        curve.coefficient[1][n] = static_cast<float>((c[1] - 3 * c[3]) / half);
        curve.coefficient[2][n] = static_cast<float>(2 * c[2] / (half * half));
        curve.coefficient[3][n] = static_cast<float>(4 * c[3] / (half * half * half));
    }
    curve.coefficient[0][kIntervals - 1] = 0.5f;
    return curve;
}

struct Curves {
    Curve of[4][2];
    Curves() {
        for (int kind = 0; kind < 4; ++kind) {
            for (int slope = 0; slope < 2; ++slope) of[kind][slope] = make(static_cast<Activation>(kind), slope == 1);
        }
    }
};

}  // namespace

const Curve& activation_curve(Activation kind, bool slope) {
    static const Curves curves;
    return curves.of[static_cast<int>(kind)][slope];
}

}  // namespace llava_fast
