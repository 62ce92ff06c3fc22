#define ISA portable
#include "cpu/cross_entropy_kernels.h"
