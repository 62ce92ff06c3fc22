// 16-bit and 8-bit floats as their bits, widened to fp32 and rounded back to nearest even.
//
// Every function here is static inline: this header is compiled once per instruction set, and a shared inline function would
// let the linker keep the AVX-512 copy for all of them, which is an illegal instruction on a smaller CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace llava_fast {

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

struct e4m3 {  // torch's float8_e4m3fn: no infinity, NaN is 0x7f, the largest number is 448
    uint8_t bits;
};

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float widen(float value) {
    return value;
}
static inline double widen(double value) {
    return value;
}
static inline float widen(bf16 value) {
    return float_of(static_cast<uint32_t>(value.bits) << 16);
}

// The exponent is rebased by a multiplication, which also normalises subnormals; no branch, so that loops vectorise.
static inline float widen(f16 value) {
    uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep the highest exponent
    return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}

static inline float widen(e4m3 value) {
    uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fu) << 20;
    uint32_t sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
    uint32_t special = magnitude == 0x07f00000u ? 0x7fc00000u : 0u;
    return float_of(bits_of(float_of(magnitude) * 0x1p120f) | special | sign);
}

static inline void narrow(float value, float* out) {
    *out = value;
}
static inline void narrow(double value, double* out) {
    *out = value;
}

static inline void narrow(float value, bf16* out) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

static inline void narrow(float value, f16* out) {
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Below 2^-14 the spacing is 2^-24, which is that of fp32 numbers next to 0.5: adding 0.5 rounds to it.
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out->bits = static_cast<uint16_t>(half | sign);
}

// Saturates at 448, where torch's conversion gives NaN: what is stored has a scale, and one outlier must not poison a row.
static inline void narrow(float value, e4m3* out) {
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    bool nan = magnitude > 0x7f800000u;
    magnitude = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;
    uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - 0x3c000000u) >> 20;
    // Below 2^-6 the spacing is 2^-9, which is that of fp32 numbers next to 2^14.
    uint32_t subnormal = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u;
    uint32_t rounded = magnitude < 0x3c800000u ? subnormal : normal;
    out->bits = static_cast<uint8_t>((nan ? 0x7fu : rounded) | ((bits >> 24) & 0x80u));
}

}  // namespace llava_fast
