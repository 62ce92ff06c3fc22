#define ISA avx2
#include "cpu/cross_entropy_kernels.h"
