// AVX-512 and the tiles of AMX: Sapphire Rapids and later.
#if defined(__AMX_INT8__) && defined(__linux__)
#define PBJAX_COMPILED
#endif
#define PBJAX_TABLE AmxKernels
#define PBJAX_NAME "avx512_amx"
#define PBJAX_TILES
#include "avx512_table.h"
