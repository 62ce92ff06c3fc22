// Index and weight tables of the two axes, checks, and the choice of instruction set.
#include "cpu/spatial_pool.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/stream.h"

namespace llava_fast {

namespace {

struct AxisTables {
    int64_t taps = 0;
    std::vector<int64_t> index;
    std::vector<double> weight;
    std::vector<int64_t> inverse_start, inverse_output;
    std::vector<double> inverse_weight;

    void add(int64_t cell, double w) {
        index.push_back(cell);
        weight.push_back(w);
    }

    void invert(int64_t inputs) {
        inverse_start.assign(inputs + 1, 0);
        for (int64_t cell : index) ++inverse_start[cell + 1];
        for (int64_t i = 0; i < inputs; ++i) inverse_start[i + 1] += inverse_start[i];
        std::vector<int64_t> next(inverse_start.begin(), inverse_start.end() - 1);
        inverse_output.resize(index.size());
        inverse_weight.resize(index.size());
        for (size_t i = 0; i < index.size(); ++i) {
            const int64_t place = next[index[i]]++;
            inverse_output[place] = static_cast<int64_t>(i) / taps;
            inverse_weight[place] = weight[i];
        }
    }

    PoolAxis view() const {
        return {taps, index.data(), weight.data(), inverse_start.data(), inverse_output.data(), inverse_weight.data()};
    }
};

// Non-overlapping windows of floor(inputs / outputs) cells.
AxisTables window_axis(int64_t inputs, int64_t outputs) {
    AxisTables axis;
    axis.taps = inputs / outputs;
    for (int64_t i = 0; i < outputs * axis.taps; ++i) axis.add(i, 1.0);
    axis.invert(inputs);
    return axis;
}

// torch's bilinear with align_corners=False. Weights in double: torch's own fp32 ones are off by 1e-6 far from the corner.
AxisTables bilinear_axis(int64_t inputs, int64_t outputs) {
    AxisTables axis;
    axis.taps = 2;
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    for (int64_t o = 0; o < outputs; ++o) {
        const double place = std::max(scale * (static_cast<double>(o) + 0.5) - 0.5, 0.0);
        const int64_t low = std::min(static_cast<int64_t>(place), inputs - 1);
        const double high_weight = std::min(place - static_cast<double>(low), 1.0);
        axis.add(low, 1.0 - high_weight);
        axis.add(std::min(low + 1, inputs - 1), high_weight);
    }
    axis.invert(inputs);
    return axis;
}

AxisTables make_axis(PoolMode mode, int64_t inputs, int64_t outputs) {
    return mode == PoolMode::bilinear ? bilinear_axis(inputs, outputs) : window_axis(inputs, outputs);
}

void check_source(const int64_t* source, int64_t cells, int64_t rows) {
    for (int64_t i = 0; i < cells; ++i) {
        if (source[i] < 0 || source[i] >= rows) {
            throw std::invalid_argument("source[" + std::to_string(i) + "] is " + std::to_string(source[i]) +
                                        ", expected a row of the table, 0 to " + std::to_string(rows - 1));
        }
    }
}

// Waking threads costs some 10 us, the time one core takes for about this many values.
int useful_threads(int64_t values, int threads) {
    return static_cast<int>(std::clamp<int64_t>(values / 32768, 1, std::max(threads, 1)));
}

PoolTask make_task(DType dtype, PoolMode mode, const PoolShape& shape, const AxisTables& y, const AxisTables& x, const void* out,
                   int64_t rows, int threads) {
    PoolTask task{};
    task.dtype = dtype;
    task.mode = mode;
    task.shape = shape;
    task.y = y.view();
    task.x = x.view();
    task.divisor = mode == PoolMode::average ? static_cast<double>(y.taps * x.taps) : 1.0;
    task.stream = streams(dtype, out, rows, shape.D);
    task.threads = useful_threads(std::max(shape.K * shape.H * shape.W, shape.M) * shape.D, threads);
    return task;
}

}  // namespace

void spatial_pool_forward(DType dtype, PoolMode mode, const PoolShape& s, const void* table, const int64_t* source, void* out,
                          int threads) {
    check_source(source, s.K * s.H * s.W, s.M);
    const AxisTables y = make_axis(mode, s.H, s.out_H), x = make_axis(mode, s.W, s.out_W);
    PoolTask task = make_task(dtype, mode, s, y, x, out, s.K * s.out_H * s.out_W, threads);
    task.source = source;
    task.table = table;
    task.out = out;
    LLAVA_FAST_CHOOSE(spatial_pool_forward)(task);
}

void spatial_pool_backward(DType dtype, PoolMode mode, const PoolShape& s, const void* grad, const void* table, const int64_t* source,
                           void* grad_table, int threads) {
    const int64_t cells = s.K * s.H * s.W;
    check_source(source, cells, s.M);
    const AxisTables y = make_axis(mode, s.H, s.out_H), x = make_axis(mode, s.W, s.out_W);
    std::vector<int64_t> reader_start(s.M + 1, 0);
    for (int64_t i = 0; i < cells; ++i) ++reader_start[source[i] + 1];
    for (int64_t m = 0; m < s.M; ++m) reader_start[m + 1] += reader_start[m];
    std::vector<int64_t> next(reader_start.begin(), reader_start.end() - 1);
    std::vector<PoolReader> readers(cells);
    for (int64_t i = 0; i < cells; ++i) readers[next[source[i]]++] = {i / (s.H * s.W), i / s.W % s.H, i % s.W};
    const auto free = [](void* p) { ::operator delete(p, std::align_val_t(64)); };
    const int64_t winners = mode == PoolMode::max ? s.K * s.out_H * s.out_W * padded(s.D) : 0;
    const std::unique_ptr<void, decltype(free)> winner(
        ::operator new(static_cast<size_t>(winners) * (dtype == DType::f64 ? 8 : 4), std::align_val_t(64)), free);
    PoolTask task = make_task(dtype, mode, s, y, x, grad_table, s.M, threads);
    task.winner = winner.get();
    task.source = source;
    task.table = table;
    task.grad = grad;
    task.grad_table = grad_table;
    task.reader_start = reader_start.data();
    task.readers = readers.data();
    LLAVA_FAST_CHOOSE(spatial_pool_backward)(task);
}

}  // namespace llava_fast
