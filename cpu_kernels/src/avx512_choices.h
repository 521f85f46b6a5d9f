// What to do on AVX-512.
namespace {

constexpr Choice kChoices[] = {
    {1, true, 8, 16, Method::kLookup}, {2, true, 8, 16, Method::kLookup}, {3, true, 8, 16, Method::kLookup},
    {1, false, 1, 16, Method::kStream}, {2, false, 1, 16, Method::kStream}, {3, false, 1, 16, Method::kStream},
    {0, true, 8, 16, Method::kLookup},  {0, false, 1, 8, Method::kLookup},
};

}  // namespace
