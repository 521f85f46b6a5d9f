// Kernels in plain C++, for compilers to vectorize: the portable table, and what other tables do not write by hand.
// Included like common_kernels.h, after it.

namespace {

// Four bits of a word to the lowest bits of four bytes: bit i of the nibble goes to bit 8 * i.
inline uint32_t SpreadNibble(uint32_t nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

[[maybe_unused]] void GenericUnpack(const WordBlock& block, int64_t width, uint8_t* codes) {
  for (int64_t first = 0; first < width; first += 16) {
    const int64_t left = block.channels - first, channels = left < 0 ? 0 : left < 16 ? left : 16;
    for (int64_t word = 0; word < block.words; ++word) {
      uint32_t code[8][16] = {};
      for (int layer = 0; layer < block.layers; ++layer) {
        const uint32_t* in = block.data + layer * block.layer_stride + word * block.word_stride + first;
        uint32_t bits[16] = {};
        if (channels > 0) __builtin_memcpy(bits, in, 4 * channels);
        for (int quad = 0; quad < 8; ++quad) {
          for (int c = 0; c < 16; ++c) {
            code[quad][c] = code[quad][c] << 1 | SpreadNibble((bits[c] >> (4 * quad)) & 15u);
          }
        }
      }
      for (int quad = 0; quad < 8; ++quad) {
        for (int c = 0; c < 16; ++c) code[quad][c] <<= 8 - block.layers;
      }
      __builtin_memcpy(codes + (first / 16 * block.words + word) * 512, code, sizeof code);
    }
  }
}

[[maybe_unused]] void GenericDot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows,
                int32_t* sums) {
  for (int64_t first = 0; first < width; first += 16) {
    const uint8_t* block = codes + first / 16 * words * 512;
    for (int64_t row = 0; row < rows.rows; ++row) {
      for (int limb = 0; limb < rows.limbs; ++limb) {
        const uint8_t* bytes = rows.data + row * rows.row_stride + limb * rows.limb_stride;
        int32_t* out = sums + (row * rows.limbs + limb) * width + first;
        int32_t total[16] = {};
        for (int64_t quad = 0; quad < 8 * words; ++quad) {
          int32_t q[4];
          for (int i = 0; i < 4; ++i) {
            const uint8_t byte = bytes[4 * quad + i];
            q[i] = limb == 0 ? static_cast<int8_t>(byte) : byte;
          }
          const uint8_t* code = block + 64 * quad;
          for (int c = 0; c < 16; ++c) {
            total[c] += q[0] * (code[4 * c] & mask) + q[1] * (code[4 * c + 1] & mask) +
                        q[2] * (code[4 * c + 2] & mask) + q[3] * (code[4 * c + 3] & mask);
          }
        }
        for (int c = 0; c < 16; ++c) out[c] += total[c];
      }
    }
  }
}

// v_b = (2 * c_b + 1) * 2**-b - 1, exact in float32 for up to 16 bits.
[[maybe_unused]] void GenericValues(const uint8_t* high, const uint8_t* low, int64_t words, int64_t width, int count, float* values) {
  const uint32_t mask = 0xFFFFu & (0xFFFF0000u >> count);
  const float offset = PowerOfTwo(-count) - 1.0f;
  for (int64_t quad = 0; quad < width / 16 * 8 * words; ++quad) {  // of all channels
    for (int i = 0; i < 4; ++i) {
      const uint8_t* first = high + 64 * quad + i;
      float* __restrict out = values + (4 * quad + i) * 16;
      uint32_t code[16];
      for (int c = 0; c < 16; ++c) code[c] = static_cast<uint32_t>(first[4 * c]) << 8;
      if (low != nullptr) {
        const uint8_t* second = low + 64 * quad + i;
        for (int c = 0; c < 16; ++c) code[c] |= second[4 * c];
      }
      for (int c = 0; c < 16; ++c) {
        out[c] = static_cast<float>(static_cast<int32_t>(code[c] & mask)) * 0x1p-15f + offset;
      }
    }
  }
}

[[maybe_unused]] void GenericFloatDot(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride,
                     int64_t rows, float* sums) {
  for (int64_t first = 0; first < width; first += 16) {
    for (int64_t row = 0; row < rows; ++row) {
      float* out = sums + row * width + first;
      float total[16];
      __builtin_memcpy(total, out, sizeof total);
      for (int64_t i = 0; i < num_k; ++i) {
        const float factor = x[row * row_stride + i];
        const float* value = values + (first / 16 * num_k + i) * 16;
        for (int c = 0; c < 16; ++c) total[c] += factor * value[c];
      }
      __builtin_memcpy(out, total, sizeof total);
    }
  }
}

}  // namespace
