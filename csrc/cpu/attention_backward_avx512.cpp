#define ISA avx512
#include "cpu/attention_backward_kernels.h"
