// Draws rows of odd lengths in every instruction set, on buffers of exactly the right size, and holds the tokens and the kept logits
// against plain loops that sort. Built with -fsanitize=address,undefined by tests/test_build.py.
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

using namespace llava_fast;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

uint32_t word(uint64_t seed, uint64_t step, int64_t token) {
    uint32_t c[4] = {static_cast<uint32_t>(token / 4), 0, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
    }
    return c[token % 4];
}

std::vector<float> warped(std::vector<float> z, int64_t k, double p, double m) {
    const int64_t V = static_cast<int64_t>(z.size());
    if (k > 0 && k < V) {
        std::vector<float> sorted = z;
        std::sort(sorted.begin(), sorted.end(), std::greater<float>());
        for (float& x : z) x = x < sorted[k - 1] ? -kInfinity : x;
    }
    const double high = static_cast<double>(*std::max_element(z.begin(), z.end()));
    if (p < 1) {
        std::vector<int64_t> order(V);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] < z[b]; });
        double total = 0, passed = 0;
        for (int64_t v : order) total += std::exp(static_cast<double>(z[v]) - high);
        std::vector<float> kept = z;
        for (int64_t i = 0; i + 1 < V; ++i) {
            passed += std::exp(static_cast<double>(z[order[i]]) - high);
            if (passed <= static_cast<double>(static_cast<float>(1 - p)) * total) kept[order[i]] = -kInfinity;
        }
        z = kept;
    }
    for (float& x : z) x = m > 0 && std::exp(static_cast<double>(x) - high) < m ? -kInfinity : x;
    return z;
}

void run(int64_t S, int64_t V, int threads) {
    const int64_t stride = V + 3;
    // Eighths: many ties. Written so that the rows end where the buffer does.
    std::vector<float> logits(S > 0 ? (S - 1) * stride + V : 0), temperature(S), min_p(S), repetition(S, 1.5f), presence(S, 0.25f);
    std::vector<float> frequency(S, 0.125f), kept(S * V, 7.0f);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>((i * 7919) % 61) / 8.0f - 3.0f;
    std::vector<int64_t> seeds(S), steps(S), tokens(S, -1);
    std::vector<int32_t> top_k(S), counts(S * V);
    std::vector<double> top_p(S);
    for (int64_t i = 0; i < S * V; ++i) counts[i] = i % 71 == 0 ? static_cast<int32_t>(i % 3) : 0;
    for (int64_t r = 0; r < S; ++r) {
        temperature[r] = static_cast<float>(r % 4) * 0.5f;
        seeds[r] = r * 0x123456789 - 5, steps[r] = r << 33;
        top_k[r] = static_cast<int32_t>(r % 3 * 9), top_p[r] = r % 2 == 0 ? 0.83 : 1.0, min_p[r] = r % 5 == 0 ? 0.03f : 0.0f;
    }
    for (bool filters : {false, true}) {
        SamplingTask task{};
        task.S = S, task.V = V, task.stride = stride, task.logits = logits.data(), task.tokens = tokens.data(), task.threads = threads;
        task.temperature = temperature.data(), task.seeds = seeds.data(), task.steps = steps.data();
        task.repetition = repetition.data(), task.presence = presence.data(), task.frequency = frequency.data();
        task.counts = counts.data();
        if (filters) {
            task.top_k = top_k.data(), task.top_k_int32 = true, task.top_p = top_p.data(), task.top_p_dtype = DType::f64;
            task.min_p = min_p.data(), task.kept = kept.data();
        }
        sampling(task);
        for (int64_t r = 0; r < S; ++r) {
            std::vector<float> z(logits.begin() + r * stride, logits.begin() + r * stride + V);
            for (int64_t v = 0; v < V; ++v) {
                const int32_t count = counts[r * V + v];
                if (count > 0) z[v] = (z[v] < 0 ? z[v] * 1.5f : z[v] / 1.5f) - 0.25f;
                z[v] -= 0.125f * static_cast<float>(count);
            }
            int64_t expected = std::max_element(z.begin(), z.end()) - z.begin();
            if (temperature[r] > 0) {
                for (float& x : z) x /= temperature[r];
                if (filters) z = warped(z, top_k[r], top_p[r], static_cast<double>(min_p[r]));
                double best = -HUGE_VAL;
                for (int64_t v = 0; v < V; ++v) {
                    const double u = (static_cast<double>(word(seeds[r], steps[r], v) >> 1) + 0.5) / 2147483648.0;
                    const double score = static_cast<double>(z[v]) - std::log(-std::log1p(-u));
                    if (score > best) best = score, expected = v;
                }
                if (filters && kept[r * V] != 7.0f) {
                    require(std::equal(z.begin(), z.end(), kept.begin() + r * V), "kept logits of row " + std::to_string(r));
                }
            }
            require(tokens[r] == expected, "token of row " + std::to_string(r) + " of " + std::to_string(V) + " is " +
                                               std::to_string(tokens[r]) + ", expected " + std::to_string(expected));
        }
        argmax(task);
        for (int64_t r = 0; r < S; ++r) {
            const float* row = logits.data() + r * stride;
            require(tokens[r] == std::max_element(row, row + V) - row, "argmax of row " + std::to_string(r));
        }
    }
}

}  // namespace

int main() {
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (int64_t V : {1, 3, 8, 31, 33, 1024, 1031, 40000}) {
            for (int64_t S : {0, 1, 11}) {
                for (int threads : {1, 3}) run(S, V, threads);
            }
        }
        std::printf("%s ok\n", isa.c_str());
    }
    SamplingTask task{};
    task.S = 1;
    try {
        argmax(task);
    } catch (const std::invalid_argument&) {
        std::printf("bounds ok\n");
        return 0;
    }
    return 1;
}
