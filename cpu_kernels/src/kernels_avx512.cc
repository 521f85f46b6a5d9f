// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later).
//
// A byte of a word of one bitlayer holds 8 consecutive k of one channel. Bytes of up to 8 bitlayers, interleaved,
// are an 8 x 8 bit matrix, and gf2p8affineqb with the identity as its operand transposes it to 8 code bytes. vpdpbusd
// then multiplies code bytes with limbs of the activations and sums 4 adjacent k. It takes one unsigned and one signed
// operand: a signed limb goes with the codes as they are, an unsigned limb with codes below 128, or with codes minus
// 128, where 128 * sum(limb) goes back in at the end.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__GFNI__)
#include <immintrin.h>

#include <utility>

namespace pbjax {
#include "common_kernels.h"

namespace {

using Vector = __m512i;

// body(0), .., body(kCount - 1) written out, with numbers that are constants: compilers keep arrays in registers only if
// no loop is left to index them.
#define PBJAX_INLINE __attribute__((always_inline))

template <typename Body, int... kIndex>
PBJAX_INLINE inline void UnrollSequence(const Body& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}

template <int kCount, typename Body>
PBJAX_INLINE inline void Unroll(const Body& body) {
  UnrollSequence(body, std::make_integer_sequence<int, kCount>());
}

// sum + the products of 4 unsigned and 4 signed bytes, in each 32-bit lane. As an instruction, since compilers copy
// registers around the intrinsic: GCC 12 takes twice the time for a sweep.
PBJAX_INLINE inline void AddProducts(Vector& sum, Vector of_unsigned, Vector of_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_unsigned), "v"(of_signed));
}

PBJAX_INLINE inline Vector BroadcastFour(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return _mm512_set1_epi32(four);
}

inline Vector Transpose(Vector bits) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), bits, 0);
}

// Bitlayers that share a byte of code: 1, 2, 4 or 8.
constexpr int Depth(int layers) { return layers > 4 ? 8 : layers > 2 ? 4 : layers; }

// The interleaved bytes of 16 channels of one word: in each 64-bit lane 8 / kDepth pieces of kDepth bytes.
//   depth 8: out[2 * c + h], lane of 128 bits L: channel 4 * L + c, k = 16 * h ..
//   depth 4: out[c], L: channel 4 * L + c; qword p, piece s: k = 16 * p + 8 * s ..
//   depth 2: out[r], L: qword q: channel 4 * L + 2 * r + q; piece s: k = 8 * s ..
//   depth 1: out[0]: qword q: channels 2 * q and 2 * q + 1; 4 pieces each
template <int kLayers>
inline void Interleave(const uint32_t* data, int64_t layer_stride, __mmask16 mask, Vector* out) {
  constexpr int kDepth = Depth(kLayers);
  Vector bits[kDepth];
  for (int i = 0; i < kDepth; ++i) {
    bits[i] = i < kLayers ? _mm512_maskz_loadu_epi32(mask, data + i * layer_stride) : _mm512_setzero_si512();
  }
  if constexpr (kDepth == 1) out[0] = bits[0];
  if constexpr (kDepth == 2) {
    out[0] = _mm512_unpacklo_epi8(bits[0], bits[1]);
    out[1] = _mm512_unpackhi_epi8(bits[0], bits[1]);
  }
  if constexpr (kDepth >= 4) {
    constexpr int kHalves = kDepth / 4;
    Vector four[kHalves][4];  // 4 bytes of 4 bitlayers for each of 4 k, channel 4 * L + c
    for (int h = 0; h < kHalves; ++h) {
      const Vector low01 = _mm512_unpacklo_epi8(bits[4 * h], bits[4 * h + 1]);
      const Vector high01 = _mm512_unpackhi_epi8(bits[4 * h], bits[4 * h + 1]);
      const Vector low23 = _mm512_unpacklo_epi8(bits[4 * h + 2], bits[4 * h + 3]);
      const Vector high23 = _mm512_unpackhi_epi8(bits[4 * h + 2], bits[4 * h + 3]);
      four[h][0] = _mm512_unpacklo_epi16(low01, low23);
      four[h][1] = _mm512_unpackhi_epi16(low01, low23);
      four[h][2] = _mm512_unpacklo_epi16(high01, high23);
      four[h][3] = _mm512_unpackhi_epi16(high01, high23);
    }
    for (int c = 0; c < 4; ++c) {
      if constexpr (kDepth == 4) {
        out[c] = four[0][c];
      } else {
        out[2 * c] = _mm512_unpacklo_epi32(four[0][c], four[kHalves - 1][c]);
        out[2 * c + 1] = _mm512_unpackhi_epi32(four[0][c], four[kHalves - 1][c]);
      }
    }
  }
}

// Stream: every word is read once, in runs of all channels of the block, and sums stay in the first-level cache.

template <int kDepth>
struct Layout {
  static constexpr int kRegisters = kDepth == 1 ? 1 : kDepth == 2 ? 2 : kDepth;  // interleaved
  static constexpr int kPieces = 8 / kDepth;
  static constexpr int kOperands = kDepth <= 2 ? 4 : 2;                          // of activations, for each word and limb
  static constexpr int kSums = kDepth <= 2 ? 2 : 4;                              // of 16 channels and one limb

  static constexpr int Operand(int reg, int piece) {
    return kDepth == 8 ? reg % 2 : kDepth == 4 ? piece : kDepth == 2 ? piece : piece % 4;
  }
  static constexpr int SumOf(int reg, int piece) {
    return kDepth == 8 ? reg / 2 : kDepth == 4 ? reg : kDepth == 2 ? reg : piece / 4;
  }
};

template <int kDepth>
inline void LoadOperands(const uint8_t* limb, Vector* out) {
  if constexpr (kDepth <= 2) {
    for (int i = 0; i < 4; ++i) {
      int64_t eight;
      __builtin_memcpy(&eight, limb + 8 * i, 8);
      out[i] = _mm512_set1_epi64(eight);
    }
  } else {
    const Vector word = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(limb)));
    const int64_t first = kDepth == 8 ? 1 : 2, second = kDepth == 8 ? 2 : 1;
    const Vector even = _mm512_set_epi64(first, 0, first, 0, first, 0, first, 0);
    out[0] = _mm512_permutexvar_epi64(even, word);
    out[1] = _mm512_permutexvar_epi64(_mm512_add_epi64(even, _mm512_set1_epi64(second)), word);
  }
}

template <int kLayers, int kLimbs, int kWords>
void StreamWords(const WordBlock& block, int64_t first_word, const LimbRows& row, int32_t* scratch) {
  constexpr int kDepth = Depth(kLayers);
  using L = Layout<kDepth>;
  Vector operands[kWords][kLimbs][L::kOperands];
  for (int w = 0; w < kWords; ++w) {
    for (int limb = 0; limb < kLimbs; ++limb) {
      LoadOperands<kDepth>(row.data + limb * row.limb_stride + 32 * (first_word + w), operands[w][limb]);
    }
  }
  const uint32_t* data = block.data + first_word * block.word_stride;
  const bool more = first_word + 2 * kWords <= block.words;
  const int64_t ahead = more ? kWords * block.word_stride : 0;
  for (int64_t c = 0; c < block.channels; c += 16) {
    const int64_t left = block.channels - c;
    const __mmask16 mask = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    int32_t* memory = scratch + c * L::kSums * kLimbs;
    Vector sums[kLimbs][L::kSums];
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      Unroll<L::kSums>([&](auto i) PBJAX_INLINE {
        sums[limb][i] = _mm512_load_si512(memory + 16 * (limb * L::kSums + i));
      });
    });
    Unroll<kWords>([&](auto w) PBJAX_INLINE {
      const uint32_t* words = data + w * block.word_stride + c;
      Unroll<kLayers>([&](auto i) PBJAX_INLINE {
        _mm_prefetch(reinterpret_cast<const char*>(words + i * block.layer_stride + ahead), _MM_HINT_T1);
      });
      Vector interleaved[L::kRegisters];
      Interleave<kLayers>(words, block.layer_stride, mask, interleaved);
      Unroll<L::kRegisters>([&](auto reg) PBJAX_INLINE {
        const Vector merged = Transpose(interleaved[reg]);
        Unroll<L::kPieces>([&](auto piece) PBJAX_INLINE {
          constexpr int kSum = L::SumOf(reg, piece), kOperand = L::Operand(reg, piece);
          Vector code = merged;
          if constexpr (kDepth < 8) {
            code = _mm512_and_si512(_mm512_srli_epi16(merged, 8 - kDepth * (piece + 1)),
                                    _mm512_set1_epi8((1 << kDepth) - 1));
          }
          AddProducts(sums[0][kSum], code, operands[w][0][kOperand]);
          if constexpr (kLimbs > 1 && kDepth == 8) code = _mm512_xor_si512(code, _mm512_set1_epi8(-128));
          Unroll<kLimbs - 1>([&](auto i) PBJAX_INLINE {
            AddProducts(sums[i + 1][kSum], operands[w][i + 1][kOperand], code);
          });
        });
      });
    });
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      Unroll<L::kSums>([&](auto i) PBJAX_INLINE {
        _mm512_store_si512(memory + 16 * (limb * L::kSums + i), sums[limb][i]);
      });
    });
  }
}

// The sums of 16 channels, in order, from lanes that hold parts of them.
template <int kDepth>
inline Vector AddLanes(const int32_t* sums) {
  const Vector a = _mm512_load_si512(sums), b = _mm512_load_si512(sums + 16);
  if constexpr (kDepth <= 2) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    const Vector total = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                                          _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD)));
    return kDepth == 2 ? total : _mm512_shuffle_epi32(total, _MM_PERM_DBCA);
  } else {
    const Vector c = _mm512_load_si512(sums + 32), d = _mm512_load_si512(sums + 48);
    const Vector ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Vector cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
}

// Words whose sums stay in registers: as many as the operands leave room for.
constexpr int StreamStep(int layers, int limbs) { return limbs == 3 || layers <= 2 ? 1 : 2; }

template <int kLayers, int kLimbs>
void StreamBlock(const WordBlock& block, const LimbRows& row, const int32_t* limb_sums, int32_t* scratch,
                 int32_t* sums, int64_t sums_stride) {
  constexpr int kDepth = Depth(kLayers), kSums = Layout<kDepth>::kSums;
  __builtin_memset(scratch, 0, (block.channels + 15) / 16 * 64 * kSums * kLimbs);
  constexpr int kStep = StreamStep(kLayers, kLimbs);
  int64_t word = 0;
  for (; word + kStep <= block.words; word += kStep) StreamWords<kLayers, kLimbs, kStep>(block, word, row, scratch);
  for (; word < block.words; ++word) StreamWords<kLayers, kLimbs, 1>(block, word, row, scratch);
  for (int64_t c = 0; c < block.channels; c += 16) {
    const int64_t left = block.channels - c;
    const __mmask16 mask = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    for (int limb = 0; limb < kLimbs; ++limb) {
      Vector total = AddLanes<kDepth>(scratch + (c * kLimbs + 16 * limb) * kSums);
      if (kDepth == 8 && limb > 0) total = _mm512_add_epi32(total, _mm512_set1_epi32(128 * limb_sums[limb]));
      total = _mm512_srai_epi32(total, kDepth - kLayers);
      _mm512_mask_storeu_epi32(sums + limb * sums_stride + c, mask, total);
    }
  }
}

template <int kLayers>
void StreamLayers(const WordBlock& block, const LimbRows& row, const int32_t* limb_sums, int32_t* scratch,
                  int32_t* sums, int64_t sums_stride) {
  if (row.limbs == 1) StreamBlock<kLayers, 1>(block, row, limb_sums, scratch, sums, sums_stride);
  if (row.limbs == 2) StreamBlock<kLayers, 2>(block, row, limb_sums, scratch, sums, sums_stride);
  if (row.limbs == 3) StreamBlock<kLayers, 3>(block, row, limb_sums, scratch, sums, sums_stride);
}

void Stream(const WordBlock& block, const LimbRows& row, const int32_t* limb_sums, int32_t* scratch, int32_t* sums,
            int64_t sums_stride) {
  using Function = void (*)(const WordBlock&, const LimbRows&, const int32_t*, int32_t*, int32_t*, int64_t);
  static constexpr Function kFunctions[] = {StreamLayers<1>, StreamLayers<2>, StreamLayers<3>, StreamLayers<4>,
                                            StreamLayers<5>, StreamLayers<6>, StreamLayers<7>, StreamLayers<8>};
  kFunctions[block.layers - 1](block, row, limb_sums, scratch, sums, sums_stride);
}

// Blocks: codes once into cache, then a product of bytes for any number of rows.

template <int kLayers>
void UnpackLayers(const WordBlock& block, int64_t width, uint8_t* codes) {
  constexpr int kDepth = Depth(kLayers);
  using L = Layout<kDepth>;
  for (int64_t word = 0; word < block.words; ++word) {
    for (int64_t c = 0; c < block.channels; c += 16) {
      const int64_t left = block.channels - c;
      const __mmask16 mask = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
      Vector interleaved[L::kRegisters];
      const uint32_t* words = block.data + word * block.word_stride + c;
      for (int i = 0; i < kLayers; ++i) {  // the next word, which may be that of the next block; past the end is no fault
        _mm_prefetch(reinterpret_cast<const char*>(words + i * block.layer_stride + block.word_stride), _MM_HINT_T1);
      }
      Interleave<kLayers>(words, block.layer_stride, mask, interleaved);
      uint8_t* out = codes + (c / 16 * block.words + word) * 512;
      Vector piece[8];
      for (int reg = 0; reg < L::kRegisters; ++reg) {
        const Vector merged = Transpose(interleaved[reg]);
        for (int i = 0; i < L::kPieces; ++i) {
          const Vector shifted = i == 0 || kDepth == 8 ? merged : _mm512_slli_epi16(merged, (kDepth * i) % 8);
          piece[reg * L::kPieces + i] =
              kDepth == 8 ? merged
                          : _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(0xFF00 >> kDepth)));
        }
      }
      // Quads of k, each with 16 channels in order.
      const auto store = [&](int quad, Vector value) { _mm512_storeu_si512(out + 64 * quad, value); };
      if constexpr (kDepth <= 2) {
        for (int i = 0; i < 4; ++i) {  // 8 k of 16 channels
          const __m512 a = _mm512_castsi512_ps(piece[i]), b = _mm512_castsi512_ps(piece[i + 4]);
          Vector even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
          Vector odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD));
          if constexpr (kDepth == 1) {
            even = _mm512_shuffle_epi32(even, _MM_PERM_DBCA);
            odd = _mm512_shuffle_epi32(odd, _MM_PERM_DBCA);
          }
          store(2 * i, even);
          store(2 * i + 1, odd);
        }
      } else {
        for (int i = 0; i < 2; ++i) {  // depth 8: 16 k of 16 channels; depth 4: 8 k and the 8 k that are 16 further
          const Vector a = piece[i], b = piece[2 + i], e = piece[4 + i], f = piece[6 + i];
          const Vector ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
          const Vector ef_low = _mm512_unpacklo_epi32(e, f), ef_high = _mm512_unpackhi_epi32(e, f);
          const int first = kDepth == 8 ? 4 * i : 2 * i, second = kDepth == 8 ? first + 2 : first + 4;
          store(first, _mm512_unpacklo_epi64(ab_low, ef_low));
          store(first + 1, _mm512_unpackhi_epi64(ab_low, ef_low));
          store(second, _mm512_unpacklo_epi64(ab_high, ef_high));
          store(second + 1, _mm512_unpackhi_epi64(ab_high, ef_high));
        }
      }
    }
    for (int64_t c = (block.channels + 15) / 16 * 16; c < width; c += 16) {
      for (int quad = 0; quad < 8; ++quad) {
        _mm512_storeu_si512(codes + (c / 16 * block.words + word) * 512 + 64 * quad, _mm512_setzero_si512());
      }
    }
  }
}

void Unpack(const WordBlock& block, int64_t width, uint8_t* codes) {
  using Function = void (*)(const WordBlock&, int64_t, uint8_t*);
  static constexpr Function kFunctions[] = {UnpackLayers<1>, UnpackLayers<2>, UnpackLayers<3>, UnpackLayers<4>,
                                            UnpackLayers<5>, UnpackLayers<6>, UnpackLayers<7>, UnpackLayers<8>};
  kFunctions[block.layers - 1](block, width, codes);
}

// kRows rows by kVectors * 16 channels, sums in registers over all k of the block.
template <int kLimbs, int kRows, int kVectors>
void DotPanel(const uint8_t* codes, int64_t words, int64_t width, Vector mask, const LimbRows& rows, int32_t* sums) {
  Vector total[kLimbs][kRows][kVectors];
  Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
    Unroll<kRows>([&](auto r) PBJAX_INLINE {
      Unroll<kVectors>([&](auto v) PBJAX_INLINE {
        total[limb][r][v] = _mm512_loadu_si512(sums + (r * kLimbs + limb) * width + 16 * v);
      });
    });
  });
  const uint8_t* bytes = rows.data;
  const int64_t row_stride = rows.row_stride, limb_stride = rows.limb_stride;
  for (int64_t quad = 0; quad < 8 * words; ++quad) {
    Vector code[kVectors];
    Unroll<kVectors>([&](auto v) PBJAX_INLINE {
      code[v] = _mm512_and_si512(_mm512_loadu_si512(codes + v * 512 * words + 64 * quad), mask);
    });
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      if constexpr (limb == 1) {
        Unroll<kVectors>([&](auto v) PBJAX_INLINE { code[v] = _mm512_xor_si512(code[v], _mm512_set1_epi8(-128)); });
      }
      Unroll<kRows>([&](auto r) PBJAX_INLINE {
        const Vector q = BroadcastFour(bytes + r * row_stride + limb * limb_stride + 4 * quad);
        Unroll<kVectors>([&](auto v) PBJAX_INLINE {
          Vector& sum = total[limb][r][v];
          AddProducts(sum, limb == 0 ? code[v] : q, limb == 0 ? q : code[v]);
        });
      });
    });
  }
  Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
    Unroll<kRows>([&](auto r) PBJAX_INLINE {
      Unroll<kVectors>([&](auto v) PBJAX_INLINE {
        _mm512_storeu_si512(sums + (r * kLimbs + limb) * width + 16 * v, total[limb][r][v]);
      });
    });
  });
}

// All rows in panels of kRows, what is left in smaller ones.
template <int kLimbs, int kRows, int kVectors>
void DotRows(const uint8_t* codes, int64_t words, int64_t width, Vector mask, LimbRows rows, int32_t* sums) {
  for (; rows.rows >= kRows; rows.rows -= kRows) {
    DotPanel<kLimbs, kRows, kVectors>(codes, words, width, mask, rows, sums);
    rows.data += kRows * rows.row_stride;
    sums += kRows * kLimbs * width;
  }
  if constexpr (kRows > 1) {
    if (rows.rows > 0) DotRows<kLimbs, kRows - 1, kVectors>(codes, words, width, mask, rows, sums);
  }
}

template <int kLimbs>
void DotLimbs(const uint8_t* codes, int64_t words, int64_t width, Vector mask, const LimbRows& rows, int32_t* sums) {
  if constexpr (kLimbs > 1) {  // what the products with codes minus 128 leave out
    const Vector ones = _mm512_set1_epi8(1);
    for (int64_t row = 0; row < rows.rows; ++row) {
      for (int limb = 1; limb < kLimbs; ++limb) {
        const uint8_t* bytes = rows.data + row * rows.row_stride + limb * rows.limb_stride;
        Vector four = _mm512_setzero_si512();
        for (int64_t word = 0; word < words; ++word) {
          four = _mm512_dpbusd_epi32(
              four, _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * word))),
              ones);
        }
        const Vector left_out = _mm512_set1_epi32(128 * _mm512_reduce_add_epi32(four));
        int32_t* out = sums + (row * kLimbs + limb) * width;
        for (int64_t c = 0; c < width; c += 16) {
          _mm512_storeu_si512(out + c, _mm512_add_epi32(_mm512_loadu_si512(out + c), left_out));
        }
      }
    }
  }
  constexpr int kRows = 6 / kLimbs;  // 24 registers of sums
  int64_t c = 0;
  for (; c + 64 <= width; c += 64) DotRows<kLimbs, kRows, 4>(codes + c * 32 * words, words, width, mask, rows, sums + c);
  for (; c < width; c += 16) DotRows<kLimbs, kRows, 1>(codes + c * 32 * words, words, width, mask, rows, sums + c);
}

void Dot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows, int32_t* sums) {
  const Vector masks = _mm512_set1_epi8(static_cast<char>(mask));
  if (rows.limbs == 1) DotLimbs<1>(codes, words, width, masks, rows, sums);
  if (rows.limbs == 2) DotLimbs<2>(codes, words, width, masks, rows, sums);
  if (rows.limbs == 3) DotLimbs<3>(codes, words, width, masks, rows, sums);
}

// One row by 16 channels at every mask of codes. Unlike DotPanel it takes codes from 128 on as negative numbers next to
// an unsigned limb: each is 256 too small, and so twice what the mask of one bit sums is too little.
template <int kLimbs, int kLayers>
void PrefixPanel(const uint8_t* codes, int64_t words, int64_t width, const LimbRows& row, int64_t sums_stride,
                 int32_t* sums) {
  Vector total[kLayers][kLimbs];
  Unroll<kLayers>([&](auto b) PBJAX_INLINE {
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE { total[b][limb] = _mm512_setzero_si512(); });
  });
  const uint8_t* bytes = row.data;
  const int64_t limb_stride = row.limb_stride;
  for (int64_t quad = 0; quad < 8 * words; ++quad) {
    const Vector code = _mm512_loadu_si512(codes + 64 * quad);
    Vector q[kLimbs];
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE { q[limb] = BroadcastFour(bytes + limb * limb_stride + 4 * quad); });
    Unroll<kLayers>([&](auto b) PBJAX_INLINE {
      const Vector masked = _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>(0xFF00 >> (b + 1))));
      AddProducts(total[b][0], masked, q[0]);
      Unroll<kLimbs - 1>([&](auto i) PBJAX_INLINE {
        AddProducts(total[b][i + 1], q[i + 1], masked);
      });
    });
  }
  Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
    const Vector lost = limb == 0 ? _mm512_setzero_si512() : _mm512_slli_epi32(total[0][limb], 1);
    Unroll<kLayers>([&](auto b) PBJAX_INLINE {
      int32_t* out = sums + b * sums_stride + limb * width;
      const Vector sum = _mm512_sub_epi32(total[b][limb], lost);
      _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_loadu_si512(out), sum));
    });
  });
}

template <int kLimbs, int kLayers>
void PrefixRows(const uint8_t* codes, int64_t words, int64_t width, int layers, const LimbRows& rows, int32_t* sums) {
  if constexpr (kLayers > 1) {
    if (layers < kLayers) return PrefixRows<kLimbs, kLayers - 1>(codes, words, width, layers, rows, sums);
  }
  LimbRows row = rows;
  for (int64_t c = 0; c < width; c += 16) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      row.data = rows.data + r * rows.row_stride;
      PrefixPanel<kLimbs, kLayers>(codes + c * 32 * words, words, width, row, rows.rows * kLimbs * width,
                                   sums + r * kLimbs * width + c);
    }
  }
}

void DotPrefixes(const uint8_t* codes, int64_t words, int64_t width, int layers, const LimbRows& rows,
                 int32_t* sums) {
  if (rows.limbs == 1) PrefixRows<1, 8>(codes, words, width, layers, rows, sums);
  if (rows.limbs == 2) PrefixRows<2, 8>(codes, words, width, layers, rows, sums);
  if (rows.limbs == 3) PrefixRows<3, 8>(codes, words, width, layers, rows, sums);
}

// Floats.

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
  for (; rows >= kRows; rows -= kRows) {
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

const Kernels* Avx512Kernels() {
  static const Kernels kernels = {"avx512",   Unpack,   Dot,   DotPrefixes, Stream,    Values,   FloatDot,
                                  FloatCodes, Quantize, Split, Sum,         Combine,   ScaleOnly, ScaleAdd,
                                  FinishRow};
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
  return supported ? &kernels : nullptr;
}

}  // namespace pbjax
#else
namespace pbjax {
const Kernels* Avx512Kernels() { return nullptr; }
}  // namespace pbjax
#endif
