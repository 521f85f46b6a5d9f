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
// those of a signed limb): the upper 8 in one table, the lower 2 in another, whose entries are added up as bytes. Limbs 0 and
// 1 share the table of lower bits, which are bits 0 and 1 of an entry and bits 4 and 5.
// Of each word they hold, for nibbles 0, 2, .., the upper bits of each limb, then the lower; and the same for nibbles 1, 3, ..
// Sums of limb 1 are 16 times what they stand for, so that its lower bits need no shift, until add_layers takes that back.

constexpr int LowerTables(int limbs) { return (limbs + 1) / 2; }
constexpr int HalfTables(int limbs) { return limbs + LowerTables(limbs); }  // of 64 bytes, for every other nibble

void MakeTables(const uint8_t* data, int64_t limb_stride, int limbs, int64_t words, uint8_t* tables) {
  const Vector lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11,
                                       10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const Vector byte = _mm512_and_si512(lane, _mm512_set1_epi16(16));  // 16 for the second byte of a pair, else 0
  for (int64_t i = 0; i < words * limbs; ++i) {
    const int64_t word = i / limbs, limb = i % limbs;
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + limb * limb_stride + 32 * word));
    const Vector q = limb == 0 ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes);
    uint8_t* out = tables + word * limbs * kTableBytes;
    Unroll<4>([&](auto part) PBJAX_INLINE {  // 32 entries: of bytes 0 and 1 or 2 and 3, and of lower or upper nibbles
      constexpr int kHalf = part / 2, kPair = part % 2;
      Vector sum = _mm512_set1_epi16(limb == 0 ? 512 : 0);
      Unroll<4>([&](auto bit) PBJAX_INLINE {
        const __mmask32 is_set = _mm512_test_epi16_mask(lane, _mm512_set1_epi16(1 << bit));
        const Vector from = _mm512_add_epi16(_mm512_srli_epi16(byte, 1), _mm512_set1_epi16(16 * kPair + 4 * kHalf + bit));
        sum = _mm512_add_epi16(sum, _mm512_maskz_permutexvar_epi16(is_set, from, q));
      });
      const __m256i upper = _mm512_cvtepi16_epi8(_mm512_srli_epi16(sum, 2));
      __m256i lower = _mm512_cvtepi16_epi8(_mm512_and_si512(sum, _mm512_set1_epi16(3)));
      uint8_t* its = out + 64 * kHalf * HalfTables(limbs) + 32 * kPair;
      __m256i* its_lower = reinterpret_cast<__m256i*>(its + 64 * (limbs + limb / 2));
      if (limb == 1) lower = _mm256_or_si256(_mm256_loadu_si256(its_lower), _mm256_slli_epi16(lower, 4));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(its + 64 * limb), upper);
      _mm256_storeu_si256(its_lower, lower);
    });
  }
}

// Adds what 16 channels of kWords words look up.
template <int kLimbs, int kWords, typename Tables>
PBJAX_INLINE inline void LookupChannels(const Tables& table, const Vector* bits, int32_t* sums, int64_t limb_stride) {
  constexpr int kLower = LowerTables(kLimbs), kChains = kLimbs == 1 ? 2 : 1, kLowerWords = kLimbs == 1 ? kWords : 2;
  const Vector nibble = _mm512_set1_epi8(15), byte = _mm512_set1_epi32(0x30201000);
  const Vector ones = _mm512_set1_epi8(1), fours = _mm512_set1_epi8(4), times_16 = _mm512_set1_epi8(64);
  Vector total[kChains][kLimbs], index[kWords][2], lower[kLower];
  Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
    total[0][limb] = _mm512_loadu_si512(sums + limb * limb_stride);
    if (kChains == 2) total[1][limb] = _mm512_setzero_si512();
  });
  Unroll<kWords>([&](auto w) PBJAX_INLINE {
    index[w][0] = _mm512_ternarylogic_epi32(bits[w], nibble, byte, 0xEA);  // bits & nibble | byte
    index[w][1] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits[w], 4), nibble, byte, 0xEA);
  });
  Unroll<kWords>([&](auto w) PBJAX_INLINE {
    Vector entry[2][HalfTables(kLimbs)];
    Unroll<2 * HalfTables(kLimbs)>([&](auto i) PBJAX_INLINE {
      constexpr int kHalf = i / HalfTables(kLimbs), kTable = i % HalfTables(kLimbs);
      entry[kHalf][kTable] = _mm512_permutexvar_epi8(index[w][kHalf], table[w][kHalf][kTable]);
    });
    Unroll<2>([&](auto half) PBJAX_INLINE {
      Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
        AddProducts(total[half % kChains][limb], entry[half][limb], limb == 1 ? times_16 : fours);
      });
      Unroll<kLower>([&](auto i) PBJAX_INLINE {
        const Vector its = entry[half][kLimbs + i];
        lower[i] = half == 0 && w % kLowerWords == 0 ? its : _mm512_add_epi8(lower[i], its);
      });
    });
    if constexpr ((w + 1) % kLowerWords == 0 || w + 1 == kWords) {  // 4 bits hold the lower bits of two words
      Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
        constexpr bool kShared = limb / 2 * 2 + 1 < kLimbs;
        const Vector mask = _mm512_set1_epi8(limb == 1 ? -16 : 15), its = lower[limb / 2];
        AddProducts(total[kChains - 1][limb], kShared ? _mm512_and_si512(its, mask) : its, ones);
      });
    }
  });
  Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
    const Vector sum = kChains == 2 ? _mm512_add_epi32(total[0][limb], total[1][limb]) : total[0][limb];
    _mm512_storeu_si512(sums + limb * limb_stride, sum);
  });
}

// Adds what kWords words of one bitlayer look up, in all channels, while words at `ahead` are prefetched.
template <int kLimbs, int kWords>
void LookupWords(const uint32_t* data, const uint32_t* ahead, int64_t word_stride, int64_t channels, const uint8_t* tables,
                 int32_t* sums, int64_t limb_stride) {
  Vector table[kWords][2][HalfTables(kLimbs)];
  Unroll<kWords * 2 * HalfTables(kLimbs)>([&](auto i) PBJAX_INLINE {
    constexpr int kWord = i / (2 * HalfTables(kLimbs)), kTable = i % (2 * HalfTables(kLimbs));
    const uint8_t* its = tables + kWord * kLimbs * kTableBytes;
    table[kWord][kTable / HalfTables(kLimbs)][kTable % HalfTables(kLimbs)] = _mm512_loadu_si512(its + 64 * kTable);
  });
  const int64_t full = channels / 16 * 16;
  Vector bits[kWords];
  for (int64_t c = 0; c < full; c += 16) {
    Unroll<kWords>([&](auto w) PBJAX_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + w * word_stride + c), _MM_HINT_T0);
      bits[w] = _mm512_loadu_si512(data + w * word_stride + c);
    });
    LookupChannels<kLimbs, kWords>(table, bits, sums + c, limb_stride);
  }
  if (full == channels) return;
  Unroll<kWords>([&](auto w) PBJAX_INLINE {
    bits[w] = _mm512_maskz_loadu_epi32(ChannelMask(channels - full), data + w * word_stride + full);
  });
  LookupChannels<kLimbs, kWords>(table, bits, sums + full, limb_stride);
}

// A few words of one bitlayer after those of another: sums stay in the first-level cache for these words, and with many
// bitlayers in turn lines would compete for a cache set, as above. Words are prefetched four ahead in this order: further
// ahead they would not fit the sets of the first-level cache that words of k, powers of two apart, share.
template <int kLimbs>
void LookupBlock(const WordBlock& block, const uint8_t* tables, int32_t* sums, int64_t layer_stride,
                 int64_t limb_stride) {
  constexpr int kStep = kLimbs == 1 ? 4 : kLimbs == 2 ? 2 : 1;  // up to 16 registers of tables
  constexpr int64_t kAhead = 4, kRun = 8;
  for (int64_t start = 0; start < block.words; start += kRun) {
    const int64_t stop = start + kRun < block.words ? start + kRun : block.words;
    for (int layer = 0; layer < block.layers; ++layer) {
      const auto run = [&](auto words, int64_t word) PBJAX_INLINE {
        int64_t next = word + kAhead;
        int next_layer = layer;
        if (next >= stop) {
          next_layer = layer + 1 < block.layers ? layer + 1 : 0;
          if (next_layer > 0) next -= stop - start;
        }
        const auto at = [&](int its, int64_t k) { return block.data + its * block.layer_stride + k * block.word_stride; };
        const uint32_t* data = at(layer, word);
        LookupWords<kLimbs, words>(data, next + words <= block.words ? at(next_layer, next) : data, block.word_stride,
                                   block.channels, tables + word * kLimbs * kTableBytes, sums + layer * layer_stride,
                                   limb_stride);
      };
      int64_t word = start;
      for (; word + kStep <= stop; word += kStep) run(std::integral_constant<int, kStep>(), word);
      for (; word < stop; ++word) run(std::integral_constant<int, 1>(), word);
    }
  }
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
    for (int layer = 0; limb == 1 && layer < layers; ++layer) {
      int32_t* __restrict here = first + layer * layer_stride;
      for (int64_t c = 0; c < width; ++c) here[c] >>= 4;
    }
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
