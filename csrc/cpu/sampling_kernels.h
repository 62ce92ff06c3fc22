// The loops of sampling, compiled once per instruction set; the including file defines ISA to the set's name.
//
// A draw takes the argmax of z - log E, but few tokens need a logarithm. E >= u, and what a float's bits are as an integer bounds
// its logarithm from below, so each token's score has a bound that costs a conversion and a multiplication; only where it reaches
// the best score so far is the score computed, in scalar code that rounds the same everywhere. 32 tokens that are all 22.2 below the
// best score need no noise either.
//
// Top-k and top-p look for a threshold, by radix: buckets of a range of the floats' order are counted (or weighed), and the one that
// holds the border is gathered and takes the range's place until all of it is equal.
#pragma once

#include <math.h>

#include "cpu/philox.h"
#include "cpu/sampling.h"
#include "cpu/scratch.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kBlock = 1024;  // logits at a time, in L1
static_assert(kBlock % Philox::kWords == 0, "a block is whole groups");
constexpr float kMostNoise = 22.1808f;         // past -log of the smallest u, 2^-32
constexpr int64_t kBuckets = 1024, kWays = 4;  // ways: sums a bucket, so that neighbours of one bucket do not wait for each other
constexpr float kRange = 32.0f;                // below the largest logit, that buckets divide at first; the last one has the rest too

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// log E, as sampling.log_exponential: of the upper 31 bits of a word. log() of a float in double, rounded, is the float nearest to it
// but for one in millions.
static inline float uniform(int32_t word) {
    return (static_cast<float>(word) + 0.5f) * 0x1p-31f;
}
static inline float log_exponential(int32_t word) {
    const float u = uniform(word), below_one = 1.0f - 0x1p-24f;
    float e = u * (1.0f + u * (0.5f + u * (0.33333334f + u * 0.25f)));
    if (u >= 0.01f) e = -static_cast<float>(::log(static_cast<double>(1.0f - (u < below_one ? u : below_one))));
    return static_cast<float>(::log(static_cast<double>(e)));
}

// A lower bound of log_exponential: log2(1 + m) >= m, less what rounding may add.
static inline vec least_log(vec word) {
    const vec u = (word + splat(0.5f)) * splat(0x1p-31f);
    return bits(u) * splat(0.69314718f * 0x1p-23f) - splat(127.0f * 0.69314718f + 5e-5f);
}

// What is kept: z >= edge but for those equal to edge before token `first`, and z - high >= least.
struct Kept {
    float edge, high, least;
    int64_t first;
};

static inline bool keeps(const Kept& kept, float z, int64_t token) {
    return z >= kept.edge && !(z == kept.edge && token < kept.first) && z - kept.high >= kept.least;
}

static inline void consider(float z, int32_t word, int64_t token, Pick& best) {
    const Pick pick{z - log_exponential(word), token};
    if (beats(pick, best)) best = pick;
}

static inline void consider(float z, int64_t token, const Philox& noise, Pick& best) {
    int32_t words[4];
    noise.four(token / 4, words);
    consider(z, words[token % 4], token, best);
}

// Draws among n logits, whole groups, the first of which is token `begin`. best.score is finite already.
static inline void draw(const float* z, int64_t n, int64_t begin, const Kept& kept, const Philox& noise, Pick& best) {
    const vec edge = splat(kept.edge), high = splat(kept.high), least = splat(kept.least);
    vec bar = splat(best.score);
    for (int64_t i = 0; i < n; i += Philox::kWords) {
        const vec top = max(load(z + i), load(z + i + kWidth));
        if ((at_least(top + splat(kMostNoise), bar) & at_least(top, edge) & at_least(top - high, least)) == 0) continue;
        int32_t words[Philox::kWords];
        noise.words((begin + i) / 4, words);
        for (int64_t half = 0; half < Philox::kWords; half += kWidth) {
            const vec x = load(z + i + half);
            uint32_t lanes = at_least(x - least_log(load(words + half)), bar) & at_least(x, edge) & at_least(x - high, least);
            for (; lanes != 0; lanes &= lanes - 1) {
                const int64_t j = half + __builtin_ctz(lanes);
                if (keeps(kept, z[i + j], begin + i + j)) consider(z[i + j], words[j], begin + i + j, best);
            }
            bar = splat(best.score);
        }
    }
}

// The largest of n logits; NaN where there is one.
static inline float largest_of(const float* z, int64_t n) {
    vec top = splat(-INFINITY), other = top;
    uint32_t ordered = ~0u;
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
        const vec a = load(z + i), b = load(z + i + kWidth);
        top = max(top, a);
        other = max(other, b);
        ordered &= at_least(a, a) & at_least(b, b);
    }
    float high = largest(max(top, other));
    bool nan = static_cast<uint32_t>(ordered << (32 - kWidth)) != static_cast<uint32_t>(~0u << (32 - kWidth));
    for (; i < n; ++i) {
        high = z[i] > high ? z[i] : high;
        nan = nan || z[i] != z[i];
    }
    return nan ? NAN : high;
}

// The first (the last) place of `value` (or, where that is NaN, of a NaN), which is there.
static inline bool same(float a, float b) {
    return a == b || (a != a && b != b);
}
static inline int64_t first_of(const float* z, float value) {
    int64_t i = 0;
    while (!same(z[i], value)) ++i;
    return i;
}
static inline int64_t last_of(const float* z, int64_t n, float value) {
    int64_t i = n - 1;
    while (!same(z[i], value)) --i;
    return i;
}

static inline float penalised(const SamplingRow& row, float z, int32_t count) {
    if (count > 0) {
        z = z < 0 ? z * row.repetition : z / row.repetition;
        z = z - row.presence;
    }
    return z - row.frequency * static_cast<float>(count);
}

// z of n <= kBlock tokens, after penalties and temperature.
static inline void process(const SamplingTask& task, const SamplingRow& row, int64_t r, int64_t v, int64_t n, float* z) {
    std::memcpy(z, task.logits + r * task.stride + v, n * sizeof(float));
    if (task.counts != nullptr) {
        const int32_t* counts = task.counts + r * task.V + v;
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t end = smaller(i + 64, n);
            int32_t any = 0;
            for (int64_t j = i; j < end; ++j) any |= counts[j];
            for (int64_t j = any == 0 ? end : i; j < end; ++j) {
                if (counts[j] != 0) z[j] = penalised(row, z[j], counts[j]);
            }
        }
    }
    if (row.temperature > 0 && row.temperature != 1.0f) {
        const vec t = splat(row.temperature);
        each(n, [&](int64_t i, int64_t lanes) { store_some(z + i, load_some(z + i, lanes) / t, lanes); });
    }
}

// The floats' order; zeros are equal.
static inline uint32_t key_of(float z) {
    const uint32_t bits = bits_of(z + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Keys from `low` (and what is below) to `high`, which is the largest there is, 2^shift to a bucket.
struct Range {
    uint32_t low, high;
    int shift;

    Range(uint32_t low_, uint32_t high_) : low(low_), high(high_), shift(0) {
        while ((high - low) >> shift >= kBuckets) ++shift;
    }
    int32_t last() const { return static_cast<int32_t>((high - low) >> shift); }
    void buckets(const float* z, int64_t n, int32_t* bucket) const {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = key_of(z[i]);
            bucket[i] = static_cast<int32_t>((key < low ? 0 : key - low) >> shift);
        }
    }
};

struct Counts {
    int32_t of[kBuckets][kWays] = {};
    Counts(const Range& range, const float* z, int64_t n) {
        int32_t bucket[kBlock];
        for (int64_t v = 0; v < n; v += kBlock) {
            const int64_t m = smaller(kBlock, n - v);
            range.buckets(z + v, m, bucket);
            for (int64_t i = 0; i < m; ++i) ++of[bucket[i]][i % kWays];
        }
    }
    int64_t in(int32_t b) const { return int64_t{of[b][0]} + of[b][1] + of[b][2] + of[b][3]; }
};

// exp(z - high), what is less than 2e-38 as that: it weighs nothing, and numbers under 2^-126 cost more than the rest of the pass.
static inline vec weigh(vec z, float high) {
    return exp(max(z - splat(high), splat(-87.0f)));
}

// Weights summed in double.
struct Masses {
    double of[kBuckets][kWays] = {};
    Masses(const Range& range, const float* z, int64_t n, float high) {
        int32_t bucket[kBlock];
        float weight[kBlock];
        for (int64_t v = 0; v < n; v += kBlock) {
            const int64_t m = smaller(kBlock, n - v);
            range.buckets(z + v, m, bucket);
            each(m, [&](int64_t i, int64_t lanes) { store(weight + i, weigh(load_some(z + v + i, lanes), high)); });
            for (int64_t i = 0; i < m; ++i) of[bucket[i]][i % kWays] += static_cast<double>(weight[i]);
        }
    }
    double in(int32_t b) const { return (of[b][0] + of[b][1]) + (of[b][2] + of[b][3]); }
};

// The logits of a bucket, into `out`, which may be z. Returns their number.
static inline int64_t gather(const Range& range, int32_t wanted, const float* z, int64_t n, float* out) {
    int32_t bucket[kBlock];
    int64_t found = 0;
    for (int64_t v = 0; v < n; v += kBlock) {
        const int64_t m = smaller(kBlock, n - v);
        range.buckets(z + v, m, bucket);
        for (int64_t i = 0; i < m; ++i) {
            out[found] = z[v + i];
            found += bucket[i] == wanted;
        }
    }
    return found;
}

static inline Range range_of(const float* z, int64_t n) {
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t key = key_of(z[i]);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    return {low, high};
}

// The k-th largest of n logits. list: room for n.
static inline float kth_largest(const float* z, int64_t n, int64_t k, float high, float* list) {
    Range range(key_of(high - kRange), key_of(high));
    for (int64_t above = 0;;) {
        const Counts counts(range, z, n);
        int32_t b = range.last();
        for (; above + counts.in(b) < k; --b) above += counts.in(b);
        n = gather(range, b, z, n, list);
        z = list;
        range = range_of(z, n);
        if (range.low == range.high) return *z;
    }
}

// Top-p's border: dropped are the logits below `edge` and the first `ties` of those equal to it.
struct Border {
    float edge;
    int64_t ties;
};

// list: room for n; it may be z.
static inline Border nucleus(const float* z, int64_t n, float excess, float high, float* list) {
    Range range(key_of(high - kRange), key_of(high));
    double below = 0, limit = -1;
    for (;;) {
        const Masses masses(range, z, n, high);
        if (limit < 0) {
            limit = 0;
            for (int32_t b = 0; b <= range.last(); ++b) limit += masses.in(b);
            limit *= static_cast<double>(excess);
        }
        int32_t b = 0;
        for (; b < range.last() && below + masses.in(b) <= limit; ++b) below += masses.in(b);
        n = gather(range, b, z, n, list);
        z = list;
        range = range_of(z, n);
        if (range.low == range.high) break;
    }
    float weight[kWidth];
    store(weight, weigh(splat(*z), high));
    const double fit = (limit - below) / static_cast<double>(weight[0]);
    const int64_t most = *z == high ? n - 1 : n;
    return {*z, fit >= static_cast<double>(most) ? most : static_cast<int64_t>(fit)};
}

static inline int64_t room_of(int64_t V) {
    return (V + kBlock - 1) / kBlock * kBlock;
}

// z: room for two rows.
static inline void draw_filtered(const SamplingTask& task, const SamplingRow& row, int64_t r, const Philox& noise, float* z, Pick& best) {
    const int64_t V = task.V, room = room_of(V);
    float* list = z + room;
    float high = -INFINITY;
    for (int64_t v = 0; v < V; v += kBlock) {
        const int64_t n = smaller(kBlock, V - v);
        process(task, row, r, v, n, z + v);
        const float block = largest_of(z + v, n);
        high = block > high || block != block || high != high ? (high != high ? high : block) : high;
    }
    for (int64_t v = V; v < room; ++v) z[v] = -INFINITY;
    Kept kept{-INFINITY, high, -INFINITY, 0};
    if (fabsf(high) < INFINITY) {
        const float* from = z;
        int64_t n = V;
        if (row.top_k < V) kept.edge = kth_largest(z, V, row.top_k, high, list);
        if (row.excess > 0) {
            if (row.top_k < V) {
                n = 0;
                for (int64_t v = 0; v < V; ++v) {
                    list[n] = z[v];
                    n += z[v] >= kept.edge;
                }
                from = list;
            }
            const Border border = nucleus(from, n, row.excess, high, list);
            kept.edge = border.edge;
            if (border.ties > 0) {
                for (int64_t left = border.ties; left > 0; ++kept.first) left -= z[kept.first] == border.edge;
            }
        }
        if (row.min_p > 0) {
            const double log_p = ::log(static_cast<double>(row.min_p));
            kept.least = static_cast<float>(log_p);
            if (static_cast<double>(kept.least) < log_p) kept.least = nextafterf(kept.least, INFINITY);
        }
        const int64_t top = last_of(z, V, high);  // the last is kept wherever one is
        if (keeps(kept, high, top)) {
            consider(high, top, noise, best);
            draw(z, room, 0, kept, noise, best);
        }
    } else if (high != -INFINITY) {
        best = {high, first_of(z, high)};
    }
    if (task.kept != nullptr) {
        for (int64_t v = 0; v < V; ++v) task.kept[r * V + v] = high == high && keeps(kept, z[v], v) ? z[v] : -INFINITY;
    }
}

static inline void draw_all(const SamplingTask& task, const SamplingRow& row, int64_t r, int64_t begin, int64_t end, const Philox& noise,
                            Pick& best) {
    float z[kBlock], high = -INFINITY;
    const Kept everything{-INFINITY, 0.0f, -INFINITY, 0};
    for (int64_t v = begin; v < end; v += kBlock) {
        const int64_t n = smaller(kBlock, end - v);
        process(task, row, r, v, n, z);
        const float block = largest_of(z, n);
        if (block != block) {
            best = {block, v + first_of(z, block)};
            return;
        }
        if (!(block + kMostNoise >= best.score) || block == -INFINITY) continue;
        if (block > high) {
            const int64_t top = first_of(z, block);
            consider(block, v + top, noise, best);
            high = block;
        }
        for (int64_t i = n; i % Philox::kWords != 0; ++i) z[i] = -INFINITY;
        draw(z, (n + Philox::kWords - 1) / Philox::kWords * Philox::kWords, v, everything, noise, best);
    }
}

// The largest of a block: beats what was before, or is not looked for.
static inline bool take_largest(const float* z, int64_t n, int64_t v, Pick& best) {
    const float block = largest_of(z, n);
    if (block > best.score || block != block) best = {block, v + first_of(z, block)};
    return block == block;
}

static inline int64_t part_begin(int64_t V, int64_t part, int64_t parts) {
    const int64_t blocks = (V + kBlock - 1) / kBlock;
    return smaller(blocks * part / parts * kBlock, V);
}

}  // namespace ISA

void LLAVA_FAST_JOIN(sampling_, ISA)(const SamplingTask& task, const SamplingRow* rows, int64_t parts, Pick* picks) {
    using namespace ISA;
    bool filtered = false;
    for (int64_t r = 0; r < task.S; ++r) filtered = filtered || filters(rows[r], task.V);
    const Scratch scratch(task.threads, filtered ? 2 * room_of(task.V) : 0);
#pragma omp parallel for schedule(dynamic) num_threads(task.threads) if (task.threads > 1)
    for (int64_t i = 0; i < task.S * parts; ++i) {
        const int64_t r = i / parts, begin = part_begin(task.V, i % parts, parts), end = part_begin(task.V, i % parts + 1, parts);
        const SamplingRow& row = rows[r];
        Pick best{-INFINITY, begin};
        if (row.temperature <= 0) {
            float z[kBlock];
            for (int64_t v = begin; v < end; v += kBlock) {
                const int64_t n = smaller(kBlock, end - v);
                process(task, row, r, v, n, z);
                if (!take_largest(z, n, v, best)) break;
            }
        } else if (!filters(row, task.V)) {
            draw_all(task, row, r, begin, end, Philox(row.seed, row.step), best);
        } else if (i % parts == 0) {
            draw_filtered(task, row, r, Philox(row.seed, row.step), scratch.mine(), best);
        }
        picks[i] = best;
    }
}

void LLAVA_FAST_JOIN(argmax_, ISA)(const SamplingTask& task, int64_t parts, Pick* picks) {
    using namespace ISA;
#pragma omp parallel for schedule(static) num_threads(task.threads) if (task.threads > 1)
    for (int64_t i = 0; i < task.S * parts; ++i) {
        const int64_t r = i / parts, end = part_begin(task.V, i % parts + 1, parts);
        int64_t v = part_begin(task.V, i % parts, parts);
        Pick best{-INFINITY, v};
        for (; v < end; v += kBlock) {
            if (!take_largest(task.logits + r * task.stride + v, smaller(kBlock, end - v), v, best)) break;
        }
        picks[i] = best;
    }
}

}  // namespace llava_fast
