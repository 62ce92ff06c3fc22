#define ISA avx512
#include "cpu/rowwise_kernels.h"
