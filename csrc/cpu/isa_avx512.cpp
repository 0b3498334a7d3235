#if defined(__x86_64__)
// Included before the target is raised, so that the inline functions of these headers run on any processor: the linker
// may keep this file's copy for all. The formulas are included after it; they are always inlined.
#include <immintrin.h>

#include <cstring>

#include "../rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define FASTKD_ISA avx512
#define FASTKD_VECTOR_BYTES 64
#define FASTKD_USE_AVX512
#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
