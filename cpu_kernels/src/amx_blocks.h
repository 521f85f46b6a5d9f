// The product of a block of codes on the tiles of AMX: a tile takes 64 k of 16 channels as avx512_blocks.h leaves them, and
// of 16 rows. It multiplies bytes of either sign, so that no limb needs a correction. Included like common_kernels.h.

namespace {

constexpr int64_t kTileWords = 16;  // of 32 channels and 32 rows, in the first-level cache at a time

// Up to 32 rows of one limb by 16 or 32 channels, over `steps` tiles of k. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 codes.
template <bool kSigned, bool kTwoRows, bool kTwoChannels>
void TilePanel(const uint8_t* const* codes, int64_t steps, int64_t step_bytes, const uint8_t* limb, int64_t row_stride,
               int32_t* sums, int64_t sums_stride) {
  const int64_t stride = sums_stride * sizeof(int32_t);
  int32_t* const lower = sums + kTileRows * sums_stride;
  LoadTile<0>(sums, stride);
  if constexpr (kTwoChannels) LoadTile<1>(sums + 16, stride);
  if constexpr (kTwoRows) LoadTile<2>(lower, stride);
  if constexpr (kTwoRows && kTwoChannels) LoadTile<3>(lower + 16, stride);
  for (int64_t step = 0; step < steps; ++step) {
    const uint8_t* rows = limb + step * step_bytes;
    const int64_t place = step * step_bytes * 16;
    LoadTile<4>(rows, row_stride);
    LoadTile<6>(codes[0] + place, kTileBytes);
    AddTileProducts<kSigned, 0, 4, 6>();
    if constexpr (kTwoChannels) {
      LoadTile<7>(codes[1] + place, kTileBytes);
      AddTileProducts<kSigned, 1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      LoadTile<5>(rows + kTileRows * row_stride, row_stride);
      AddTileProducts<kSigned, 2, 5, 6>();
      if constexpr (kTwoChannels) AddTileProducts<kSigned, 3, 5, 7>();
    }
  }
  StoreTile<0>(sums, stride);
  if constexpr (kTwoChannels) StoreTile<1>(sums + 16, stride);
  if constexpr (kTwoRows) StoreTile<2>(lower, stride);
  if constexpr (kTwoRows && kTwoChannels) StoreTile<3>(lower + 16, stride);
}

// Tiles for these many rows and bytes of k.
inline void ConfigureFor(int64_t rows, int64_t step_bytes) {
  TileShapes shapes;
  const int64_t upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    const int64_t its_rows = tile >= 6 ? step_bytes / 4 : tile == 2 || tile == 3 || tile == 5 ? lower : upper;
    shapes.rows[tile] = static_cast<uint8_t>(its_rows);
    shapes.row_bytes[tile] = its_rows == 0 ? 0 : tile == 4 || tile == 5 ? step_bytes : kTileBytes;
  }
  ConfigureTiles(shapes);
}

// All rows by 16 or 32 channels, over some steps of k. `configured` says for how many rows the tiles are.
template <bool kTwoChannels>
void TileColumns(const uint8_t* const* codes, int64_t steps, int64_t step_bytes, const LimbRows& rows, int32_t* sums,
                 int64_t width, int64_t& configured) {
  constexpr int64_t kPanel = 2 * kTileRows;
  const int64_t sums_stride = rows.limbs * width;
  for (int64_t row = 0; row < rows.rows; row += kPanel) {
    const int64_t count = rows.rows - row < kPanel ? rows.rows - row : kPanel;
    if (count != configured) ConfigureFor(configured = count, step_bytes);
    for (int limb = 0; limb < rows.limbs; ++limb) {
      const auto panel = limb == 0 ? (count > kTileRows ? TilePanel<true, true, kTwoChannels>
                                                        : TilePanel<true, false, kTwoChannels>)
                                   : (count > kTileRows ? TilePanel<false, true, kTwoChannels>
                                                        : TilePanel<false, false, kTwoChannels>);
      panel(codes, steps, step_bytes, rows.data + row * rows.row_stride + limb * rows.limb_stride, rows.row_stride,
            sums + row * sums_stride + limb * width, sums_stride);
    }
  }
}

// Codes of 16 channels, as they are or a copy with some of their bits.
inline const uint8_t* Masked(const uint8_t* codes, int64_t bytes, uint8_t mask, uint8_t* copy) {
  if (mask == 0xFF) return codes;
  const Vector bits = _mm512_set1_epi8(static_cast<char>(mask));
  for (int64_t i = 0; i < bytes; i += 64) _mm512_store_si512(copy + i, _mm512_and_si512(_mm512_loadu_si512(codes + i), bits));
  return copy;
}

void TileDot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows, int32_t* sums) {
  constexpr int64_t kWordCodes = 512;  // bytes of one word and 16 channels
  alignas(64) uint8_t copies[2][kTileWords * kWordCodes];
  for (int64_t word = 0, count; word < words; word += count) {
    const int64_t left = words - word;
    count = left == 1 ? 1 : left < kTileWords ? left / 2 * 2 : kTileWords;  // one word alone, which fills half of a tile
    const int64_t step_bytes = count == 1 ? 32 : kTileBytes, steps = count * 32 / step_bytes;
    LimbRows its = rows;
    its.data += 32 * word;
    int64_t configured = 0;
    for (int64_t c = 0; c < width; c += 32) {
      const uint8_t* first = codes + (c / 16 * words + word) * kWordCodes;
      const uint8_t* pair[2] = {Masked(first, count * kWordCodes, mask, copies[0]), nullptr};
      if (c + 16 < width) {
        pair[1] = Masked(first + words * kWordCodes, count * kWordCodes, mask, copies[1]);
        TileColumns<true>(pair, steps, step_bytes, its, sums + c, width, configured);
      } else {
        TileColumns<false>(pair, steps, step_bytes, its, sums + c, width, configured);
      }
    }
  }
  ReleaseTiles();
}

}  // namespace
