#define ISA portable
#include "cpu/spatial_pool_kernels.h"
