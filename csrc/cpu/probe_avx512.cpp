#include <immintrin.h>
#define ISA avx512
#define VECTOR __m512
#define WIDTH 16
#define SPREAD(scalar) _mm512_set1_ps(scalar)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "cpu/probe_kernels.h"
