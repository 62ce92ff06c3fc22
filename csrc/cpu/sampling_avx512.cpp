#define ISA avx512
#include "cpu/sampling_kernels.h"
