// The table of AVX-512, once for each set of its extensions: PBJAX_TABLE is the function that returns it, PBJAX_NAME its
// name, PBJAX_TILES is defined for those with tiles. Included by kernels_avx512*.cc, each compiled with its own.
#include "kernels.h"

#if defined(PBJAX_COMPILED)
#include <immintrin.h>

#include <utility>

namespace pbjax {
#include "common_kernels.h"
#include "avx512_vectors.h"
#include "avx512_transpose.h"
#include "avx512_stream.h"
#include "avx512_blocks.h"
#include "avx512_floats.h"
#include "avx512_lookup.h"
#if defined(PBJAX_TILES)
#include "amx_tiles.h"
#include "amx_blocks.h"
#include "amx_choices.h"
#else
#include "avx512_choices.h"
#endif

const Kernels* PBJAX_TABLE() {
  static const Kernels kernels = [] {
    Kernels table = CommonKernels(PBJAX_NAME);
    table.unpack = Unpack;
    table.dot = Dot;
#if defined(PBJAX_TILES)
    table.dot = TileDot;
#endif
    table.values = Values;
    table.float_dot = FloatDot;
    table.stream = Stream;
    table.float_codes = FloatCodes;
    table.make_tables = MakeTables;
    table.make_float_tables = MakeFloatTables;
    table.lookup = Lookup;
    table.float_lookup = FloatLookup;
    table.add_layers = AddLayers;
    table.add_float_layers = AddFloatLayers;
    table.choices = kChoices;
    table.num_choices = sizeof kChoices / sizeof *kChoices;
    return table;
  }();
  return &kernels;
}

}  // namespace pbjax
#else
namespace pbjax {
const Kernels* PBJAX_TABLE() { return nullptr; }
}  // namespace pbjax
#endif
