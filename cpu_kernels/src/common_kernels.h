// The parts of a kernel table that compilers vectorize by themselves. Each file of kernels includes this once, in its own
// unnamed namespace and under its own instruction flags: nothing here may have external linkage, since the linker would
// then keep one copy for all of them.
//
// Floating-point operations follow activations.py and epilogue.py one by one; the files are compiled without contraction.

namespace {

inline float PowerOfTwo(int32_t exponent) {
  const uint32_t pattern = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &pattern, sizeof value);
  return value;
}

inline uint32_t Pattern(float value) {
  uint32_t pattern;
  __builtin_memcpy(&pattern, &value, sizeof pattern);
  return pattern;
}

inline float FromPattern(uint32_t pattern) {
  float value;
  __builtin_memcpy(&value, &pattern, sizeof value);
  return value;
}

void SplitCode(const int32_t* __restrict codes, int64_t k, int limbs, uint8_t* __restrict out, int64_t limb_stride) {
  for (int limb = 0; limb < limbs; ++limb) {
    uint8_t* __restrict bytes = out + limb * limb_stride;
    const int shift = 8 * (limbs - 1 - limb);
    for (int64_t i = 0; i < k; ++i) bytes[i] = static_cast<uint8_t>(codes[i] >> shift);
  }
}

void Split(const int32_t* codes, int64_t k, int64_t padded_k, int limbs, uint8_t* out, int64_t limb_stride) {
  SplitCode(codes, k, limbs, out, limb_stride);
  for (int limb = 0; limb < limbs; ++limb) __builtin_memset(out + limb * limb_stride + k, 0, padded_k - k);
}

bool Quantize(const float* __restrict x, int64_t k, int64_t padded_k, int activation_bits, uint8_t* limbs,
              int64_t limb_stride, float* unit) {
  const int num_limbs = (activation_bits + 7) / 8;
  // Patterns of magnitudes are ordered as the magnitudes are, infinity and NaN above all others.
  uint32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t magnitude = Pattern(x[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7F800000u;
  const uint32_t smallest = Pattern(PowerOfTwo(-100));
  const uint32_t pattern = !finite || largest < smallest ? smallest : largest;
  const int32_t top = (1 << (activation_bits - 1)) - 1;
  *unit = FromPattern(pattern) * static_cast<float>((top + 1) / (2.0 * top));
  for (int limb = 0; limb < num_limbs; ++limb) {
    __builtin_memset(limbs + limb * limb_stride, 0, padded_k);
  }
  if (!finite) return false;

  const int32_t exponent = static_cast<int32_t>(pattern >> 23) - 127;
  const uint32_t significand = (pattern & 0x7FFFFFu) | 0x800000u;
  const int32_t exponent_limited = exponent < 126 ? exponent : 126;
  const uint32_t reciprocal = static_cast<uint32_t>((uint64_t{1} << 47) / significand);
  // The product of the two constants is rounded to float32 first, as JAX does with a Python number.
  float inverse = static_cast<float>(reciprocal) * static_cast<float>(0x1p-24 * top);
  inverse = inverse * PowerOfTwo(exponent_limited - exponent);
  const float power = PowerOfTwo(-exponent_limited);
  const float limit = static_cast<float>(top);
  constexpr int64_t kBlock = 256;
  int32_t codes[kBlock];
  for (int64_t start = 0; start < k; start += kBlock) {
    const int64_t size = k - start < kBlock ? k - start : kBlock;
    for (int64_t i = 0; i < size; ++i) {
      float value = __builtin_rintf((x[start + i] * power) * inverse);
      value = value < -limit ? -limit : value;
      value = value > limit ? limit : value;
      codes[i] = static_cast<int32_t>(value);
    }
    SplitCode(codes, size, num_limbs, limbs + start, limb_stride);
  }
  return true;
}

int32_t Sum(const uint8_t* limb, int64_t num_k, bool is_signed) {
  int32_t total = 0;
  if (is_signed) {
    for (int64_t i = 0; i < num_k; ++i) total += static_cast<int8_t>(limb[i]);
  } else {
    for (int64_t i = 0; i < num_k; ++i) total += limb[i];
  }
  return total;
}

// 2 * sum - (2**layers - 1) * limb_sum fits int32, its parts need not: unsigned arithmetic wraps.
inline float LimbValue(int32_t sum, int shift, uint32_t offset) {
  return static_cast<float>(static_cast<int32_t>(2 * static_cast<uint32_t>(sum >> shift) - offset));
}

template <int kLimbs>
void CombineLimbs(const Columns& columns, int64_t width, float* __restrict total) {
  uint32_t offsets[2][kLimbs];
  for (int column = 0; column < 2; ++column) {
    const uint32_t largest = (1u << columns.layers[column]) - 1;
    for (int limb = 0; limb < kLimbs; ++limb) {
      offsets[column][limb] = largest * static_cast<uint32_t>(columns.limb_sums[limb]);
    }
  }
  const int32_t* __restrict first = columns.sums[0];
  const int32_t* __restrict second = columns.sums[1];
  const int shift = columns.shift[0];
  if (columns.layers[1] == 0) {
    for (int64_t c = 0; c < width; ++c) {
      float value = LimbValue(first[c], shift, offsets[0][0]);
      for (int limb = 1; limb < kLimbs; ++limb) {
        value = value * 256.0f + LimbValue(first[limb * width + c], shift, offsets[0][limb]);
      }
      total[c] = total[c] + value;
    }
    return;
  }
  const int shift_second = columns.shift[1];
  const float factor = PowerOfTwo(columns.layers[1]);
  for (int64_t c = 0; c < width; ++c) {
    float value = LimbValue(first[c], shift, offsets[0][0]);
    float low = LimbValue(second[c], shift_second, offsets[1][0]);
    for (int limb = 1; limb < kLimbs; ++limb) {
      value = value * 256.0f + LimbValue(first[limb * width + c], shift, offsets[0][limb]);
      low = low * 256.0f + LimbValue(second[limb * width + c], shift_second, offsets[1][limb]);
    }
    total[c] = total[c] + (value * factor + low);
  }
}

void Combine(const Columns& columns, int64_t width, float* total) {
  if (columns.limbs == 1) CombineLimbs<1>(columns, width, total);
  if (columns.limbs == 2) CombineLimbs<2>(columns, width, total);
  if (columns.limbs == 3) CombineLimbs<3>(columns, width, total);
}

void ScaleOnly(const float* __restrict group_sum, const float* __restrict scale, float factor, int64_t channels,
               float* __restrict total) {
  for (int64_t c = 0; c < channels; ++c) total[c] = group_sum[c] * factor * scale[c];
}

// Two parts of 12 significant bits, so that every product is exact: epilogue._halves.
inline float HighHalf(float value) { return FromPattern(Pattern(value) & 0xFFFFF000u); }

void ScaleAdd(const float* __restrict group_sum, const float* __restrict scale, float factor, int64_t channels,
              float* __restrict total) {
  for (int64_t c = 0; c < channels; ++c) {
    const float sum = group_sum[c] * factor;
    const float factor_high = HighHalf(scale[c]), factor_low = scale[c] - factor_high;
    const float sum_high = HighHalf(sum), sum_low = sum - sum_high;
    float value = total[c];
    value = value + factor_low * sum_low;
    value = value + factor_low * sum_high;
    value = value + factor_high * sum_low;
    total[c] = value + factor_high * sum_high;
  }
}

void FinishRow(const float* __restrict total, float unit, float poison, int64_t channels, float* __restrict y) {
  for (int64_t c = 0; c < channels; ++c) y[c] = __builtin_fmaf(total[c], unit, poison);
}

// A table that has these, and no others yet.
inline Kernels CommonKernels(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  kernels.quantize = Quantize;
  kernels.split = Split;
  kernels.sum = Sum;
  kernels.combine = Combine;
  kernels.scale_only = ScaleOnly;
  kernels.scale_add = ScaleAdd;
  kernels.finish_row = FinishRow;
  return kernels;
}

}  // namespace
