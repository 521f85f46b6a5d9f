// AVX-512 with VNNI, GFNI and VBMI: Ice Lake, Zen 4 and later.
#define PBJAX_TABLE Avx512Kernels
#define PBJAX_NAME "avx512"
#if defined(__AVX512VNNI__) && defined(__GFNI__) && defined(__AVX512VBMI__)
#define PBJAX_COMPILED
#endif
#include "avx512_table.h"
