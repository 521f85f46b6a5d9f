// Sums of activations looked up by bits of the weights. Included like common_kernels.h.
//
// Four adjacent k of one bitlayer are four bits of a word, and there are 16 sums of four activations: a table of them, which
// all channels share, replaces four multiplications by one permutation (as T-MAC does, arXiv 2407.00088, with tables in
// registers). A bitlayer then costs the same whether its sum is added to those of others or kept: that makes a sweep as
// cheap as its last product.

namespace {

// Float rows: a table of 16 floats is one vector, and vpermps takes the lowest 4 bits of each lane as they come. Tables hold
// sums of x where the bit is set and -x where it is not, so that a bitlayer is worth (2 * bit - 1) without a correction.

void MakeFloatTables(const float* x, int64_t words, float* tables) {
  const Vector pattern = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t group = 0; group < 8 * words; ++group) {
    __m512 sum = _mm512_setzero_ps();
    Unroll<4>([&](auto i) PBJAX_INLINE {
      const __m512 value = _mm512_set1_ps(x[4 * group + i]);
      const __mmask16 is_set = _mm512_test_epi32_mask(pattern, _mm512_set1_epi32(1 << i));
      sum = _mm512_add_ps(sum, _mm512_mask_sub_ps(value, ~is_set, _mm512_setzero_ps(), value));
    });
    _mm512_storeu_ps(tables + 16 * group, sum);
  }
}

// One bitlayer after the other, each in runs of all channels: with many bitlayers in turn, their lines, which are powers of
// two apart, would compete for a cache set.
template <int kWords>
void FloatLookupWords(const WordBlock& block, int64_t first_word, const float* tables, float* sums,
                      int64_t layer_stride) {
  __m512 table[kWords][8];
  Unroll<8 * kWords>([&](auto i) PBJAX_INLINE {
    table[i / 8][i % 8] = _mm512_loadu_ps(tables + 16 * (8 * first_word + i));
  });
  const int64_t word_stride = block.word_stride, channels = block.channels;
  const int64_t ahead = first_word + 2 * kWords <= block.words ? kWords * word_stride : 0;
  for (int layer = 0; layer < block.layers; ++layer) {
    const uint32_t* data = block.data + layer * block.layer_stride + first_word * word_stride;
    float* out = sums + layer * layer_stride;
    for (int64_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = ChannelMask(channels - c);
      __m512 sum = _mm512_loadu_ps(out + c);
      Unroll<kWords>([&](auto w) PBJAX_INLINE {
        const uint32_t* words = data + w * word_stride + c;
        _mm_prefetch(reinterpret_cast<const char*>(words + ahead), _MM_HINT_T1);
        const Vector bits = _mm512_maskz_loadu_epi32(mask, words);
        __m512 looked_up[8];
        Unroll<8>([&](auto i) PBJAX_INLINE {
          looked_up[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(bits, 4 * i), table[w][i]);
        });
        const auto pair = [&](int i) PBJAX_INLINE { return _mm512_add_ps(looked_up[i], looked_up[i + 1]); };
        sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_add_ps(pair(0), pair(2)), _mm512_add_ps(pair(4), pair(6))));
      });
      _mm512_storeu_ps(out + c, sum);
    }
  }
}

void FloatLookup(const WordBlock& block, const float* tables, float* sums, int64_t layer_stride) {
  int64_t word = 0;
  for (; word + 2 <= block.words; word += 2) FloatLookupWords<2>(block, word, tables, sums, layer_stride);
  if (word < block.words) FloatLookupWords<1>(block, word, tables, sums, layer_stride);
}

void AddFloatLayers(int layers, int64_t width, float* sums, int64_t layer_stride) {
  float factor = 0.5f;
  for (int64_t c = 0; c < width; ++c) sums[c] *= factor;
  for (int layer = 1; layer < layers; ++layer) {
    const float* __restrict before = sums + (layer - 1) * layer_stride;
    float* __restrict here = sums + layer * layer_stride;
    factor *= 0.5f;
    for (int64_t c = 0; c < width; ++c) here[c] = before[c] + factor * here[c];
  }
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

// Limbs: vpermb looks up bytes in a table of 64, 16 for each byte of a word. A sum of four limbs has 10 bits (512 is added to
// those of a signed limb): the upper 8 in one table, the lower 2 in another, whose entries are added up as bytes.
// Of each word and limb they hold the upper and lower bits for nibbles 0, 2, .., then those for nibbles 1, 3, ..

void MakeTables(const uint8_t* limb, int64_t words, bool is_signed, uint8_t* tables, int64_t word_stride) {
  const Vector lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
                                       10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const Vector byte = _mm512_and_si512(lane, _mm512_set1_epi16(16));  // 16 for the second byte of a pair, else 0
  for (int64_t word = 0; word < words; ++word) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limb + 32 * word));
    const Vector q = is_signed ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes);
    Unroll<4>([&](auto part) PBJAX_INLINE {  // 32 entries: of bytes 0 and 1 or 2 and 3, and of lower or upper nibbles
      constexpr int kHalf = part / 2, kPair = part % 2;
      Vector sum = _mm512_set1_epi16(is_signed ? 512 : 0);
      Unroll<4>([&](auto i) PBJAX_INLINE {
        const __mmask32 is_set = _mm512_test_epi16_mask(lane, _mm512_set1_epi16(1 << i));
        const Vector from = _mm512_add_epi16(_mm512_srli_epi16(byte, 1), _mm512_set1_epi16(16 * kPair + 4 * kHalf + i));
        sum = _mm512_add_epi16(sum, _mm512_maskz_permutexvar_epi16(is_set, from, q));
      });
      uint8_t* out = tables + word * word_stride + kHalf * 128 + kPair * 32;
      const Vector upper = _mm512_srli_epi16(sum, 2), lower = _mm512_and_si512(sum, _mm512_set1_epi16(3));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(upper));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64), _mm512_cvtepi16_epi8(lower));
    });
  }
}

template <int kLimbs, int kWords>
void LookupWords(const WordBlock& block, int64_t first_word, const uint8_t* tables, int32_t* sums, int64_t layer_stride,
                 int64_t limb_stride) {
  Vector table[kWords][kLimbs][4];
  Unroll<4 * kLimbs * kWords>([&](auto i) PBJAX_INLINE {
    table[i / (4 * kLimbs)][i / 4 % kLimbs][i % 4] = _mm512_loadu_si512(tables + first_word * kLimbs * kTableBytes + 64 * i);
  });
  const Vector nibble = _mm512_set1_epi8(15), byte = _mm512_set1_epi32(0x30201000);
  const Vector fours = _mm512_set1_epi8(4), ones = _mm512_set1_epi8(1);
  const int64_t word_stride = block.word_stride, channels = block.channels;
  const int64_t ahead = first_word + 2 * kWords <= block.words ? kWords * word_stride : 0;
  for (int layer = 0; layer < block.layers; ++layer) {
    const uint32_t* data = block.data + layer * block.layer_stride + first_word * word_stride;
    int32_t* out = sums + layer * layer_stride;
    for (int64_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = ChannelMask(channels - c);
      Vector total[kLimbs], lower[kLimbs];
      Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
        total[limb] = _mm512_loadu_si512(out + limb * limb_stride + c);
        lower[limb] = _mm512_setzero_si512();
      });
      Unroll<kWords>([&](auto w) PBJAX_INLINE {
        const uint32_t* words = data + w * word_stride + c;
        _mm_prefetch(reinterpret_cast<const char*>(words + ahead), _MM_HINT_T1);
        const Vector bits = _mm512_maskz_loadu_epi32(mask, words);
        Unroll<2>([&](auto half) PBJAX_INLINE {
          const Vector shifted = half == 0 ? bits : _mm512_srli_epi32(bits, 4);
          const Vector index = _mm512_ternarylogic_epi32(shifted, nibble, byte, 0xEA);  // shifted & nibble | byte
          Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
            AddProducts(total[limb], _mm512_permutexvar_epi8(index, table[w][limb][2 * half]), fours);
            lower[limb] = _mm512_add_epi8(lower[limb], _mm512_permutexvar_epi8(index, table[w][limb][2 * half + 1]));
          });
        });
      });
      Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
        AddProducts(total[limb], lower[limb], ones);
        _mm512_storeu_si512(out + limb * limb_stride + c, total[limb]);
      });
    }
  }
}

template <int kLimbs>
void LookupBlock(const WordBlock& block, const uint8_t* tables, int32_t* sums, int64_t layer_stride,
                 int64_t limb_stride) {
  constexpr int kStep = 4 / kLimbs;  // 16 registers of tables
  int64_t word = 0;
  for (; word + kStep <= block.words; word += kStep) {
    LookupWords<kLimbs, kStep>(block, word, tables, sums, layer_stride, limb_stride);
  }
  for (; word < block.words; ++word) LookupWords<kLimbs, 1>(block, word, tables, sums, layer_stride, limb_stride);
}

void Lookup(const WordBlock& block, const uint8_t* tables, int limbs, int32_t* sums, int64_t layer_stride,
            int64_t limb_stride) {
  if (limbs == 1) LookupBlock<1>(block, tables, sums, layer_stride, limb_stride);
  if (limbs == 2) LookupBlock<2>(block, tables, sums, layer_stride, limb_stride);
  if (limbs == 3) LookupBlock<3>(block, tables, sums, layer_stride, limb_stride);
}

void AddLayers(int layers, int limbs, int64_t words, int64_t width, int32_t* sums, int64_t layer_stride) {
  for (int limb = 0; limb < limbs; ++limb) {
    const uint32_t left_out = limb == 0 ? static_cast<uint32_t>(512 * 8 * words) : 0;  // of a signed limb and one bit
    int32_t* __restrict first = sums + limb * width;
    for (int64_t c = 0; c < width; ++c) first[c] = static_cast<int32_t>(static_cast<uint32_t>(first[c]) - left_out);
    for (int layer = 1; layer < layers; ++layer) {
      const int32_t* __restrict before = sums + (layer - 1) * layer_stride + limb * width;
      int32_t* __restrict here = sums + layer * layer_stride + limb * width;
      for (int64_t c = 0; c < width; ++c) {
        here[c] = static_cast<int32_t>(2 * static_cast<uint32_t>(before[c]) + static_cast<uint32_t>(here[c]) - left_out);
      }
    }
  }
}

#else
constexpr auto AddLayers = nullptr;
constexpr auto MakeTables = nullptr;
constexpr auto Lookup = nullptr;
#endif

}  // namespace
