// A register of floats in the instruction set of the including file (which defines ISA), and the few operations kernels need.
//
// kWidth floats: 16 with AVX-512, 8 with AVX2 and in the portable build, where GCC's and clang's vector types stand in.
// 16-bit floats are widened as they are loaded and rounded to nearest even as they are stored. `n` bounds a load or store at the end
// of a row: the lanes past it read as zero and are not written. fma() rounds once where the set has the instruction.
//
// Everything is static inline inside the namespace of the instruction set; see half.h for the reason.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LLAVA_FAST_JOIN_(a, b) a##b
#ifndef LLAVA_FAST_JOIN
#define LLAVA_FAST_JOIN(a, b) LLAVA_FAST_JOIN_(a, b)
#endif

namespace llava_fast {
namespace ISA {

// Two numbers of -8 to 7 in a byte, 8 added to each, the first in the low four bits. A load reads kWidth numbers, kWidth / 2 bytes.
struct nibbles {
    uint8_t bits;
};

#if defined(__AVX512F__)

constexpr int64_t kWidth = 16;
typedef __m512 vec;

static inline vec splat(float x) {
    return _mm512_set1_ps(x);
}
static inline vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
static inline vec load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
static inline vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Through fp16, whose subnormals cost nothing: the exponent's bias is 15 there and 7 here.
static inline vec load(const e4m3* p) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), x), 8);
    const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), _mm256_srli_epi16(nan, 1));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}
static inline __mmask16 lanes(int64_t n) {
    return static_cast<__mmask16>((1u << n) - 1u);
}
static inline vec load(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(lanes(n), p);
}
static inline vec load(const bf16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16));
}
static inline vec load(const f16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p));
}
static inline vec load(const int8_t* p, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
}
static inline vec load(const int32_t* p) {
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(p));
}
// Each lane shifts its own four bits down; the table look-up reads no more of the index.
static inline vec load(const nibbles* p) {
    int64_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    const __m512i spread =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_set1_epi64(bytes));
    const __m512i index = _mm512_srlv_epi32(spread, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
    return _mm512_permutexvar_ps(index, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
}
// For products of whole registers of bytes: what `pairs` makes numbers of, for one scale, and 2 * kWidth numbers times that scale, the
// even columns and the odd ones. The table look-up reads no more than four bits of an index.
static inline vec levels(float scale) {
    return _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_ps(scale));
}
static inline void pairs(const nibbles* p, vec levels, vec& even, vec& odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    even = _mm512_permutexvar_ps(bytes, levels);
    odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
}
static inline void store(float* p, vec x) {
    _mm512_storeu_ps(p, x);
}
static inline void store(float* p, vec x, int64_t n) {
    _mm512_mask_storeu_ps(p, lanes(n), x);
}
static inline __m256i to_bf16(vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
static inline void store(bf16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
static inline void store(bf16* p, vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, lanes(n), to_bf16(x));
}
static inline void store(f16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(f16* p, vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline vec fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline vec max(vec a, vec b) {
    return _mm512_max_ps(a, b);
}
static inline vec min(vec a, vec b) {
    return _mm512_min_ps(a, b);
}
static inline vec sqrt(vec a) {
    return _mm512_sqrt_ps(a);
}
static inline vec round(vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline vec scale2(vec a, vec n) {
    return _mm512_scalef_ps(a, n);
}  // a * 2^n
static inline float sum(vec a) {
    return _mm512_reduce_add_ps(a);
}
static inline float largest(vec a) {
    return _mm512_reduce_max_ps(a);
}
// Bit i is set where a[i] >= b[i].
static inline uint32_t at_least(vec a, vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
// The integers that the bits of the floats are.
static inline vec bits(vec a) {
    return _mm512_cvtepi32_ps(_mm512_castps_si512(a));
}

#elif defined(__AVX2__)

constexpr int64_t kWidth = 8;
typedef __m256 vec;

static inline vec splat(float x) {
    return _mm256_set1_ps(x);
}
static inline vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
static inline vec load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
static inline vec load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline vec load(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vec load(const nibbles* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
}
static inline vec levels(float scale) {
    return _mm256_set1_ps(scale);
}
static inline void pairs(const nibbles* p, vec levels, vec& even, vec& odd) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const vec least = _mm256_mul_ps(levels, _mm256_set1_ps(-8.0f));  // exact, so that each number is rounded once
    even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15))), levels, least);
    odd = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4)), levels, least);
}
static inline vec load(const e4m3* p) {  // through fp16, whose subnormals cost nothing: the exponent's bias is 15 there and 7 here
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7f), x), 8);
    const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), _mm_srli_epi16(nan, 1));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
static inline __m256i lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vec load(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, lanes(n));
}
static inline void store(float* p, vec x) {
    _mm256_storeu_ps(p, x);
}
static inline void store(float* p, vec x, int64_t n) {
    _mm256_maskstore_ps(p, lanes(n), x);
}
static inline __m128i to_bf16(vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08));
}
static inline void store(bf16* p, vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
}
static inline void store(f16* p, vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline vec fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vec max(vec a, vec b) {
    return _mm256_max_ps(a, b);
}
static inline vec min(vec a, vec b) {
    return _mm256_min_ps(a, b);
}
static inline vec sqrt(vec a) {
    return _mm256_sqrt_ps(a);
}
static inline vec round(vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n in two steps, so that results below 2^-126 and above 2^127 come out right.
static inline vec scale2(vec a, vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const vec second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(a, first), second);
}
static inline float sum(vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float largest(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline uint32_t at_least(vec a, vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
static inline vec bits(vec a) {
    return _mm256_cvtepi32_ps(_mm256_castps_si256(a));
}

#else

constexpr int64_t kWidth = 8;
typedef float vec __attribute__((vector_size(32)));

static inline vec splat(float x) {
    return vec{x, x, x, x, x, x, x, x};
}
static inline vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
template <typename T>
static inline vec load(const T* p) {
    vec x;
    for (int64_t i = 0; i < kWidth; ++i) x[i] = widen(p[i]);
    return x;
}
static inline vec load(const int8_t* p) {
    vec x;
    for (int64_t i = 0; i < kWidth; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
static inline vec load(const int32_t* p) {
    vec x;
    for (int64_t i = 0; i < kWidth; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
static inline vec load(const nibbles* p) {
    vec x;
    for (int64_t i = 0; i < kWidth; ++i) x[i] = static_cast<float>((p[i / 2].bits >> (i % 2 * 4) & 15) - 8);
    return x;
}
static inline vec levels(float scale) {
    return splat(scale);
}
static inline void pairs(const nibbles* p, vec levels, vec& even, vec& odd) {
    for (int64_t i = 0; i < kWidth; ++i) {
        even[i] = static_cast<float>((p[i].bits & 15) - 8) * levels[i];
        odd[i] = static_cast<float>((p[i].bits >> 4) - 8) * levels[i];
    }
}
static inline vec load(const float* p, int64_t n) {
    vec x = splat(0.0f);
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
static inline void store(float* p, vec x) {
    std::memcpy(p, &x, sizeof(x));
}
template <typename T>
static inline void store(T* p, vec x) {
    for (int64_t i = 0; i < kWidth; ++i) narrow(x[i], p + i);
}
static inline void store(float* p, vec x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}
static inline vec fma(vec a, vec b, vec c) {
    return a * b + c;
}
static inline vec max(vec a, vec b) {
    for (int64_t i = 0; i < kWidth; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
static inline vec min(vec a, vec b) {
    for (int64_t i = 0; i < kWidth; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
static inline vec sqrt(vec a) {
    for (int64_t i = 0; i < kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
static inline vec round(vec a) {
    for (int64_t i = 0; i < kWidth; ++i) a[i] = __builtin_rintf(a[i]);
    return a;
}
static inline vec scale2(vec a, vec n) {
    for (int64_t i = 0; i < kWidth; ++i) {
        const int32_t whole = static_cast<int32_t>(n[i]), half = whole >> 1;
        a[i] = a[i] * float_of(static_cast<uint32_t>(half + 127) << 23) * float_of(static_cast<uint32_t>(whole - half + 127) << 23);
    }
    return a;
}
static inline float sum(vec a) {
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
static inline float largest(vec a) {
    float best = a[0];
    for (int64_t i = 1; i < kWidth; ++i) best = a[i] > best ? a[i] : best;
    return best;
}
static inline uint32_t at_least(vec a, vec b) {
    uint32_t mask = 0;
    for (int64_t i = 0; i < kWidth; ++i) mask |= static_cast<uint32_t>(a[i] >= b[i]) << i;
    return mask;
}
static inline vec bits(vec a) {
    for (int64_t i = 0; i < kWidth; ++i) a[i] = static_cast<float>(static_cast<int32_t>(bits_of(a[i])));
    return a;
}

#endif

#if !defined(__AVX512F__)
template <typename T>
static inline vec load(const T* p, int64_t n) {
    T part[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}
template <typename T>
static inline void store(T* p, vec x, int64_t n) {
    T part[kWidth];
    store(part, x);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}
#endif

// n is even, and the lanes past it are not zero: what multiplies them must be.
static inline vec load(const nibbles* p, int64_t n) {
    nibbles part[kWidth / 2] = {};
    for (int64_t i = 0; i < n / 2; ++i) part[i] = p[i];
    return load(part);
}
static inline void pairs(const nibbles* p, vec levels, vec& even, vec& odd, int64_t n) {
    nibbles part[kWidth] = {};
    for (int64_t i = 0; i < n / 2; ++i) part[i] = p[i];
    pairs(part, levels, even, odd);
}

#if defined(__AVX512F__)
static inline vec load(const e4m3* p, int64_t n) {
    e4m3 part[kWidth] = {};
    std::memcpy(part, p, n);
    return load(part);
}
static inline void transpose(vec (&r)[kWidth]) {
    vec t[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#elif defined(__AVX2__)
static inline void transpose(vec (&r)[kWidth]) {
    vec t[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(t[i]), _mm256_castps_pd(t[i + 2])));
        r[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(t[i]), _mm256_castps_pd(t[i + 2])));
        r[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(t[i + 1]), _mm256_castps_pd(t[i + 3])));
        r[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(t[i + 1]), _mm256_castps_pd(t[i + 3])));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        const vec low = r[i], high = r[i + 4];
        r[i] = _mm256_permute2f128_ps(low, high, 0x20);
        r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
#else
static inline void transpose(vec (&r)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
        for (int j = 0; j < i; ++j) {
            const float kept = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = kept;
        }
    }
}
#endif
// Lane k of the result is the sum of r[k]'s lanes: half of the shuffles of a transposition.
static inline vec sums(vec (&r)[kWidth]) {
#if defined(__AVX512F__)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
        r[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int n = 2; n > 0; n /= 2) {
#pragma GCC unroll 2
        for (int i = 0; i < n; ++i) {
            r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88), _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
        }
    }
    return r[0];
#elif defined(__AVX2__)
#pragma GCC unroll 2
    for (int n = 4; n > 1; n /= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) r[i] = _mm256_hadd_ps(r[2 * i], r[2 * i + 1]);
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
#else
    vec out;
    for (int k = 0; k < kWidth; ++k) out[k] = sum(r[k]);
    return out;
#endif
}

// x as it would come back from memory that holds it as T.
template <typename T>
static inline vec rounded(vec x) {
    T part[kWidth];
    store(part, x);
    return load(part);
}
template <>
inline vec rounded<float>(vec x) {
    return x;
}

// e^x to 1.2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r by Cephes. 0 for -infinity, infinity past 88.7.
static inline vec exp(vec x) {
    // min and max return their second operand for NaN in x86's order; written so that NaN comes through.
    x = min(splat(89.0f), max(splat(-104.0f), x));
    const vec n = round(x * splat(1.44269504088896341f));
    vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return scale2(p, n);
}

// 1 / x to 1 ulp for finite x: a division takes 16 cycles of the unit that AVX-512 multiplies with.
static inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
    const vec r = _mm512_rcp14_ps(x);
    return fma(r, _mm512_fnmadd_ps(x, r, splat(1.0f)), r);
#else
    return splat(1.0f) / x;
#endif
}

// Walking over rows of any length: f(offset, lanes) for each register, where only the last may have fewer than kWidth lanes.
template <typename F>
static inline __attribute__((always_inline)) void each(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(i, kWidth);
    if (i < n) f(i, n - i);
}
template <typename T>
static inline vec load_some(const T* p, int64_t n) {
    return n == kWidth ? load(p) : load(p, n);
}
template <typename T>
static inline void store_some(T* p, vec x, int64_t n) {
    if (n == kWidth) {
        store(p, x);
    } else {
        store(p, x, n);
    }
}

}  // namespace ISA
}  // namespace llava_fast
