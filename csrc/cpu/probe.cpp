#include "cpu/probe.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/isa.h"

namespace llava_fast {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

double fma_rate(int threads) {
    constexpr int64_t kRounds = 2000000;
    const auto run = LLAVA_FAST_CHOOSE(fma_rounds);
    float total = 0;
    double operations = 0;
    double seconds = 0;
    for (bool warm : {false, true}) {  // the first pass starts the threads and lets the clock settle
        operations = 0;
        const auto start = Clock::now();
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total, operations)
        for (int t = 0; t < threads; ++t) {
            float sum = 0;
            operations += 2.0 * 12.0 * static_cast<double>(run(warm ? kRounds : kRounds / 4, &sum)) * (warm ? kRounds : kRounds / 4);
            total += sum;
        }
        seconds = seconds_since(start);
    }
    return std::isfinite(total) ? operations / seconds : 0.0;
}

void copy_past_caches(void* to, const void* from, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 4096;
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t first = 0; first < bytes; first += kBlock) {
            const int64_t n = std::min(kBlock, bytes - first);
            int64_t i = 0;
#if defined(__SSE2__)
            constexpr int64_t kAhead = 2048;  // as rows.h has it
            alignas(64) char block[kBlock];
            for (int64_t line = 0; line + 64 <= n; line += 64) {
                __builtin_prefetch(in + first + line + kAhead);
                std::memcpy(block + line, in + first + line, 64);
            }
            for (; i + 64 <= n; i += 64) {
                for (int64_t j = i; j < i + 64; j += 16) {
                    const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(block + j));
                    _mm_stream_si128(reinterpret_cast<__m128i*>(out + first + j), part);
                }
            }
#endif
            std::memcpy(out + first + i, in + first + i, static_cast<size_t>(n - i));
        }
#if defined(__SSE2__)
        _mm_sfence();
#endif
    }
}

double tile_rate(int threads) {
#if LLAVA_FAST_LEVEL >= 3
    if (current_isa() == Isa::amx) {
        constexpr int64_t kRounds = 400000;
        constexpr double kOperations = 4 * 2.0 * 16 * 16 * 32;  // a round
        double seconds = 0;
        for (const int64_t rounds : {kRounds / 4, kRounds}) {  // likewise
            const auto start = Clock::now();
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int t = 0; t < threads; ++t) tile_rounds_amx(rounds);
            seconds = seconds_since(start);
        }
        return kOperations * kRounds * threads / seconds;
    }
#endif
    static_cast<void>(threads);
    return 0.0;
}

}  // namespace llava_fast
