#define ISA avx2
#include "cpu/sampling_kernels.h"
