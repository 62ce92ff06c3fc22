#define ISA portable
#include "cpu/rowwise_kernels.h"
