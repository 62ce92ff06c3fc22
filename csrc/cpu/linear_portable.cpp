#define ISA portable
#include "cpu/linear_kernels.h"
