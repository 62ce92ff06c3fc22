#define ISA avx2
#include "cpu/linear_kernels.h"
