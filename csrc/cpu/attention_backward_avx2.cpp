#define ISA avx2
#include "cpu/attention_backward_kernels.h"
