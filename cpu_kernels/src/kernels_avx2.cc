// AVX2 and FMA.
//
// Without a bit transposition, each bitlayer is spread to bytes by comparing copies of its bytes with one bit each; and
// without a dot product of bytes, codes and limbs go as 16-bit integers through vpmaddwd, two adjacent k at a time.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace pbjax {
#include "common_kernels.h"
#include "generic_kernels.h"

namespace {

using Vector = __m256i;

// Eight channels of one word: eight vectors of code bytes, one for each 4 adjacent k.
void UnpackEight(const uint32_t* data, int64_t layer_stride, int layers, Vector mask, uint8_t* out) {
  Vector codes[8];
  for (int quad = 0; quad < 8; ++quad) codes[quad] = _mm256_setzero_si256();
  const Vector low = _mm256_set1_epi32(0x08040201), high = _mm256_set1_epi32(static_cast<int32_t>(0x80402010u));
  for (int layer = 0; layer < layers; ++layer) {
    const Vector words = _mm256_maskload_epi32(reinterpret_cast<const int*>(data + layer * layer_stride), mask);
    for (int byte = 0; byte < 4; ++byte) {
      // Four copies of this byte in each channel.
      const Vector from = _mm256_add_epi8(
          _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0, 0x04040404, 0x08080808, 0x0C0C0C0C),
          _mm256_set1_epi8(static_cast<char>(byte)));
      const Vector copies = _mm256_shuffle_epi8(words, from);
      const Vector first = _mm256_cmpeq_epi8(_mm256_and_si256(copies, low), low);  // -1 where the bit is set
      const Vector second = _mm256_cmpeq_epi8(_mm256_and_si256(copies, high), high);
      Vector& even = codes[2 * byte];
      Vector& odd = codes[2 * byte + 1];
      even = _mm256_sub_epi8(_mm256_add_epi8(even, even), first);
      odd = _mm256_sub_epi8(_mm256_add_epi8(odd, odd), second);
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(8 - layers);
  const Vector keep = _mm256_set1_epi8(static_cast<char>(0xFF << (8 - layers)));
  for (int quad = 0; quad < 8; ++quad) {
    const Vector aligned = _mm256_and_si256(_mm256_sll_epi16(codes[quad], shift), keep);
    _mm256_storeu_si256(reinterpret_cast<Vector*>(out + 64 * quad), aligned);
  }
}

void Unpack(const WordBlock& block, int64_t width, uint8_t* codes) {
  const Vector lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t word = 0; word < block.words; ++word) {
    for (int64_t c = 0; c < width; c += 8) {
      const int64_t left = block.channels - c;
      const Vector mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left > 8 ? 8 : static_cast<int>(left)), lane);
      // Lanes that are masked out are not read, also where they would lie past the end.
      const uint32_t* data = block.data + (left > 0 ? word * block.word_stride + c : 0);
      UnpackEight(data, block.layer_stride, block.layers, mask, codes + (c / 16 * block.words + word) * 512 + c % 16 * 4);
    }
  }
}

// kRows rows by 16 channels.
template <int kLimbs, int kRows>
void DotPanel(const uint8_t* codes, int64_t words, int64_t width, Vector mask, const LimbRows& rows, int32_t* sums) {
  Vector total[kRows][kLimbs][2];
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int limb = 0; limb < kLimbs; ++limb) {
      total[r][limb][0] = total[r][limb][1] = _mm256_setzero_si256();
    }
  }
  const Vector low_bytes = _mm256_set1_epi16(255);
  for (int64_t quad = 0; quad < 8 * words; ++quad) {
    const Vector* code = reinterpret_cast<const Vector*>(codes + 64 * quad);
    const Vector first = _mm256_and_si256(_mm256_loadu_si256(code), mask);
    const Vector second = _mm256_and_si256(_mm256_loadu_si256(code + 1), mask);
    const Vector first_even = _mm256_and_si256(first, low_bytes), first_odd = _mm256_srli_epi16(first, 8);
    const Vector second_even = _mm256_and_si256(second, low_bytes), second_odd = _mm256_srli_epi16(second, 8);
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int limb = 0; limb < kLimbs; ++limb) {
        int32_t four;
        __builtin_memcpy(&four, rows.data + r * rows.row_stride + limb * rows.limb_stride + 4 * quad, 4);
        const Vector q = _mm256_set1_epi32(four);
        const Vector even = limb == 0 ? _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8) : _mm256_and_si256(q, low_bytes);
        const Vector odd = limb == 0 ? _mm256_srai_epi16(q, 8) : _mm256_srli_epi16(q, 8);
        Vector* sum = total[r][limb];
        sum[0] = _mm256_add_epi32(sum[0], _mm256_add_epi32(_mm256_madd_epi16(first_even, even),
                                                           _mm256_madd_epi16(first_odd, odd)));
        sum[1] = _mm256_add_epi32(sum[1], _mm256_add_epi32(_mm256_madd_epi16(second_even, even),
                                                           _mm256_madd_epi16(second_odd, odd)));
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int limb = 0; limb < kLimbs; ++limb) {
      for (int v = 0; v < 2; ++v) {
        Vector* out = reinterpret_cast<Vector*>(sums + (r * kLimbs + limb) * width + 8 * v);
        _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), total[r][limb][v]));
      }
    }
  }
}

template <int kLimbs>
void DotLimbs(const uint8_t* codes, int64_t words, int64_t width, Vector mask, const LimbRows& rows, int32_t* sums) {
  constexpr int kRows = kLimbs == 1 ? 3 : kLimbs == 2 ? 2 : 1;
  LimbRows part = rows;
  for (int64_t c = 0; c < width; c += 16) {
    int64_t row = 0;
    for (; row + kRows <= rows.rows; row += kRows) {
      part.data = rows.data + row * rows.row_stride;
      DotPanel<kLimbs, kRows>(codes + c * 32 * words, words, width, mask, part, sums + row * kLimbs * width + c);
    }
    for (; row < rows.rows; ++row) {
      part.data = rows.data + row * rows.row_stride;
      DotPanel<kLimbs, 1>(codes + c * 32 * words, words, width, mask, part, sums + row * kLimbs * width + c);
    }
  }
}

void Dot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows, int32_t* sums) {
  const Vector masks = _mm256_set1_epi8(static_cast<char>(mask));
  if (rows.limbs == 1) DotLimbs<1>(codes, words, width, masks, rows, sums);
  if (rows.limbs == 2) DotLimbs<2>(codes, words, width, masks, rows, sums);
  if (rows.limbs == 3) DotLimbs<3>(codes, words, width, masks, rows, sums);
}

// v_b from 4 adjacent k of 8 channels at a time.
void Values(const uint8_t* high, const uint8_t* low, int64_t words, int64_t width, int count, float* values) {
  const Vector mask = _mm256_set1_epi32(static_cast<int32_t>(0xFFFFu & (0xFFFF0000u >> count)));
  const __m256 step = _mm256_set1_ps(0x1p-15f), offset = _mm256_set1_ps(PowerOfTwo(-count) - 1.0f);
  const Vector byte = _mm256_set1_epi32(255);
  for (int64_t half = 0; half < width / 16 * 16 * words; ++half) {  // of 16 channels and 4 k, of all channels
    const Vector first = _mm256_loadu_si256(reinterpret_cast<const Vector*>(high + 32 * half));
    const Vector second = low == nullptr ? _mm256_setzero_si256()
                                         : _mm256_loadu_si256(reinterpret_cast<const Vector*>(low + 32 * half));
    for (int i = 0; i < 4; ++i) {
      const __m128i shift = _mm_cvtsi32_si128(8 * i);
      const Vector top = _mm256_and_si256(_mm256_srl_epi32(first, shift), byte);
      const Vector bottom = _mm256_and_si256(_mm256_srl_epi32(second, shift), byte);
      const Vector code = _mm256_and_si256(_mm256_or_si256(_mm256_slli_epi32(top, 8), bottom), mask);
      float* out = values + (half / 2 * 4 + i) * 16 + half % 2 * 8;
      _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), step, offset));
    }
  }
}

// kRows rows by 16 channels.
template <int kRows>
void FloatPanel(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride, float* sums) {
  __m256 total[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    total[r][0] = _mm256_loadu_ps(sums + r * width);
    total[r][1] = _mm256_loadu_ps(sums + r * width + 8);
  }
  for (int64_t i = 0; i < num_k; ++i) {
    const __m256 first = _mm256_loadu_ps(values + 16 * i), second = _mm256_loadu_ps(values + 16 * i + 8);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(x + r * row_stride + i);
      total[r][0] = _mm256_fmadd_ps(factor, first, total[r][0]);
      total[r][1] = _mm256_fmadd_ps(factor, second, total[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(sums + r * width, total[r][0]);
    _mm256_storeu_ps(sums + r * width + 8, total[r][1]);
  }
}

void FloatDot(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride, int64_t rows,
              float* sums) {
  for (int64_t c = 0; c < width; c += 16) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      FloatPanel<4>(values + c * num_k, num_k, width, x + row * row_stride, row_stride, sums + row * width + c);
    }
    for (; row < rows; ++row) {
      FloatPanel<1>(values + c * num_k, num_k, width, x + row * row_stride, row_stride, sums + row * width + c);
    }
  }
}

}  // namespace

const Kernels* Avx2Kernels() {
  static const Kernels kernels = [] {
    Kernels table = CommonKernels("avx2");
    table.unpack = Unpack;
    table.dot = Dot;
    table.values = Values;
    table.float_dot = FloatDot;
    return table;
  }();
  return &kernels;
}

}  // namespace pbjax
#else
namespace pbjax {
const Kernels* Avx2Kernels() { return nullptr; }
}  // namespace pbjax
#endif
