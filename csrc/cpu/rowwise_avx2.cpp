#define ISA avx2
#include "cpu/rowwise_kernels.h"
