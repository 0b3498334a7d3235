// Any processor: 16-byte vectors, which are SSE2 on x86-64 and Neon on Arm.
#define FASTKD_ISA portable
#define FASTKD_VECTOR_BYTES 16
#include "isa_kernels.h"
