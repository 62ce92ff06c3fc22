// Rows of any length, two registers at a time, for kernels that move bytes; the including file defines ISA.
//
// 32 bf16 fill the registers of one 64-byte line by a shift and a mask, the even ones and the odd ones apart, where two loads of 16
// take two shuffles and two shifts, and are rounded back without a shuffle: element by element the order is the same for all
// operands of one type.
#pragma once

#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kPair = 2 * kWidth;

struct pair {
    vec a, b;
};

template <typename F, typename... P>
static inline __attribute__((always_inline)) pair both(const F& f, const P&... x) {
    return {f(x.a...), f(x.b...)};
}
static inline pair splat_pair(float x) {
    return {splat(x), splat(x)};
}
static inline pair operator+(pair x, pair y) {
    return {x.a + y.a, x.b + y.b};
}
static inline pair operator-(pair x, pair y) {
    return {x.a - y.a, x.b - y.b};
}
static inline pair operator*(pair x, pair y) {
    return {x.a * y.a, x.b * y.b};
}
static inline pair fma(pair x, pair y, pair z) {
    return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
static inline float sum(pair x) {
    return sum(x.a + x.b);
}

// Where element j of a pair of T is among its kPair numbers, a's first.
template <typename T>
static inline int64_t place(int64_t j) {
    return j;
}
template <typename T>
static inline pair load_pair(const T* p) {
    return {load(p), load(p + kWidth)};
}
template <typename T>
static inline void store_pair(T* p, pair x) {
    store(p, x.a);
    store(p + kWidth, x.b);
}
template <typename T>
static inline pair rounded_pair(pair x) {
    return {rounded<T>(x.a), rounded<T>(x.b)};
}

// bf16: of a NaN the low 16 bits must be zero, as they are in what came from bf16 and in what arithmetic makes; rounding another
// one could carry into its sign.
#if defined(__AVX512F__)
template <>
inline int64_t place<bf16>(int64_t j) {
    return j % 2 * kWidth + j / 2;
}
static inline pair spread(__m512i line) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(line, 16)), _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32(-0x10000)))};
}
static inline __m512i round_up(vec x) {  // the upper half is the rounded number, the lower one is of no use
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
static inline __m512i packed(pair x) {  // the upper halves of b, and those of a below them
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(-0x10000), round_up(x.b), _mm512_srli_epi32(round_up(x.a), 16), 0xca);
}
static inline pair load_pair(const bf16* p) {
    return spread(_mm512_loadu_si512(p));
}
static inline void store_pair(bf16* p, pair x) {
    _mm512_storeu_si512(p, packed(x));
}
template <>
inline pair rounded_pair<bf16>(pair x) {
    const __m512i upper = _mm512_set1_epi32(-0x10000);
    return {_mm512_castsi512_ps(_mm512_and_si512(round_up(x.a), upper)), _mm512_castsi512_ps(_mm512_and_si512(round_up(x.b), upper))};
}
#elif defined(__AVX2__)
template <>
inline int64_t place<bf16>(int64_t j) {
    return j % 2 * kWidth + j / 2;
}
static inline __m256i round_up(vec x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
static inline pair load_pair(const bf16* p) {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(line, 16)), _mm256_castsi256_ps(_mm256_and_si256(line, _mm256_set1_epi32(-0x10000)))};
}
static inline void store_pair(bf16* p, pair x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(_mm256_srli_epi32(round_up(x.a), 16), round_up(x.b), 0xaa));
}
template <>
inline pair rounded_pair<bf16>(pair x) {
    const __m256i upper = _mm256_set1_epi32(-0x10000);
    return {_mm256_castsi256_ps(_mm256_and_si256(round_up(x.a), upper)), _mm256_castsi256_ps(_mm256_and_si256(round_up(x.b), upper))};
}
#endif

// The first n of kPair elements; the lanes of the others are zero, and are not written.
template <typename T>
static __attribute__((noinline)) pair load_part(const T* p, int64_t n) {
    T part[kPair] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
    return load_pair(part);
}
template <typename T>
static __attribute__((noinline)) void store_part(T* p, pair x, int64_t n) {
    T part[kPair];
    store_pair(part, x);
    std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}
template <typename T>
static inline __attribute__((always_inline)) pair load_pair(const T* p, int64_t n) {
    return n == kPair ? load_pair(p) : load_part(p, n);
}
// The same of what is read from memory for the first time, while the line kAhead bytes on is fetched: the processor's own prefetching
// stops at the end of a page, which is 4 KiB unless asked otherwise. 64 MB of fp32 gelu in such pages take 10.0 ms without, 9.0 at 512
// bytes, 7.8 at 1024 and 6.8 at 2048; bf16 11.5, 10.2, 8.3 and 8.2.
constexpr int64_t kAhead = 2048;
template <typename T>
static inline __attribute__((always_inline)) pair load_ahead(const T* p, int64_t n) {
    const char* later = reinterpret_cast<const char*>(p) + kAhead;
    for (size_t line = 0; line < kPair * sizeof(T); line += 64) __builtin_prefetch(later + line);
    return load_pair(p, n);
}
template <typename T>
static inline __attribute__((always_inline)) void store_pair(T* p, pair x, int64_t n) {
    if (n == kPair) return store_pair(p, x);
    store_part(p, x, n);
}
// Zero in the lanes of the elements from n on, for pairs of T.
template <typename T>
static inline pair zero_past(pair x, int64_t n) {
    if (n == kPair) return x;
    float values[kPair];
    store_pair(values, x);
    for (int64_t j = n; j < kPair; ++j) values[place<T>(j)] = 0.0f;
    return load_pair(values);
}

// Past the caches, by whole lines: half lines are slower than plain stores (23 against 14 ms for 32 MB).
template <typename T>
static inline void stream_copy(T* out, const T* from, int64_t n) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (constexpr int64_t line = 64 / sizeof(T); i + line <= n; i += line) {
        const __m256i* source = reinterpret_cast<const __m256i*>(from + i);
        const __m256i low = _mm256_load_si256(source), high = _mm256_load_si256(source + 1);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), low);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i) + 1, high);
    }
#endif
    std::memcpy(out + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}

// f(offset, count) for each pair of a row of n; only the last may have fewer than kPair elements.
template <typename F>
static inline __attribute__((always_inline)) void each_pair(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) f(i, kPair);
    if (i < n) f(i, n - i);
}

// out[i] = value(i, count) for a row of n. Past the caches on request: `out` is then at the start of a line, and a fence() afterwards
// makes it visible to other threads. By blocks of 4 KiB: memory that is read and written line by line in turns does half as much.
template <typename T, typename F>
static inline __attribute__((always_inline)) void write_row(T* out, int64_t n, bool streamed, const F& value) {
    constexpr int64_t kBlock = 4096 / sizeof(T);
    alignas(64) T block[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t m = n - first < kBlock ? n - first : kBlock;
        T* to = streamed ? block : out + first;
        each_pair(m, [&](int64_t i, int64_t count) { store_pair(to + i, value(first + i, count), count); });
        if (streamed) stream_copy(out + first, block, m);
    }
}
static inline void fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

}  // namespace ISA
}  // namespace llava_fast
