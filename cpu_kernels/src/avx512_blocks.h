// Codes once into cache, then a product of bytes for any number of rows. Included like common_kernels.h.

namespace {

template <int kLayers>
void UnpackLayers(const WordBlock& block, int64_t width, uint8_t* codes) {
  constexpr int kDepth = Depth(kLayers);
  using L = Layout<kDepth>;
  for (int64_t word = 0; word < block.words; ++word) {
    for (int64_t c = 0; c < block.channels; c += 16) {
      const __mmask16 mask = ChannelMask(block.channels - c);
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
  const bool smaller = SmallerPanels(rows.rows, kRows);
  for (; rows.rows >= kRows && !smaller; rows.rows -= kRows) {
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
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int limb = 1; limb < kLimbs; ++limb) {
      const Vector left_out = LeftOut(rows.data + row * rows.row_stride + limb * rows.limb_stride, words);
      int32_t* out = sums + (row * kLimbs + limb) * width;
      for (int64_t c = 0; c < width; c += 16) {
        _mm512_storeu_si512(out + c, _mm512_add_epi32(_mm512_loadu_si512(out + c), left_out));
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

}  // namespace
