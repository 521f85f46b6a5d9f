// Products of float rows with weights as floats in cache, and with codes. Included like common_kernels.h.

namespace {

void Values(const uint8_t* high, const uint8_t* low, int64_t words, int64_t width, int count, float* values) {
  const Vector mask = _mm512_set1_epi32(static_cast<int32_t>(0xFFFFu & (0xFFFF0000u >> count)));
  const __m512 step = _mm512_set1_ps(0x1p-15f), offset = _mm512_set1_ps(PowerOfTwo(-count) - 1.0f);
  const Vector byte = _mm512_set1_epi32(0xFF00);
  for (int64_t quad = 0; quad < width / 16 * 8 * words; ++quad) {  // of all channels
    const Vector first = _mm512_loadu_si512(high + 64 * quad);
    const Vector second = low == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(low + 64 * quad);
    Unroll<4>([&](auto i) PBJAX_INLINE {
      const Vector top = i == 0 ? _mm512_slli_epi32(first, 8) : _mm512_srli_epi32(first, i == 0 ? 0 : 8 * (i - 1));
      Vector code = _mm512_and_si512(top, byte);
      if (low != nullptr) {
        code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(second, 8 * i), _mm512_set1_epi32(255)));
      }
      const __m512 number = _mm512_cvtepi32_ps(_mm512_and_si512(code, mask));
      _mm512_storeu_ps(values + (4 * quad + i) * 16, _mm512_fmadd_ps(number, step, offset));
    });
  }
}

template <int kRows, int kVectors>
void FloatPanel(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride, float* sums) {
  __m512 total[kRows][kVectors];
  Unroll<kRows>([&](auto r) PBJAX_INLINE {
    Unroll<kVectors>([&](auto v) PBJAX_INLINE { total[r][v] = _mm512_loadu_ps(sums + r * width + 16 * v); });
  });
  for (int64_t i = 0; i < num_k; ++i) {
    __m512 value[kVectors];
    Unroll<kVectors>([&](auto v) PBJAX_INLINE { value[v] = _mm512_loadu_ps(values + (v * num_k + i) * 16); });
    Unroll<kRows>([&](auto r) PBJAX_INLINE {
      const __m512 factor = _mm512_set1_ps(x[r * row_stride + i]);
      Unroll<kVectors>([&](auto v) PBJAX_INLINE { total[r][v] = _mm512_fmadd_ps(factor, value[v], total[r][v]); });
    });
  }
  Unroll<kRows>([&](auto r) PBJAX_INLINE {
    Unroll<kVectors>([&](auto v) PBJAX_INLINE { _mm512_storeu_ps(sums + r * width + 16 * v, total[r][v]); });
  });
}

// All rows in panels of kRows, what is left in smaller ones.
template <int kVectors, int kRows>
void FloatRows(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride, int64_t rows,
               float* sums) {
  const bool smaller = SmallerPanels(rows, kRows);
  for (; rows >= kRows && !smaller; rows -= kRows) {
    FloatPanel<kRows, kVectors>(values, num_k, width, x, row_stride, sums);
    x += kRows * row_stride;
    sums += kRows * width;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) FloatRows<kVectors, kRows - 1>(values, num_k, width, x, row_stride, rows, sums);
  }
}

void FloatDot(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride, int64_t rows,
              float* sums) {
  int64_t c = 0;
  for (; c + 64 <= width; c += 64) FloatRows<4, 6>(values + c * num_k, num_k, width, x, row_stride, rows, sums + c);
  for (; c < width; c += 16) FloatRows<1, 6>(values + c * num_k, num_k, width, x, row_stride, rows, sums + c);
}

// A byte of code minus 128 in the top byte of a lane is a float32 times 2**24 after one conversion, and
// v_b = (code - 128) / 128 + 2**-b. So the sum of x times that is taken, and 2**-b times the sum of x added at the end.
template <int kRows, int kVectors>
void CodePanel(const uint8_t* codes, int64_t words, int64_t width, int count, const float* x, int64_t row_stride,
               float* sums) {
  __m512 total[kRows][kVectors][4];
  Unroll<kRows>([&](auto r) PBJAX_INLINE {
    Unroll<kVectors>([&](auto v) PBJAX_INLINE {
      Unroll<4>([&](auto i) PBJAX_INLINE { total[r][v][i] = _mm512_setzero_ps(); });
    });
  });
  const Vector mask = _mm512_set1_epi8(static_cast<char>(0xFF00 >> count)), top = _mm512_set1_epi8(-128);
  Vector to_top[4];
  Unroll<4>([&](auto i) PBJAX_INLINE {
    const int byte = static_cast<int>(0x00808080u | static_cast<uint32_t>(i) << 24);
    to_top[i] = _mm512_add_epi32(_mm512_set1_epi32(byte), _mm512_set4_epi32(12 << 24, 8 << 24, 4 << 24, 0));
  });
  for (int64_t quad = 0; quad < 8 * words; ++quad) {
    Unroll<kVectors>([&](auto v) PBJAX_INLINE {
      const Vector code = _mm512_loadu_si512(codes + v * 512 * words + 64 * quad);
      const Vector centred = _mm512_xor_si512(_mm512_and_si512(code, mask), top);
      Unroll<4>([&](auto i) PBJAX_INLINE {
        const __m512 number = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(centred, to_top[i]));
        Unroll<kRows>([&](auto r) PBJAX_INLINE {
          const __m512 factor = _mm512_set1_ps(x[r * row_stride + 4 * quad + i]);
          total[r][v][i] = _mm512_fmadd_ps(factor, number, total[r][v][i]);
        });
      });
    });
  }
  Unroll<kRows>([&](auto r) PBJAX_INLINE {
    __m128 four = _mm_setzero_ps();
    for (int64_t quad = 0; quad < 8 * words; ++quad) four = _mm_add_ps(four, _mm_loadu_ps(x + r * row_stride + 4 * quad));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    const __m512 row_sum = _mm512_set1_ps(PowerOfTwo(-count) * (four[0] + four[1]));
    Unroll<kVectors>([&](auto v) PBJAX_INLINE {
      const __m512* parts = total[r][v];
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
      float* out = sums + r * width + 16 * v;
      const __m512 before = _mm512_add_ps(_mm512_loadu_ps(out), row_sum);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, _mm512_set1_ps(0x1p-31f), before));
    });
  });
}

template <int kRows>
void CodeRows(const uint8_t* codes, int64_t words, int64_t width, int count, const float* x, int64_t row_stride,
              float* sums) {
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) {
    CodePanel<kRows, 2>(codes + c * 32 * words, words, width, count, x, row_stride, sums + c);
  }
  if (c < width) CodePanel<kRows, 1>(codes + c * 32 * words, words, width, count, x, row_stride, sums + c);
}

void FloatCodes(const uint8_t* codes, int64_t words, int64_t width, int count, const float* x, int64_t row_stride,
                int64_t rows, float* sums) {
  if (rows == 1) CodeRows<1>(codes, words, width, count, x, row_stride, sums);
  if (rows == 2) CodeRows<2>(codes, words, width, count, x, row_stride, sums);
}

}  // namespace
