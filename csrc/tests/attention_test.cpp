// Runs attention over odd shapes in every type and instruction set, on buffers of exactly the right size, and holds it against plain
// loops in double. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/attention.h"

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
    uint32_t state = static_cast<uint32_t>(seed);
    for (int64_t i = 0; i < n; ++i) {  // without a period: the largest score is to be anywhere
        state = state * 1664525u + 1013904223u;
        narrow(static_cast<float>(static_cast<int32_t>(state >> 16) % 61 - 30) / 16.0f, &out[i]);
    }
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

struct Shape {
    int64_t H, G, d;
    bool causal;
    std::vector<int32_t> cu_q, cu_k, used, prefix;  // the last two may be empty
};

template <typename T>
Rows rows(std::vector<T>& x, DType type, int64_t heads, int64_t d) {
    return {x.data(), type, heads * d, d};
}

// The rows of k that query row i of sequence s sees.
std::vector<int64_t> seen_by(const Shape& shape, size_t s, int64_t i) {
    std::vector<int64_t> seen;
    if (!shape.prefix.empty()) {
        for (int64_t j = shape.prefix[2 * s]; j < shape.prefix[2 * s + 1]; ++j) seen.push_back(j);
    }
    const int64_t n = shape.cu_q[s + 1] - shape.cu_q[s];
    const int64_t own = shape.used.empty() ? shape.cu_k[s + 1] - shape.cu_k[s] : shape.used[s];
    for (int64_t j = 0; j < own; ++j) {
        if (!shape.causal || j <= own - n + i) seen.push_back(shape.cu_k[s] + j);
    }
    return seen;
}

template <typename T>
void varlen(DType type, const Shape& shape, double tolerance) {
    const int64_t H = shape.H, G = shape.G, d = shape.d, R = H / G, S = static_cast<int64_t>(shape.cu_q.size()) - 1;
    const int64_t T_ = shape.cu_q.back(), K = shape.used.empty() ? shape.cu_k.back() : shape.cu_k.back() + 3;
    auto q = values<T>(T_ * H * d, 1), k = values<T>(K * G * d, 2), v = values<T>(K * G * d, 3), grad = values<T>(T_ * H * d, 4);
    std::vector<T> out(q.size()), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
    std::vector<float> lse(static_cast<size_t>(T_ * H));
    AttentionTask task{};
    task.T = T_, task.K = K, task.S = S, task.H = H, task.G = G, task.d = d, task.causal = shape.causal, task.scale = 0.3f;
    task.q = rows(q, type, H, d), task.k = rows(k, type, G, d), task.v = rows(v, type, G, d), task.out = rows(out, type, H, d);
    task.lse = lse.data(), task.threads = 2;
    const AttentionIndex index{shape.cu_q.data(),
                               shape.cu_k.data(),
                               shape.used.empty() ? nullptr : shape.used.data(),
                               shape.prefix.empty() ? nullptr : shape.prefix.data(),
                               nullptr,
                               0,
                               0};
    attention_forward(task, index);
    task.grad_out = rows(grad, type, H, d), task.grad_q = rows(grad_q, type, H, d);
    task.grad_k = rows(grad_k, type, G, d), task.grad_v = rows(grad_v, type, G, d);
    attention_backward(task, index);

    std::vector<double> dk(k.size()), dv(v.size());
    for (size_t s = 0; s < static_cast<size_t>(S); ++s) {
        for (int64_t t = shape.cu_q[s]; t < shape.cu_q[s + 1]; ++t) {
            const std::vector<int64_t> seen = seen_by(shape, s, t - shape.cu_q[s]);
            for (int64_t h = 0; h < H; ++h) {
                const int64_t row = (t * H + h) * d;
                std::vector<double> p, exact(static_cast<size_t>(d)), dq(static_cast<size_t>(d));
                double total = 0, delta = 0;
                for (const int64_t j : seen) {
                    double score = 0;
                    for (int64_t c = 0; c < d; ++c) score += 0.3 * at(q, row + c) * at(k, (j * G + h / R) * d + c);
                    p.push_back(std::exp(score));
                    total += p.back();
                }
                for (size_t i = 0; i < seen.size(); ++i) {
                    p[i] /= total;
                    for (int64_t c = 0; c < d; ++c) exact[c] += p[i] * at(v, (seen[i] * G + h / R) * d + c);
                }
                for (int64_t c = 0; c < d; ++c) {
                    near(at(out, row + c), exact[c], tolerance, "out");
                    delta += exact[c] * at(grad, row + c);
                }
                if (seen.empty() != std::isinf(lse[t * H + h])) throw std::runtime_error("lse of a row that sees nothing");
                if (!seen.empty()) near(lse[t * H + h], std::log(total), tolerance, "lse");
                for (size_t i = 0; i < seen.size(); ++i) {
                    const int64_t key = (seen[i] * G + h / R) * d;
                    double slope = -delta;
                    for (int64_t c = 0; c < d; ++c) slope += at(grad, row + c) * at(v, key + c);
                    for (int64_t c = 0; c < d; ++c) {
                        dq[c] += 0.3 * p[i] * slope * at(k, key + c);
                        dk[key + c] += 0.3 * p[i] * slope * at(q, row + c);
                        dv[key + c] += p[i] * at(grad, row + c);
                    }
                }
                for (int64_t c = 0; c < d; ++c) near(at(grad_q, row + c), dq[c], 10 * tolerance, "grad_q");
            }
        }
    }
    for (size_t i = 0; i < dk.size(); ++i) {
        near(at(grad_k, static_cast<int64_t>(i)), dk[i], 10 * tolerance, "grad_k");
        near(at(grad_v, static_cast<int64_t>(i)), dv[i], 10 * tolerance, "grad_v");
    }
}

// Pages of 16 rows in reverse order; the last `left` pages belong to nobody.
template <typename T, typename C>
void paged(DType type, DType stored, int64_t H, int64_t G, int64_t d, std::vector<int32_t> n_q, std::vector<int32_t> n_k,
           double tolerance) {
    constexpr int64_t kPage = 16;
    const int64_t S = static_cast<int64_t>(n_q.size()), R = H / G, blocks = 8, B = S * blocks;
    std::vector<int32_t> cu{0}, table(static_cast<size_t>(B));
    for (const int32_t n : n_q) cu.push_back(cu.back() + n);
    for (int64_t i = 0; i < B; ++i) table[i] = i % blocks * kPage < n_k[i / blocks] ? static_cast<int32_t>(B - 1 - i) : -7;  // unread
    auto q = values<T>(cu.back() * H * d, 1);
    auto k = values<C>(B * kPage * G * d, 2), v = values<C>(B * kPage * G * d, 3);
    const std::vector<float> k_scale(static_cast<size_t>(G), 0.5f), v_scale(static_cast<size_t>(G), 2.0f);
    std::vector<T> out(q.size());
    AttentionTask task{};
    task.T = cu.back(), task.K = B * kPage, task.S = S, task.H = H, task.G = G, task.d = d, task.causal = true, task.scale = 0.3f;
    task.q = rows(q, type, H, d), task.k = rows(k, stored, G, d), task.v = rows(v, stored, G, d), task.out = rows(out, type, H, d);
    task.k.page = task.v.page = kPage * G * d, task.block = kPage, task.threads = 2;
    task.k_scale = k_scale.data(), task.v_scale = v_scale.data();
    const AttentionIndex index{cu.data(), nullptr, n_k.data(), nullptr, table.data(), blocks, B};
    attention_forward(task, index);
    for (int64_t s = 0; s < S; ++s) {
        for (int64_t i = 0; i < n_q[s]; ++i) {
            for (int64_t h = 0; h < H; ++h) {
                const int64_t row = ((cu[s] + i) * H + h) * d;
                std::vector<double> sum(static_cast<size_t>(d));
                double total = 0;
                for (int64_t j = 0; j <= n_k[s] - n_q[s] + i; ++j) {
                    const int64_t key = ((table[s * blocks + j / kPage] * kPage + j % kPage) * G + h / R) * d;
                    double score = 0;
                    for (int64_t c = 0; c < d; ++c) score += 0.3 * 0.5 * at(q, row + c) * at(k, key + c);
                    total += std::exp(score);
                    for (int64_t c = 0; c < d; ++c) sum[c] += std::exp(score) * 2 * at(v, key + c);
                }
                for (int64_t c = 0; c < d; ++c) near(at(out, row + c), sum[c] / total, tolerance, "paged");
            }
        }
    }
    table[0] = static_cast<int32_t>(B);
    try {
        attention_forward(task, index);
    } catch (const std::invalid_argument&) {
        return;
    }
    throw std::runtime_error("a block outside the cache was taken");
}

template <typename T>
void all(DType type, double tolerance) {
    for (const bool causal : {true, false}) {
        varlen<T>(type, {3, 3, 7, causal, {0, 5, 5, 6}, {0, 5, 9, 10}, {}, {}}, tolerance);
        varlen<T>(type, {4, 2, 72, causal, {0, 70, 71, 71}, {0, 70, 141, 141}, {}, {}}, tolerance);
        varlen<T>(type, {2, 1, 33, causal, {0, 40, 43}, {0, 30, 230}, {}, {}}, tolerance);  // more queries than keys; few lanes
        varlen<T>(type, {7, 1, 16, causal, {0, 1, 10, 11}, {0, 100, 130, 131}, {90, 20, 0}, {}}, tolerance);
        varlen<T>(type, {2, 2, 64, causal, {0, 9, 29, 31}, {0, 90, 110, 112}, {}, {0, 0, 0, 90, 7, 100}}, tolerance);
        varlen<T>(type, {1, 1, 256, causal, {0, 3}, {0, 3}, {}, {}}, tolerance);
        varlen<T>(type, {2, 1, 8, causal, {0, 0}, {0, 5}, {}, {}}, tolerance);
        varlen<T>(type, {2, 1, 8, causal, {0}, {0}, {}, {}}, tolerance);
    }
    for (const int64_t d : {5, 64, 72}) {
        paged<T, T>(type, type, 4, 2, d, {1, 0, 1, 1}, {100, 3, 1, 16}, tolerance);
        paged<T, e4m3>(type, DType::e4m3, 3, 1, d, {1, 20}, {128, 33}, tolerance);
        paged<T, bf16>(type, DType::bf16, 2, 2, d, {30, 2}, {77, 2}, tolerance);
    }
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
