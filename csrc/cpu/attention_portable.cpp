#define ISA portable
#include "cpu/attention_kernels.h"
