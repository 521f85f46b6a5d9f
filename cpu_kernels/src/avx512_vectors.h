// Vectors of 512 bits, and what processors without GFNI or VNNI do instead. Included like common_kernels.h.

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

// sum + the products of 4 unsigned and 4 signed bytes, in each 32-bit lane.
PBJAX_INLINE inline void AddProducts(Vector& sum, Vector of_unsigned, Vector of_signed) {
#if defined(__AVX512VNNI__)
  // As an instruction, since compilers copy registers around the intrinsic.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_unsigned), "v"(of_signed));
#else  // as 16-bit integers, two at a time: vpmaddubsw would saturate
  const Vector even = _mm512_madd_epi16(_mm512_and_si512(of_unsigned, _mm512_set1_epi16(255)),
                                        _mm512_srai_epi16(_mm512_slli_epi16(of_signed, 8), 8));
  const Vector odd = _mm512_madd_epi16(_mm512_srli_epi16(of_unsigned, 8), _mm512_srai_epi16(of_signed, 8));
  sum = _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}

PBJAX_INLINE inline Vector BroadcastFour(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, 4);
  return _mm512_set1_epi32(four);
}

// 8 or 16 bytes in every lane of as many.
template <int kBytes>
PBJAX_INLINE inline Vector Broadcast(const uint8_t* bytes) {
  if constexpr (kBytes == 16) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  } else {
    int64_t eight;
    __builtin_memcpy(&eight, bytes, 8);
    return _mm512_set1_epi64(eight);
  }
}

// What products of an unsigned limb with codes minus 128 leave out.
inline Vector LeftOut(const uint8_t* limb, int64_t words) {
  Vector four = _mm512_setzero_si512();
  for (int64_t word = 0; word < words; ++word) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limb + 32 * word));
    AddProducts(four, _mm512_zextsi256_si512(bytes), _mm512_set1_epi8(1));
  }
  return _mm512_set1_epi32(128 * _mm512_reduce_add_epi32(four));
}

// Lanes of 16 channels from the one that has this many left.
inline __mmask16 ChannelMask(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1); }

// Whether two panels of fewer rows each are enough: better than a full one and one that leaves multipliers idle.
inline bool SmallerPanels(int64_t rows, int64_t panel_rows) { return rows > panel_rows && rows <= 2 * (panel_rows - 1); }

// Byte l of a 64-bit lane becomes bit 7 - l of its 8 bytes, bit k of it byte k.
inline Vector Transpose(Vector bits) {
#if defined(__GFNI__)
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), bits, 0);
#else  // by swaps of blocks of 1, 2 and 4 bits (Warren, Hacker's Delight, 7-3), after the bytes are reversed
  const Vector reversed = _mm512_broadcast_i32x4(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  Vector x = _mm512_shuffle_epi8(bits, reversed);
  const auto swap = [&x](auto shift, int64_t mask) PBJAX_INLINE {
    const Vector differ = _mm512_and_si512(_mm512_xor_si512(x, _mm512_srli_epi64(x, shift)), _mm512_set1_epi64(mask));
    x = _mm512_xor_si512(_mm512_xor_si512(x, differ), _mm512_slli_epi64(differ, shift));
  };
  swap(std::integral_constant<int, 7>(), 0x00AA00AA00AA00AA);
  swap(std::integral_constant<int, 14>(), 0x0000CCCC0000CCCC);
  swap(std::integral_constant<int, 28>(), 0x00000000F0F0F0F0);
  return x;
#endif
}

// Some bits of every byte, from bit kShift.
template <int kShift, int kMask>
PBJAX_INLINE inline Vector Field(Vector bytes) {
#if defined(__GFNI__)
  if constexpr (kShift > 0) {
    // Byte 7 - i of the matrix says which bits go into bit i.
    uint64_t matrix = 0;
    for (int i = 0; i < 8; ++i) {
      if (kMask >> i & 1) matrix |= uint64_t{1} << (i + kShift) << 8 * (7 - i);
    }
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(static_cast<int64_t>(matrix)), 0);
  }
#endif
  return _mm512_and_si512(_mm512_srli_epi16(bytes, kShift), _mm512_set1_epi8(kMask));
}

}  // namespace
