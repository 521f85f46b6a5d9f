// AVX-512 with VNNI, but not GFNI: Cascade Lake, Cooper Lake.
#define PBJAX_TABLE Avx512VnniKernels
#define PBJAX_NAME "avx512_vnni"
#if defined(__AVX512VNNI__)
#define PBJAX_COMPILED
#endif
#include "avx512_table.h"
