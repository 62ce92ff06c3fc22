#define ISA portable
#include "cpu/sampling_kernels.h"
