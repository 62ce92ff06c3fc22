// Products of bf16 tiles at fp32's accuracy (see linear_amx.cpp): numbers as parts, and the loop over tiles.
//
// Only static and templated functions inside the namespace of the instruction set, and nothing from the standard library:
// see half.h for the reason.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace llava_fast {
namespace ISA {

constexpr int64_t kTile = 16, kPanel = 32, kStep = 32;
constexpr int64_t kTileSize = kTile * kStep, kSums = kTile * kTile;  // bf16 of an operand, floats of sums: both 1 KB
constexpr int64_t kHeld = 5 << 18;  // bytes of an operand and of sums that stay in L2, which is 2 MB in every CPU that has AMX

// How many bf16 make up a number; int4, and int8 with more than one scale a row, are multiplied by their scales first.
template <typename T>
constexpr int kParts = 3;
template <>
constexpr int kParts<bf16> = 1;
template <>
constexpr int kParts<f16> = 2;

// The parts, each in the upper half of its lane: the leading eight bits of what the others left.
template <int P>
static inline void split(vec x, __m512i (&part)[P]) {
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
        part[p] = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
        const vec head = _mm512_castsi512_ps(part[p]);
        if (p + 1 < P) x = _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(x, head, _CMP_NEQ_UQ), x, head);  // infinity - infinity is 0 here
    }
}

// 32 numbers as P bf16 each, from their two halves.
template <int P>
static inline void join(vec low, vec high, __m512i (&packed)[P]) {
    __m512i part[2][P];
    split(low, part[0]);
    split(high, part[1]);
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17,
                                           15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) packed[p] = _mm512_permutex2var_epi16(part[0][p], upper, part[1][p]);
}

// Two rows of the right operand, 16 columns of them: pairs, a tile apart for each part.
template <int P>
static inline void pair(vec first, vec second, bf16* to) {
    __m512i even[P], odd[P];
    split(first, even);
    split(second, odd);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) _mm512_store_si512(to + p * kTileSize, _mm512_or_si512(_mm512_srli_epi32(even[p], 16), odd[p]));
}

// A panel of the left operand as tiles: where it lies in memory, or packed.
struct Left {
    const bf16* from;
    int64_t stride, step;  // elements between rows and between the products of a panel
};

// sums[2 t + n] = tile t of a panel of the left operand times tile n of a panel of the right one, over all steps. x_tile: elements from a
// tile of the right one to the next.
// ahead(s) fetches, step by step, what will be needed next.
template <int PW, int PX, int N, typename F>
static inline void products(Left w, const bf16* x, int64_t x_tile, int64_t steps, float* sums, const F& ahead) {
    asm volatile("" ::: "memory");  // the intrinsics do not say which memory they read
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, x += PX * kTileSize) {
        ahead(s);
        for (int i = 0; i < PW; ++i, w.from += w.step) {
            _tile_loadd(4, w.from, w.stride * 2);
            _tile_loadd(5, w.from + w.stride * kTile, w.stride * 2);
            for (int j = 0; j < PX && i + j < 3; ++j) {
                _tile_loadd(6, x + j * kTileSize, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 5, 6);
                if (N == 1) continue;
                _tile_loadd(7, x + j * kTileSize + x_tile, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 2 * kSums, 64);
    if (N == 2) {
        _tile_stored(1, sums + kSums, 64);
        _tile_stored(3, sums + 3 * kSums, 64);
    }
    asm volatile("" ::: "memory");
}

struct TileShapes {
    alignas(64) uint8_t bytes[64] = {1};  // palette 1

    TileShapes() {
        for (int t = 0; t < 8; ++t) {
            bytes[16 + 2 * t] = 64;
            bytes[48 + t] = kTile;
        }
        asm volatile("" : : "r"(bytes) : "memory");  // GCC 12 takes ldtilecfg to read the first 8 bytes alone
        _tile_loadconfig(bytes);
    }
    ~TileShapes() { _tile_release(); }
};

}  // namespace ISA
}  // namespace llava_fast
