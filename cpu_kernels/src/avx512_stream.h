// Few rows against words as they come: every word is read once, in runs of all channels of the block, and sums stay in the
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

// Inlined by force: GCC takes a call that only prefetches for one without effect.
template <int kLayers>
PBJAX_INLINE inline void PrefetchLayers(const uint32_t* words, int64_t layer_stride) {
  Unroll<kLayers>([&](auto i) PBJAX_INLINE {
    _mm_prefetch(reinterpret_cast<const char*>(words + i * layer_stride), _MM_HINT_T0);
  });
}

// body(code bytes, their operand, their sum) for 8 vectors of code bytes, of 16 channels and one word.
template <int kLayers, typename Body>
PBJAX_INLINE inline void ForCodes(const uint32_t* words, int64_t layer_stride, __mmask16 mask, const Body& body) {
  constexpr int kDepth = Depth(kLayers);
  using L = Layout<kDepth>;
  Vector interleaved[L::kRegisters];
  Interleave<kLayers>(words, layer_stride, mask, interleaved);
  Unroll<L::kRegisters>([&](auto reg) PBJAX_INLINE {
    const Vector merged = Transpose(interleaved[reg]);
    Unroll<L::kPieces>([&](auto piece) PBJAX_INLINE {
      constexpr int kShift = 8 - kDepth * (piece + 1), kMask = (1 << kDepth) - 1;
      Vector code = merged;
      if constexpr (kDepth < 8) code = Field<kShift, kMask>(merged);
      body(std::integral_constant<int, reg * L::kPieces + piece>(), code);
    });
  });
}

template <int kLayers>
struct CodeOf {
  using L = Layout<Depth(kLayers)>;
  static constexpr int Operand(int i) { return L::Operand(i / L::kPieces, i % L::kPieces); }
  static constexpr int Sum(int i) { return L::SumOf(i / L::kPieces, i % L::kPieces); }
};

// One row: where the sums of block i of 16 channels are. Bitlayers lie powers of two apart, so that all lines of a block
// compete for one set of the first-level cache, and 512 channels fill half of its sets. Sums of up to two limbs go into the
// other half: 2 KiB of every 4 KiB, as many blocks as fit. Those of three would need more than half.
template <int kLayers, int kLimbs>
PBJAX_INLINE inline int64_t PlaceOfSums(int64_t i) {
  constexpr int kNumbers = 16 * Layout<Depth(kLayers)>::kSums * kLimbs, kBlocks = 512 / kNumbers;
  return kLimbs > 2 ? i * kNumbers : i / kBlocks * 1024 + i % kBlocks * kNumbers;
}

// The first place, across from these words.
inline int32_t* FirstPlace(const uint32_t* words, int32_t* scratch) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(scratch), to = reinterpret_cast<uintptr_t>(words) + 2048;
  return scratch + (to - from) % 4096 / 64 * 16;
}

// Up to 4 bitlayers of two words share what it takes to load and store the sums. Words are prefetched as many rows less kLag
// blocks ahead: into sets whose lines are used up, since there are 12 in each, of which 8 are in use.
template <int kLayers, int kLimbs, int kWords>
void StreamWords(const WordBlock& block, int64_t first_word, const LimbRows& row, int32_t* scratch) {
  constexpr int kDepth = Depth(kLayers), kLag = 8;
  using L = Layout<kDepth>;
  Vector operands[kWords][kLimbs][L::kOperands];
  for (int w = 0; w < kWords; ++w) {
    for (int limb = 0; limb < kLimbs; ++limb) {
      LoadOperands<kDepth>(row.data + limb * row.limb_stride + 32 * (first_word + w), operands[w][limb]);
    }
  }
  const int64_t word_stride = block.word_stride;
  const uint32_t* data = block.data + first_word * word_stride;
  const uint32_t* ahead = data + (first_word + 2 * kWords <= block.words ? kWords * word_stride : 0);
  const int64_t blocks = (block.channels + 15) / 16;
  for (int64_t i = 0; i < blocks; ++i) {
    const uint32_t* next = i < kLag ? data + 16 * (blocks - kLag + i) : ahead + 16 * (i - kLag);
    const __mmask16 mask = ChannelMask(block.channels - 16 * i);
    int32_t* memory = scratch + PlaceOfSums<kLayers, kLimbs>(i);
    Vector sums[kLimbs][L::kSums];
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      Unroll<L::kSums>([&](auto j) PBJAX_INLINE {
        sums[limb][j] = _mm512_load_si512(memory + 16 * (limb * L::kSums + j));
      });
    });
    Unroll<kWords>([&](auto w) PBJAX_INLINE {
      PrefetchLayers<kLayers>(next + w * word_stride, block.layer_stride);
      ForCodes<kLayers>(data + w * word_stride + 16 * i, block.layer_stride, mask, [&](auto j, Vector code) PBJAX_INLINE {
        constexpr int kSum = CodeOf<kLayers>::Sum(j), kOperand = CodeOf<kLayers>::Operand(j);
        AddProducts(sums[0][kSum], code, operands[w][0][kOperand]);
        if constexpr (kLimbs > 1 && kDepth == 8) code = _mm512_xor_si512(code, _mm512_set1_epi8(-128));
        Unroll<kLimbs - 1>([&](auto limb) PBJAX_INLINE {
          AddProducts(sums[limb + 1][kSum], operands[w][limb + 1][kOperand], code);
        });
      });
    });
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      Unroll<L::kSums>([&](auto j) PBJAX_INLINE {
        _mm512_store_si512(memory + 16 * (limb * L::kSums + j), sums[limb][j]);
      });
    });
  }
}

constexpr int kRowSums = 2;  // of 16 channels, one of several rows, and one limb

// Several rows: vectors of code bytes that hold 16 k of 4 channels become vectors of 8 k of 8, in place: two sums of 16
// channels for each row then, whatever the depth, and four operands of 8 bytes, which all lanes share.
//   vector 4 * p + o, 128 bits L: channels 4 * L + 2 * p and the next, 8 bytes each, which go with operand o and sum p
PBJAX_INLINE inline void JoinChannels(Vector* codes) {
  Vector joined[8];
  const auto floats = [&](int i) PBJAX_INLINE { return _mm512_castsi512_ps(codes[i]); };
  Unroll<8>([&](auto i) PBJAX_INLINE {
    constexpr int kFirst = i / 4 * 4 + i / 2 % 2;
    joined[i] = _mm512_castps_si512(_mm512_shuffle_ps(floats(kFirst), floats(kFirst + 2), i % 2 == 0 ? 0x88 : 0xDD));
  });
  Unroll<8>([&](auto i) PBJAX_INLINE { codes[i] = joined[i]; });
}

template <int kDepth>
inline __m256i RowOperands(const uint8_t* bytes) {
  const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  if (kDepth == 4) return _mm256_permutevar8x32_epi32(word, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if (kDepth == 8) return _mm256_permutevar8x32_epi32(word, _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
  return word;
}

// Code bytes of two words stay in registers, and sums and activations come from the cache. Words are prefetched into the
// second level: sums and the lines of two words fill the first.
template <int kLayers, int kLimbs, int kWords>
void StreamRows(const WordBlock& block, int64_t first_word, const LimbRows& rows, int32_t* scratch) {
  constexpr int kDepth = Depth(kLayers);
  alignas(64) uint8_t operands[kStreamRows][kLimbs][kWords][32];
  for (int64_t r = 0; r < rows.rows; ++r) {
    for (int limb = 0; limb < kLimbs; ++limb) {
      for (int w = 0; w < kWords; ++w) {
        const uint8_t* bytes = rows.data + r * rows.row_stride + limb * rows.limb_stride + 32 * (first_word + w);
        _mm256_store_si256(reinterpret_cast<__m256i*>(operands[r][limb][w]), RowOperands<kDepth>(bytes));
      }
    }
  }
  const uint32_t* data = block.data + first_word * block.word_stride;
  int32_t* memory = scratch;
  const int64_t ahead = first_word + 2 * kWords <= block.words ? kWords * block.word_stride : 0;
  for (int64_t c = 0; c < block.channels; c += 16) {
    const __mmask16 mask = ChannelMask(block.channels - c);
    Vector codes[kWords][8];
    Unroll<kWords>([&](auto w) PBJAX_INLINE {
      const uint32_t* words = data + w * block.word_stride + c;
      Unroll<kLayers>([&](auto i) PBJAX_INLINE {
        _mm_prefetch(reinterpret_cast<const char*>(words + ahead + i * block.layer_stride), _MM_HINT_T1);
      });
      ForCodes<kLayers>(words, block.layer_stride, mask, [&](auto i, Vector code) PBJAX_INLINE { codes[w][i] = code; });
      if (kDepth >= 4) JoinChannels(codes[w]);
    });
    Unroll<kLimbs>([&](auto limb) PBJAX_INLINE {
      if constexpr (limb == 1 && kDepth == 8) {
        Unroll<kWords * 8>([&](auto i) PBJAX_INLINE {
          codes[i / 8][i % 8] = _mm512_xor_si512(codes[i / 8][i % 8], _mm512_set1_epi8(-128));
        });
      }
      int32_t* its = memory + limb * 16 * kRowSums;
      const uint8_t* bytes = operands[0][limb][0];
      for (int64_t r = 0; r < rows.rows; ++r) {
        Vector sums[kRowSums];
        Unroll<kRowSums>([&](auto i) PBJAX_INLINE { sums[i] = _mm512_load_si512(its + 16 * i); });
        Unroll<kWords>([&](auto w) PBJAX_INLINE {
          Vector operand[4];
          Unroll<4>([&](auto i) PBJAX_INLINE { operand[i] = Broadcast<8>(bytes + 32 * w + 8 * i); });
          Unroll<8>([&](auto i) PBJAX_INLINE {
            constexpr int kSum = kDepth >= 4 ? i / 4 : CodeOf<kLayers>::Sum(i);
            constexpr int kOperand = kDepth >= 4 ? i % 4 : CodeOf<kLayers>::Operand(i);
            const Vector q = operand[kOperand];
            AddProducts(sums[kSum], limb == 0 ? codes[w][i] : q, limb == 0 ? q : codes[w][i]);
          });
        });
        Unroll<kRowSums>([&](auto i) PBJAX_INLINE { _mm512_store_si512(its + 16 * i, sums[i]); });
        its += kLimbs * 16 * kRowSums;
        bytes += sizeof operands[0];
      }
    });
    memory += rows.rows * kLimbs * 16 * kRowSums;
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

template <int kLayers, int kLimbs>
void StreamBlock(const WordBlock& block, const LimbRows& rows, int32_t* scratch, int32_t* sums, int64_t sums_stride) {
  constexpr int kDepth = Depth(kLayers);
  const bool one_row = rows.rows == 1;
  const int64_t num_sums = one_row ? Layout<kDepth>::kSums : kRowSums;
  const int64_t blocks = (block.channels + 15) / 16, stride = rows.rows * kLimbs * 16 * num_sums;
  if (one_row) scratch = FirstPlace(block.data, scratch);
  const auto place = [&](int64_t i) PBJAX_INLINE { return one_row ? PlaceOfSums<kLayers, kLimbs>(i) : i * stride; };
  __builtin_memset(scratch, 0, (place(blocks - 1) + stride) * sizeof(int32_t));
  int64_t word = 0;
  if (one_row) {
    constexpr int kStep = kLayers <= 4 ? 2 : 1;
    for (; word + kStep <= block.words; word += kStep) StreamWords<kLayers, kLimbs, kStep>(block, word, rows, scratch);
    for (; word < block.words; ++word) StreamWords<kLayers, kLimbs, 1>(block, word, rows, scratch);
  } else {
    for (; word + 2 <= block.words; word += 2) StreamRows<kLayers, kLimbs, 2>(block, word, rows, scratch);
    if (word < block.words) StreamRows<kLayers, kLimbs, 1>(block, word, rows, scratch);
  }
  for (int64_t r = 0; r < rows.rows; ++r) {
    for (int limb = 0; limb < kLimbs; ++limb) {
      const bool centred = kDepth == 8 && limb > 0;
      const uint8_t* bytes = rows.data + r * rows.row_stride + limb * rows.limb_stride;
      const Vector left_out = centred ? LeftOut(bytes, block.words) : _mm512_setzero_si512();
      const int32_t* its = scratch + (r * kLimbs + limb) * 16 * num_sums;
      int32_t* out = sums + (r * kLimbs + limb) * sums_stride;
      for (int64_t i = 0; i < blocks; ++i) {
        const Vector lanes = one_row ? AddLanes<kDepth>(its + place(i)) : AddLanes<kDepth == 1 ? 1 : 2>(its + place(i));
        const Vector total = _mm512_add_epi32(lanes, left_out);
        _mm512_mask_storeu_epi32(out + 16 * i, ChannelMask(block.channels - 16 * i),
                                 _mm512_srai_epi32(total, kDepth - kLayers));
      }
    }
  }
}

template <int kLayers>
void StreamLayers(const WordBlock& block, const LimbRows& rows, int32_t* scratch, int32_t* sums, int64_t sums_stride) {
  if (rows.limbs == 1) StreamBlock<kLayers, 1>(block, rows, scratch, sums, sums_stride);
  if (rows.limbs == 2) StreamBlock<kLayers, 2>(block, rows, scratch, sums, sums_stride);
  if (rows.limbs == 3) StreamBlock<kLayers, 3>(block, rows, scratch, sums, sums_stride);
}

void Stream(const WordBlock& block, const LimbRows& rows, int32_t* scratch, int32_t* sums, int64_t sums_stride) {
  using Function = void (*)(const WordBlock&, const LimbRows&, int32_t*, int32_t*, int64_t);
  static constexpr Function kFunctions[] = {StreamLayers<1>, StreamLayers<2>, StreamLayers<3>, StreamLayers<4>,
                                            StreamLayers<5>, StreamLayers<6>, StreamLayers<7>, StreamLayers<8>};
  kFunctions[block.layers - 1](block, rows, scratch, sums, sums_stride);
}

}  // namespace
