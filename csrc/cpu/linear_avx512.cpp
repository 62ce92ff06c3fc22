#define ISA avx512
#include "cpu/linear_kernels.h"
