// Kernels in plain C++, for compilers to vectorize: the portable table, and what other tables do not write by hand.
// Included like common_kernels.h, after it.

namespace {

// Four bits of a word to the lowest bits of four bytes: bit i of the nibble goes to bit 8 * i.
inline uint32_t SpreadNibble(uint32_t nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

void GenericUnpack(const WordBlock& block, int64_t width, uint8_t* codes) {
  for (int64_t word = 0; word < block.words; ++word) {
    uint32_t* out = reinterpret_cast<uint32_t*>(codes + word * 32 * width);
    const uint32_t* in = block.data + word * block.word_stride;
    for (int quad = 0; quad < 8; ++quad) {
      uint32_t* __restrict row = out + quad * width;
      __builtin_memset(row, 0, 4 * width);
      for (int layer = 0; layer < block.layers; ++layer) {
        const uint32_t* __restrict bits = in + layer * block.layer_stride;
        for (int64_t c = 0; c < block.channels; ++c) {
          row[c] |= SpreadNibble((bits[c] >> (4 * quad)) & 15u) << (7 - layer);
        }
      }
    }
  }
}

void GenericDot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows,
                int32_t* sums) {
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int limb = 0; limb < rows.limbs; ++limb) {
      const uint8_t* bytes = rows.data + row * rows.row_stride + limb * rows.limb_stride;
      int32_t* __restrict out = sums + (row * rows.limbs + limb) * width;
      for (int64_t quad = 0; quad < 8 * words; ++quad) {
        int32_t q[4];
        for (int i = 0; i < 4; ++i) {
          const uint8_t byte = bytes[4 * quad + i];
          q[i] = limb == 0 ? static_cast<int8_t>(byte) : byte;
        }
        const uint8_t* __restrict code = codes + 4 * quad * width;
        for (int64_t c = 0; c < width; ++c) {
          out[c] += q[0] * (code[4 * c] & mask) + q[1] * (code[4 * c + 1] & mask) + q[2] * (code[4 * c + 2] & mask) +
                    q[3] * (code[4 * c + 3] & mask);
        }
      }
    }
  }
}

// v_b = (2 * c_b + 1) * 2**-b - 1, exact in float32 for up to 16 bits.
void GenericValues(const uint8_t* high, const uint8_t* low, int64_t words, int64_t width, int count, float* values) {
  const uint32_t mask = 0xFFFFu & (0xFFFF0000u >> count);
  const float half_step = PowerOfTwo(-count);
  for (int64_t quad = 0; quad < 8 * words; ++quad) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* __restrict first = high + 4 * quad * width + i;
      const uint8_t* __restrict second = low + 4 * quad * width + i;
      float* __restrict out = values + (4 * quad + i) * width;
      if (low == nullptr) {
        for (int64_t c = 0; c < width; ++c) {
          const uint32_t code = (static_cast<uint32_t>(first[4 * c]) << 8) & mask;
          out[c] = static_cast<float>(static_cast<int32_t>(code)) * 0x1p-15f + (half_step - 1.0f);
        }
      } else {
        for (int64_t c = 0; c < width; ++c) {
          const uint32_t code = ((static_cast<uint32_t>(first[4 * c]) << 8) | second[4 * c]) & mask;
          out[c] = static_cast<float>(static_cast<int32_t>(code)) * 0x1p-15f + (half_step - 1.0f);
        }
      }
    }
  }
}

void GenericFloatDot(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride,
                     int64_t rows, float* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict out = sums + row * width;
    for (int64_t i = 0; i < num_k; ++i) {
      const float factor = x[row * row_stride + i];
      const float* __restrict value = values + i * width;
      for (int64_t c = 0; c < width; ++c) out[c] += factor * value[c];
    }
  }
}

}  // namespace
