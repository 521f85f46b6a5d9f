// Bitlayers to code bytes in registers, for avx512_stream.h and avx512_blocks.h. Included like common_kernels.h.
//
// A byte of a word of one bitlayer holds 8 consecutive k of one channel. Bytes of up to 8 bitlayers, interleaved, are an
// 8 x 8 bit matrix, and its transpose is 8 code bytes.

namespace {

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

}  // namespace
