#include "cpu/sampling.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "half.h"

namespace llava_fast {

namespace {

constexpr int64_t kFewLogits = 1 << 15;  // a second thread costs more to wake than it saves: some 10 us

void check_dtype(const char* what, DType dtype) {
    if (dtype == DType::e4m3) throw std::invalid_argument(std::string(what) + " must be fp32, fp64, bf16 or fp16, got e4m3");
}

// 1 - p in p's own type, as torch subtracts, for p < 1; else 0.
template <typename T>
float excess(T p) {
    if (!(widen(p) < 1)) return 0.0f;
    narrow(1 - widen(p), &p);
    return static_cast<float>(widen(p));
}

template <typename T>
float as_float(T x) {
    return static_cast<float>(widen(x));
}

template <typename F>
float read(const void* values, DType dtype, int64_t r, const F& f) {
    switch (dtype) {
        case DType::f64:
            return f(static_cast<const double*>(values)[r]);
        case DType::bf16:
            return f(static_cast<const bf16*>(values)[r]);
        case DType::f16:
            return f(static_cast<const f16*>(values)[r]);
        default:
            return f(static_cast<const float*>(values)[r]);
    }
}

SamplingRow read_row(const SamplingTask& task, int64_t r) {
    SamplingRow row{task.temperature[r], task.V, 0.0f, 0.0f, task.seeds[r], task.steps[r], 1.0f, 0.0f, 0.0f};
    if (task.top_k != nullptr) {
        const int64_t k = task.top_k_int32 ? static_cast<const int32_t*>(task.top_k)[r] : static_cast<const int64_t*>(task.top_k)[r];
        if (k > 0 && k < task.V) row.top_k = k;
    }
    if (task.top_p != nullptr) row.excess = read(task.top_p, task.top_p_dtype, r, [](auto p) { return excess(p); });
    if (task.min_p != nullptr) row.min_p = read(task.min_p, task.min_p_dtype, r, [](auto p) { return as_float(p); });
    if (task.repetition != nullptr) row.repetition = task.repetition[r];
    if (task.presence != nullptr) row.presence = task.presence[r];
    if (task.frequency != nullptr) row.frequency = task.frequency[r];
    return row;
}

// Rows in ranges where there are fewer rows than threads; `run` fills the picks of all ranges.
template <typename F>
void in_parts(SamplingTask& task, bool whole_rows, const F& run) {
    if (task.V < 1) throw std::invalid_argument("expected at least 1 logit a row, got " + std::to_string(task.V));
    if (task.S * task.V < kFewLogits) task.threads = 1;
    const int64_t parts = whole_rows || task.S == 0 ? 1 : std::max<int64_t>(task.threads / task.S, 1);
    std::vector<Pick> picks(task.S * parts);
    run(parts, picks.data());
    for (int64_t r = 0; r < task.S; ++r) {
        Pick best = picks[r * parts];
        for (int64_t p = 1; p < parts; ++p) {
            if (beats(picks[r * parts + p], best)) best = picks[r * parts + p];
        }
        task.tokens[r] = best.token;
    }
}

}  // namespace

void sampling(SamplingTask task) {
    check_dtype("top_p", task.top_p_dtype), check_dtype("min_p", task.min_p_dtype);
    std::vector<SamplingRow> rows;
    bool whole_rows = true;
    for (int64_t r = 0; r < task.S; ++r) {
        rows.push_back(read_row(task, r));
        whole_rows = whole_rows && filters(rows.back(), task.V);
    }
    in_parts(task, whole_rows, [&](int64_t parts, Pick* picks) { LLAVA_FAST_CHOOSE(sampling)(task, rows.data(), parts, picks); });
}

void argmax(SamplingTask task) {
    in_parts(task, false, [&](int64_t parts, Pick* picks) { LLAVA_FAST_CHOOSE(argmax)(task, parts, picks); });
}

}  // namespace llava_fast
