// The kernels for AMX with their tiles written out, for machines that have none, and for sanitizers.
#define PBJAX_TABLE EmulatedAmxKernels
#define PBJAX_NAME "avx512_amx, emulated"
#define PBJAX_TILES
#define PBJAX_EMULATED_TILES
#if defined(__AVX512VNNI__) && defined(__GFNI__) && defined(__AVX512VBMI__)
#define PBJAX_COMPILED
#endif
#include "avx512_table.h"
