// The multiply-add rate that the arithmetic units reach with no memory in the way: a limit that benchmarks quote.
#pragma once

#include <cstdint>

namespace llava_fast {

// fp32 operations a second (two a multiply-add) on `threads` threads in the instruction set in use; takes some 20 ms.
double fma_rate(int threads);

// Does rounds * 12 multiply-adds on vectors of the returned width and leaves their sum in *out, so that none is optimised away.
int fma_rounds_portable(int64_t rounds, float* out);
int fma_rounds_avx2(int64_t rounds, float* out);
int fma_rounds_avx512(int64_t rounds, float* out);

}  // namespace llava_fast
