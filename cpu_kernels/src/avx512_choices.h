// Which method is fastest on AVX-512, by activations, rows and bitlayers. Included like common_kernels.h.
//
// Source: examples/benchmarks/results/cpu_methods.csv, written by `pbjax_time_methods 4096` (tests/time_methods.cc) on 2 cores
// of an Intel Xeon without AMX, 2026-11-30: up to 16 rows and 8 bitlayers, words in cache. One row of one limb and 2 bitlayers
// is level there; in calls from JAX, and of words from memory, stream has 0.8 to 0.9 of the time of look-ups. Look-ups of
// limbs need VBMI; tables without them go on to the next line.

namespace {

constexpr Choice kChoices[] = {
    // limbs, sweep, rows, bitlayers at most
    {1, false, 1, 1, Method::kLookup},
    {1, false, 1, 16, Method::kStream},
    {1, false, 8, 1, Method::kLookup},
    {1, false, 16, 8, Method::kStream},
    {2, false, 16, 1, Method::kLookup},
    {2, false, 1, 16, Method::kStream},
    {2, false, 16, 8, Method::kStream},
    {3, false, 16, 1, Method::kLookup},
    {3, false, 1, 16, Method::kStream},
    {3, false, 16, 8, Method::kStream},
    {0, false, 1, 8, Method::kLookup},
    {0, false, 2, 4, Method::kLookup},
    {0, false, 2, 8, Method::kCodes},
    {0, false, 8, 2, Method::kLookup},
    {0, false, 16, 1, Method::kLookup},
    {1, true, 8, 16, Method::kLookup},
    {2, true, 16, 16, Method::kLookup},
    {3, true, 16, 16, Method::kLookup},
    {0, true, 16, 16, Method::kLookup},  // half of the time of kBlocks and less
};

}  // namespace
