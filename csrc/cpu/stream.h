// When to write around the caches; see stream_copy in rows.h.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llava_fast {

// Rows of `width` elements that begin with a line each, and are more than a cache would keep until they are read.
static inline bool streams(DType dtype, const void* out, int64_t rows, int64_t width) {
    const int64_t bytes = width * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
    return rows * bytes >= 8 << 20 && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

}  // namespace llava_fast
