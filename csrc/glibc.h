// References the oldest version of glibc's functions, so that a wheel built on a new system loads on old ones: without
// this, one made with glibc 2.36 asks for 2.34, and torch's own wheels for 2.28. The newer versions of exp and log differ
// in errno only, those of dlopen and dlsym in the library that holds them. tools/packages.sh prints what a wheel asks for.
#pragma once

#include <cmath>

#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__CUDACC__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif
