#define ISA avx2
#include "cpu/spatial_pool_kernels.h"
