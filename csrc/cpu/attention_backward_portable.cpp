#define ISA portable
#include "cpu/attention_backward_kernels.h"
