#include "cpu/probe.h"

#include <chrono>
#include <cmath>

#include "cpu/isa.h"

namespace llava_fast {

double fma_rate(int threads) {
    constexpr int64_t kRounds = 2000000;
    const auto run = LLAVA_FAST_CHOOSE(fma_rounds);
    float total = 0;
    double operations = 0;
    double seconds = 0;
    for (bool warm : {false, true}) {  // the first pass starts the threads and lets the clock settle
        operations = 0;
        const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total, operations)
        for (int t = 0; t < threads; ++t) {
            float sum = 0;
            operations += 2.0 * 12.0 * static_cast<double>(run(warm ? kRounds : kRounds / 4, &sum)) * (warm ? kRounds : kRounds / 4);
            total += sum;
        }
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return std::isfinite(total) ? operations / seconds : 0.0;
}

}  // namespace llava_fast
