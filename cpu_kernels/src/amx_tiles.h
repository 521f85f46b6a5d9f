// The tile registers of AMX (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18), each of up
// to 16 rows of 64 bytes, or, with PBJAX_EMULATED_TILES, what they do written out: sanitizers do not see what an instruction
// reads, and few machines that run the tests have tiles. Included like common_kernels.h.

namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kNumTiles = 8;

// The operand of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(PBJAX_EMULATED_TILES)

struct EmulatedTiles {
  TileShapes shapes;
  uint8_t data[kNumTiles][kTileRows][kTileBytes];
};
thread_local EmulatedTiles emulated;

inline void ConfigureTiles(const TileShapes& shapes) {
  emulated = EmulatedTiles();
  emulated.shapes = shapes;
}

inline void ReleaseTiles() { emulated = EmulatedTiles(); }

template <int kTile>
void LoadTile(const void* from, int64_t stride) {
  for (int row = 0; row < emulated.shapes.rows[kTile]; ++row) {
    __builtin_memcpy(emulated.data[kTile][row], static_cast<const uint8_t*>(from) + row * stride,
                     emulated.shapes.row_bytes[kTile]);
  }
}

template <int kTile>
void StoreTile(void* to, int64_t stride) {
  for (int row = 0; row < emulated.shapes.rows[kTile]; ++row) {
    __builtin_memcpy(static_cast<uint8_t*>(to) + row * stride, emulated.data[kTile][row], emulated.shapes.row_bytes[kTile]);
  }
}

template <bool kSigned, int kSum, int kRows, int kCodes>
void AddTileProducts() {
  for (int row = 0; row < emulated.shapes.rows[kSum]; ++row) {
    for (int column = 0; column < emulated.shapes.row_bytes[kSum] / 4; ++column) {
      int32_t sum;
      __builtin_memcpy(&sum, emulated.data[kSum][row] + 4 * column, 4);
      for (int k = 0; k < emulated.shapes.row_bytes[kRows]; ++k) {
        const uint8_t limb = emulated.data[kRows][row][k], code = emulated.data[kCodes][k / 4][4 * column + k % 4];
        sum += (kSigned ? static_cast<int8_t>(limb) : static_cast<int>(limb)) * code;
      }
      __builtin_memcpy(emulated.data[kSum][row] + 4 * column, &sum, 4);
    }
  }
}

#else

inline void ConfigureTiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

// Also gives the operating system less to save when it changes threads.
inline void ReleaseTiles() { asm volatile("tilerelease"); }

template <int kTile>
PBJAX_INLINE inline void LoadTile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0, %1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
PBJAX_INLINE inline void StoreTile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0, %1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

// sum[row][channel] += sum_k rows[row][k] * codes[k / 4][4 * channel + k % 4], of signed or unsigned and unsigned bytes.
template <bool kSigned, int kSum, int kRows, int kCodes>
PBJAX_INLINE inline void AddTileProducts() {
  if constexpr (kSigned) {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kCodes));
  } else {
    asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kCodes));
  }
}

#endif

}  // namespace
