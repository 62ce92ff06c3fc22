#define ISA avx512
#include "cpu/cross_entropy_kernels.h"
