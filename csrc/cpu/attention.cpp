// Checks of lengths and ranges, the list of pieces, and the choice of instruction set.
#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace llava_fast {

namespace {

void require(bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument(what);
}

void check_bounds(const char* name, const int32_t* bounds, int64_t S, int64_t rows, bool whole) {
    for (int64_t s = 0; s < S; ++s) {
        if (bounds[s + 1] < bounds[s]) {
            require(false, std::string(name) + " must not decrease, got " + std::to_string(bounds[s]) + " before " +
                               std::to_string(bounds[s + 1]));
        }
    }
    const bool fits = bounds[0] >= 0 && bounds[S] <= rows && (!whole || (bounds[0] == 0 && bounds[S] == rows));
    if (!fits) {
        require(false, std::string(name) + " must go from 0 to the number of rows, " + std::to_string(rows) + ", got " +
                           std::to_string(bounds[0]) + " to " + std::to_string(bounds[S]));
    }
}

std::vector<Sequence> make_sequences(const AttentionTask& task, const AttentionIndex& index) {
    check_bounds("cu_seqlens_q", index.cu_q, task.S, task.T, true);
    if (index.block_table == nullptr) check_bounds("cu_seqlens_k", index.cu_k, task.S, task.K, index.used == nullptr);
    std::vector<Sequence> sequences(task.S);
    for (int64_t s = 0; s < task.S; ++s) {
        Sequence& seq = sequences[s];
        seq.q_start = index.cu_q[s];
        seq.n_q = index.cu_q[s + 1] - index.cu_q[s];
        if (index.prefix != nullptr) {
            const int64_t first = index.prefix[2 * s], last = index.prefix[2 * s + 1];
            if (first < 0 || last < first || last > task.K) {
                require(false, "prefix[" + std::to_string(s) + "] must be a range of the " + std::to_string(task.K) + " key rows, got " +
                                   std::to_string(first) + " to " + std::to_string(last));
            }
            seq.prefix = first;
            seq.shared = last - first;
        }
        int64_t reserved;
        if (index.block_table != nullptr) {
            seq.table = index.block_table + s * index.blocks;
            reserved = index.blocks * task.block;
        } else {
            seq.start = index.cu_k[s];
            reserved = index.cu_k[s + 1] - index.cu_k[s];
        }
        seq.own = index.used == nullptr ? reserved : index.used[s];
        const int64_t least = seq.table == nullptr ? 0 : seq.n_q;
        if (seq.own < least || seq.own > reserved) {
            const std::string limit = std::to_string(reserved), got = ", got " + std::to_string(seq.own), place = std::to_string(s);
            require(false, seq.table == nullptr ? "seqused_k[" + place + "] must be 0 to " + limit + ", the rows of the sequence" + got
                                                : "seqlens_k[" + place + "] must be " + std::to_string(least) + ", its query rows, to " +
                                                      limit + ", its pages" + got);
        }
        for (int64_t b = 0; seq.table != nullptr && b * task.block < seq.own; ++b) {
            if (seq.table[b] < 0 || seq.table[b] >= index.cache_blocks) {
                require(false, "block_table[" + std::to_string(s) + "] must name blocks 0 to " + std::to_string(index.cache_blocks - 1) +
                                   ", got " + std::to_string(seq.table[b]));
            }
        }
    }
    return sequences;
}

// Waking threads costs some 10 us, the time one core takes for about two million multiply-adds or 100 KB.
int useful_threads(double work, int threads) {
    return static_cast<int>(std::clamp<double>(work / 2e6, 1, std::max(threads, 1)));
}

}  // namespace

void attention_forward(AttentionTask task, const AttentionIndex& index) {
    const std::vector<Sequence> sequences = make_sequences(task, index);
    const int64_t R = task.H / task.G, few_lanes = task.invariant ? 0 : kFewLanes;
    std::vector<Piece> pieces;
    std::vector<int64_t> few, few_partial{0};
    double work = 0;
    int64_t lanes = 0, pairs = 0;
    for (const Sequence& seq : sequences) {
        if (seq.n_q * R <= few_lanes) continue;
        lanes += seq.n_q * R * task.G;
        pairs += task.G;
    }
    // Several heads where a row of keys has them side by side: a row's 256 bytes of one head come at half the speed of longer runs.
    const bool adjacent = task.k.head == task.d && task.v.head == task.d;
    const int64_t share = std::clamp<int64_t>(pairs / std::max(task.threads, 1), 1, 8);
    // Half of a thread's share at most, so that threads end together.
    const int64_t most = std::clamp<int64_t>((lanes / (2 * std::max(task.threads, 1)) + 47) / 48 * 48, 48, kMaxLanes);
    for (int64_t s = 0; s < task.S; ++s) {
        const Sequence& seq = sequences[s];
        const int64_t n = seq.n_q * R;
        if (n == 0) continue;
        if (n <= few_lanes) {
            few.push_back(s);
            int64_t place = few_partial.back();
            for (int64_t j = 0; j < keys_of(seq); j += kChunk) {
                const int64_t last = std::min(j + kChunk, keys_of(seq));
                // Reading is what costs: as much as 16 lanes' arithmetic.
                pieces.push_back({s, -1, task.G, j, last, place, static_cast<double>((last - j) * task.G * std::max<int64_t>(n, 16))});
                place += task.G * n;
            }
            few_partial.push_back(place);
        } else {
            const int64_t count = (n + most - 1) / most, size = ((n + count - 1) / count + 47) / 48 * 48;
            const int64_t fit = adjacent ? std::clamp<int64_t>(kMaxLanes / size, 1, share) : 1, threads = std::max(task.threads, 1);
            const int64_t parts = ((task.G + fit - 1) / fit + threads - 1) / threads * threads;  // none is left over at the end
            const int64_t heads = (task.G + parts - 1) / parts;
            for (int64_t first = 0; first < n; first += size) {
                const int64_t last = std::min(first + size, n);
                int64_t keys = keys_of(seq);
                if (task.causal && task.q_index == nullptr) keys = std::clamp<int64_t>(keys - seq.n_q + last / R, 0, keys);
                for (int64_t g = 0; g < task.G; g += heads) {
                    const int64_t taken = std::min(heads, task.G - g);
                    pieces.push_back({s, g, taken, first, last, 0, static_cast<double>(taken * (last - first) * (keys + 16))});
                }
            }
        }
    }
    for (const Piece& piece : pieces) work += 2.0 * piece.cost * static_cast<double>(task.d);
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
    struct alignas(64) Line {
        float floats[16];
    };
    const std::unique_ptr<Line[]> partial(new Line[few_partial.back() * partial_size(task.d) / 16]);  // a vector would write it twice
    task.sequences = sequences.data();
    task.pieces = pieces.data();
    task.piece_count = static_cast<int64_t>(pieces.size());
    task.few = few.data();
    task.few_partial = few_partial.data();
    task.few_count = static_cast<int64_t>(few.size());
    task.partial = reinterpret_cast<float*>(partial.get());
    task.threads = useful_threads(work, task.threads);
    LLAVA_FAST_CHOOSE(attention_forward)(task);
}

void attention_backward(AttentionTask task, const AttentionIndex& index) {
    const std::vector<Sequence> sequences = make_sequences(task, index);
    // Sequences that have a key row in common are joined: `root` leads, in steps, to the first of the family.
    struct Range {
        int64_t first, last, sequence;
    };
    std::vector<Range> ranges;
    std::vector<int64_t> root(task.S);
    std::iota(root.begin(), root.end(), 0);
    const auto find = [&](int64_t s) {
        while (root[s] != s) s = root[s] = root[root[s]];
        return s;
    };
    for (int64_t s = 0; s < task.S; ++s) {
        const Sequence& seq = sequences[s];
        if (seq.n_q == 0) continue;
        if (seq.shared > 0) ranges.push_back({seq.prefix, seq.prefix + seq.shared, s});
        if (seq.own > 0) ranges.push_back({seq.start, seq.start + seq.own, s});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
    std::vector<int64_t> owner(task.K, -1);
    int64_t end = 0;
    for (size_t i = 0; i < ranges.size(); ++i) {
        if (i > 0 && ranges[i].first < end) {
            const int64_t a = find(ranges[i].sequence), b = find(ranges[i - 1].sequence);
            root[std::max(a, b)] = std::min(a, b);
        }
        std::fill(owner.begin() + std::max(ranges[i].first, std::min(end, ranges[i].last)), owner.begin() + ranges[i].last,
                  ranges[i].sequence);
        end = std::max(end, ranges[i].last);
    }
    std::vector<int64_t> number(task.S, -1), order;  // of the family, by its first sequence
    std::vector<double> cost;
    for (int64_t s = 0; s < task.S; ++s) {
        const Sequence& seq = sequences[s];
        if (seq.n_q == 0) continue;
        const int64_t first = find(s);
        if (number[first] < 0) {
            number[first] = static_cast<int64_t>(cost.size());
            cost.push_back(0);
        }
        number[s] = number[first];
        cost[number[s]] += static_cast<double>(seq.n_q * (task.H / task.G) * (keys_of(seq) + 16));
    }
    const int64_t families = static_cast<int64_t>(cost.size());
    std::vector<int64_t> family_start(families + 1, 0), family, row_start(families + 1, 0), row, place(task.K, -1);
    for (int64_t s = 0; s < task.S; ++s) family_start[number[s] + 1] += number[s] >= 0;
    for (int64_t k = 0; k < task.K; ++k) row_start[(owner[k] < 0 ? -1 : number[owner[k]]) + 1] += owner[k] >= 0;
    for (int64_t f = 0; f < families; ++f) {
        family_start[f + 1] += family_start[f];
        row_start[f + 1] += row_start[f];
    }
    family.resize(family_start[families]);
    row.resize(row_start[families]);
    std::vector<int64_t> next(family_start.begin(), family_start.end()), next_row(row_start.begin(), row_start.end());
    for (int64_t s = 0; s < task.S; ++s) {
        if (number[s] >= 0) family[next[number[s]]++] = s;
    }
    for (int64_t k = 0; k < task.K; ++k) {
        if (owner[k] < 0) {
            const int64_t size = task.grad_k.type == DType::f32 ? 4 : 2;
            for (const Rows& grad : {task.grad_k, task.grad_v})
                std::memset(static_cast<char*>(grad.data) + k * grad.row * size, 0, grad.row * size);
            continue;
        }
        const int64_t f = number[owner[k]];
        place[k] = next_row[f] - row_start[f];
        row[next_row[f]++] = k;
    }
    order.resize(families);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    double work = 0;
    for (double c : cost) work += 5.0 * c * static_cast<double>(task.G * task.d);
    task.sequences = sequences.data();
    task.family = family.data();
    task.family_start = family_start.data();
    task.family_row = row.data();
    task.family_row_start = row_start.data();
    task.row_place = place.data();
    task.family_order = order.data();
    task.family_count = families;
    task.threads = useful_threads(work, task.threads);
    LLAVA_FAST_CHOOSE(attention_backward)(task);
}

}  // namespace llava_fast
