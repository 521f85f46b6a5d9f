// Which method is fastest with the tiles of AMX, as avx512_choices.h. Included like common_kernels.h.
//
// Source: examples/benchmarks/results/cpu_methods_amx.csv, written by `pbjax_time_methods 4096` (tests/time_methods.cc) on 2
// cores of an Intel Xeon, 2026-11-30: up to 16 rows and 8 bitlayers. Between the numbers of rows that
// were timed a limit lies where lines through their times cross.

namespace {

constexpr Choice kChoices[] = {
    // limbs, sweep, rows, bitlayers at most
    {1, false, 1, 16, Method::kLookup},
    {1, false, 12, 16, Method::kStream},
    {2, false, 8, 1, Method::kLookup},
    {2, false, 8, 16, Method::kStream},
    {3, false, 4, 1, Method::kLookup},
    {3, false, 5, 16, Method::kStream},
    {0, false, 1, 8, Method::kLookup},
    {0, false, 2, 4, Method::kLookup},
    {0, false, 2, 8, Method::kCodes},
    {0, false, 16, 2, Method::kLookup},
    {1, true, 6, 16, Method::kLookup},
    {2, true, 5, 16, Method::kLookup},
    {3, true, 4, 16, Method::kLookup},
    {0, true, 16, 16, Method::kLookup},
};

}  // namespace
