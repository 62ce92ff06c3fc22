#define ISA avx512
#include "cpu/spatial_pool_kernels.h"
