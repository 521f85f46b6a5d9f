// The inner loops of the product, one table for each set of instructions.
//
// Every table computes the same integers, so which one runs never shows in a fixed-point result. Code bytes hold
// bitlayer 0 in their most significant bit, whatever the number of bitlayers: using fewer of them is a mask.
#ifndef PBJAX_KERNELS_H_
#define PBJAX_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace pbjax {

// A rectangle of packed words: `words` of k by `channels`, up to 8 bitlayers deep.
struct WordBlock {
  const uint32_t* data;  // bitlayer 0, first word of k, first channel
  int64_t layer_stride;  // words between bitlayers
  int64_t word_stride;   // words between consecutive words of k
  int layers;            // 0..8
  int64_t words;
  int64_t channels;
};

// Rows of 8-bit limbs of activation codes; limb 0 is the most significant and signed, the others are unsigned.
struct LimbRows {
  const uint8_t* data;  // first row, limb 0, first k
  int64_t row_stride;   // bytes
  int64_t limb_stride;  // bytes
  int limbs;
  int64_t rows;
};

// How a product is computed.
enum class Method {
  kBlocks,  // unpack, then dot; values, then float_dot
  kStream,  // stream: up to kStreamRows rows at one number of bitlayers
  kCodes,   // unpack, then float_codes: float rows at up to 8 bitlayers
  kLookup,  // lookup, or float_lookup
};

// What to do with rows that come together: `method`, if the kernels have it and no number is above its limit.
struct Choice {
  int limbs;  // of the activations, 0 for float rows
  bool sweep;
  int64_t max_rows;
  int max_layers;
  Method method;
};

struct Kernels {
  const char* name;

  // Code bytes of a block: codes[channel / 16][word][k / 4 of 8][channel % 16][k % 4], zero in channels..width. Widths are
  // multiples of 16. What one loop over k reads lies in one run, whatever the width: no lines compete for a cache set.
  void (*unpack)(const WordBlock& block, int64_t width, uint8_t* codes);

  // sums[row][limb][channel] += sum_k limb[row][k] * (codes[k][channel] & mask), over all words of a block of codes.
  void (*dot)(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows, int32_t* sums);

  // values[channel / 16][32 * word + k][channel % 16] = v_b of contract.py's codes; `low` holds bitlayers 8.. or is null.
  void (*values)(const uint8_t* high, const uint8_t* low, int64_t words, int64_t width, int count, float* values);

  // sums[row][channel] += sum_k x[row][k] * values[..][k][..]. num_k is a multiple of 32.
  void (*float_dot)(const float* values, int64_t num_k, int64_t width, const float* x, int64_t row_stride,
                    int64_t rows, float* sums);

  // Null where a table does without. sums[row][limb][channel] = sum_k limb[row][k] * code[k][channel], where a code has
  // block.layers bits. Reads each word once, in runs of all channels. `scratch` has StreamScratch(...) numbers.
  void (*stream)(const WordBlock& block, const LimbRows& rows, int32_t* scratch, int32_t* sums, int64_t sums_stride);

  // Null where a table does without. As values and float_dot, for up to kFewRows rows, from codes themselves.
  void (*float_codes)(const uint8_t* codes, int64_t words, int64_t width, int count, const float* x,
                      int64_t row_stride, int64_t rows, float* sums);

  // Null where a table does without. The sums of 4 adjacent limbs, or floats, under each pattern of 4 bits, in a form that
  // look-ups know: limbs * kTableBytes, or kTableFloats, for each word of k. Limb 0 is signed.
  void (*make_tables)(const uint8_t* data, int64_t limb_stride, int limbs, int64_t words, uint8_t* tables);
  void (*make_float_tables)(const float* x, int64_t words, float* tables);

  // sums[layer][limb][channel] += sum_k limb[k] * bit[layer][k][channel] of one row, in a form that add_layers takes back.
  // width is that of sums.
  void (*lookup)(const WordBlock& block, const uint8_t* tables, int limbs, int32_t* sums, int64_t layer_stride,
                 int64_t width);

  // The same for a row of floats, with 2 * bit - 1 in place of a bit. Any number of bitlayers.
  void (*float_lookup)(const WordBlock& block, const float* tables, float* sums, int64_t layer_stride);

  // The sums of single bitlayers, in this many words, to those with the codes of the first 1, 2, .. bitlayers; and to those
  // with v_b of contract.py.
  void (*add_layers)(int layers, int limbs, int64_t words, int64_t width, int32_t* sums, int64_t layer_stride);
  void (*add_float_layers)(int layers, int64_t width, float* sums, int64_t layer_stride);

  // What is fastest, the first that fits; else kBlocks.
  const Choice* choices;
  int num_choices;

  // One row to codes of `activation_bits`, split into limbs: as activations.quantize_rows. limbs[limb][padded_k],
  // zeros past k. Returns false, and zero codes, where the row is not finite.
  bool (*quantize)(const float* x, int64_t k, int64_t padded_k, int activation_bits, uint8_t* limbs,
                   int64_t limb_stride, float* unit);

  // One row of given codes to limbs.
  void (*split)(const int32_t* codes, int64_t k, int64_t padded_k, int limbs, uint8_t* out, int64_t limb_stride);

  // The sum of a run of limb bytes.
  int32_t (*sum)(const uint8_t* limb, int64_t num_k, bool is_signed);

  // Integers of one segment to float32, added to `total`: epilogue.combine_limbs.
  void (*combine)(const struct Columns& columns, int64_t width, float* total);

  // total + scale * 2**exponent * group_sum, of the only group (epilogue.scale_groups) or of several (add_group).
  void (*scale_only)(const float* group_sum, const float* scale, float factor, int64_t channels, float* total);
  void (*scale_add)(const float* group_sum, const float* scale, float factor, int64_t channels, float* total);

  // y = total * unit + poison, rounded once, as XLA does: a product of 0 is +0, one that underflows keeps its sign.
  void (*finish_row)(const float* total, float unit, float poison, int64_t channels, float* y);
};

// The limb sums of one row and one segment. Column 0 holds bitlayers 0..7, column 1 those from 8.
struct Columns {
  const int32_t* sums[2];      // [limb][width]: sum_k limb * (2**shift * code)
  int shift[2];
  int layers[2];               // bitlayers used; layers[1] may be 0
  const int32_t* limb_sums;    // [limb]: sum_k limb
  int limbs;
};

// int32 of scratch that `stream` needs for this many channels, and rows times limbs.
constexpr int64_t StreamScratch(int64_t channels, int64_t row_limbs) {
  return (channels + 15) / 16 * 128 * row_limbs + 2048;  // twice what they fill, and where they begin
}

constexpr int64_t kFewRows = 2;          // of float_codes
constexpr int64_t kStreamRows = 16;      // of stream
constexpr int64_t kTableBytes = 256;     // of one word of k and one limb
constexpr int64_t kTableFloats = 8 * 16;  // of one word of k

// The tables that this program holds, null where not compiled in. Compiled with the instructions of their kernels, they are
// for FindTables to call, which asks first whether the machine has these.
const Kernels* PortableKernels();
const Kernels* Avx2Kernels();        // with FMA
const Kernels* AmxKernels();         // with AVX-512's VNNI, GFNI and VBMI, and tiles
const Kernels* Avx512Kernels();      // with VNNI, GFNI and VBMI
const Kernels* Avx512VnniKernels();  // with VNNI
const Kernels* Avx512BaseKernels();  // with BW, DQ and VL only
const Kernels* NeonKernels();        // with dot products

// All that run on this machine, best first; up to kMaxTables.
constexpr int kMaxTables = 8;
int FindTables(const Kernels** tables);

// By name, "" for the best. Null if there is none of that name here.
const Kernels* FindKernels(const char* name, size_t length);

}  // namespace pbjax

#endif  // PBJAX_KERNELS_H_
