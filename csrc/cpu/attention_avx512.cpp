#define ISA avx512
#include "cpu/attention_kernels.h"
