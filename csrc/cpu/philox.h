// Philox 4x32-10 (Salmon et al., SC11) as kernels/sampling.py lays it out: word v of a row is output v % 4 at counter
// (v / 4, 0, step), keyed by the seed. The including file defines ISA.
//
// Each word of the state lives in the low half of a 64-bit lane: the product of two is one instruction, its low half needs none to
// become the next word, and what is left in the high halves is never read.
#pragma once

#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

struct Philox {
    static constexpr int kRounds = 10;
    static constexpr int64_t kWords = 2 * kWidth;  // that words() makes at a time
    uint64_t key0[kRounds], key1[kRounds];
    uint64_t step_low, step_high;

    Philox(int64_t seed, int64_t step) {
        const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(step);
        for (uint32_t i = 0; i < kRounds; ++i) {
            key0[i] = static_cast<uint32_t>(key) + i * 0x9E3779B9u;
            key1[i] = static_cast<uint32_t>(key >> 32) + i * 0xBB67AE85u;
            key0[i] &= 0xFFFFFFFFu;
            key1[i] &= 0xFFFFFFFFu;
        }
        step_low = counter & 0xFFFFFFFFu;
        step_high = counter >> 32;
    }

    // The upper 31 bits of the four words of a counter.
    void four(int64_t counter, int32_t* out) const {
        uint32_t c0 = static_cast<uint32_t>(counter), c1 = 0, c2 = static_cast<uint32_t>(step_low), c3 = static_cast<uint32_t>(step_high);
        for (int i = 0; i < kRounds; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(c0) * kMultiplier0, p1 = static_cast<uint64_t>(c2) * kMultiplier1;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ static_cast<uint32_t>(key0[i]);
            c1 = static_cast<uint32_t>(p1);
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ static_cast<uint32_t>(key1[i]);
            c3 = static_cast<uint32_t>(p0);
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int j = 0; j < 4; ++j) out[j] = static_cast<int32_t>(words[j] >> 1);
    }

    // Of words 4 counter to 4 counter + kWords - 1. Lanes hold the counters in the order in which unpacking lays the words out.
    void words(int64_t counter, int32_t* out) const {
#if defined(__AVX512F__)
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(counter), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
        __m512i c1 = _mm512_setzero_si512(), c2 = _mm512_set1_epi64(step_low), c3 = _mm512_set1_epi64(step_high);
        const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
#pragma GCC unroll 10
        for (int i = 0; i < kRounds; ++i) {
            const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
            c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(key0[i]), 0x96);
            c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(key1[i]), 0x96);
            c1 = p1;
            c3 = p0;
        }
        const __m512i first = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
        const __m512i second = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
        _mm512_storeu_si512(out, _mm512_srli_epi32(_mm512_unpacklo_epi64(first, second), 1));
        _mm512_storeu_si512(out + kWidth, _mm512_srli_epi32(_mm512_unpackhi_epi64(first, second), 1));
#elif defined(__AVX2__)
        __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_setr_epi64x(0, 2, 1, 3));
        __m256i c1 = _mm256_setzero_si256(), c2 = _mm256_set1_epi64x(step_low), c3 = _mm256_set1_epi64x(step_high);
        const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
#pragma GCC unroll 10
        for (int i = 0; i < kRounds; ++i) {
            const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
            c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(key0[i]));
            c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(key1[i]));
            c1 = p1;
            c3 = p0;
        }
        const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
        const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_srli_epi32(_mm256_unpacklo_epi64(first, second), 1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kWidth), _mm256_srli_epi32(_mm256_unpackhi_epi64(first, second), 1));
#else
        for (int64_t i = 0; i < kWords; i += 4) four(counter + i / 4, out + i);
#endif
    }
};

}  // namespace ISA
}  // namespace llava_fast
