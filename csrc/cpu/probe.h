// Limits that benchmarks quote: the multiply-add rate that the arithmetic units reach with no memory in the way, and a copy.
#pragma once

#include <cstdint>

namespace llava_fast {

// fp32 operations a second (two a multiply-add) on `threads` threads in the instruction set in use; takes some 20 ms.
double fma_rate(int threads);

// bf16 operations a second of the tile units (AMX) on `threads` threads; 0 where there are none. Some 20 ms.
double tile_rate(int threads);

// Written around the caches as the kernels write their outputs: a line that is to be written whole need not be read first, and a copy that
// reads it, as torch's does, moves three bytes for two. Both begin with a line of 64 bytes.
void copy_past_caches(void* to, const void* from, int64_t bytes, int threads);

// Does rounds * 4 products of tiles.
void tile_rounds_amx(int64_t rounds);

// Does rounds * 12 multiply-adds on vectors of the returned width and leaves their sum in *out, so that none is optimised away.
int fma_rounds_portable(int64_t rounds, float* out);
int fma_rounds_avx2(int64_t rounds, float* out);
int fma_rounds_avx512(int64_t rounds, float* out);

}  // namespace llava_fast
