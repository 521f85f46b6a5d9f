// One row against words as they come: every word is read once, in runs of all channels of the block, and sums stay in the
// first-level cache. Included like common_kernels.h.
//
// vpdpbusd takes one unsigned and one signed operand: a signed limb goes with the codes as they are, an unsigned limb with
// codes below 128, or with codes minus 128, where 128 * sum(limb) goes back in at the end.

namespace {

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
    const __mmask16 mask = ChannelMask(block.channels - c);
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
    const __mmask16 mask = ChannelMask(block.channels - c);
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

}  // namespace
