typedef float Float4 __attribute__((vector_size(16)));
#define ISA portable
#define VECTOR Float4
#define WIDTH 4
#define SPREAD(scalar) (Float4{} + (scalar))
#define FMA(a, b, c) ((a) * (b) + (c))
#include "cpu/probe_kernels.h"
