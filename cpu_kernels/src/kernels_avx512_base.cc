// AVX-512 as Skylake has it.
#define PBJAX_TABLE Avx512BaseKernels
#define PBJAX_NAME "avx512_base"
#if defined(__AVX512BW__)
#define PBJAX_COMPILED
#endif
#include "avx512_table.h"
