#include <immintrin.h>
#define ISA avx2
#define VECTOR __m256
#define WIDTH 8
#define SPREAD(scalar) _mm256_set1_ps(scalar)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "cpu/probe_kernels.h"
