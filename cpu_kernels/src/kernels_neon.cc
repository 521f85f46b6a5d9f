// NEON with dot products of bytes (Armv8.2 with FEAT_DotProd: Neoverse N1, Apple M1 and later).
//
// sdot and udot multiply bytes of one sign: a signed limb goes with codes minus 128, where 128 * sum(limb) goes back in,
// an unsigned limb with the codes as they are.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace pbjax {
#include "common_kernels.h"
#include "generic_kernels.h"

namespace {

int32x4_t DotSigned(int32x4_t sum, uint8x16_t code, const uint8_t* four) {
  const int8x16_t q = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(four)));
  return vdotq_s32(sum, vreinterpretq_s8_u8(veorq_u8(code, vdupq_n_u8(128))), q);
}

int32x4_t DotUnsigned(int32x4_t sum, uint8x16_t code, const uint8_t* four) {
  const uint8x16_t q = vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(four)));
  return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), code, q));
}

void Dot(const uint8_t* codes, int64_t words, int64_t width, uint8_t mask, const LimbRows& rows, int32_t* sums) {
  const uint8x16_t masks = vdupq_n_u8(mask);
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int limb = 0; limb < rows.limbs; ++limb) {
      const uint8_t* bytes = rows.data + row * rows.row_stride + limb * rows.limb_stride;
      const int32_t left_out = limb == 0 ? 128 * Sum(bytes, 32 * words, true) : 0;
      for (int64_t c = 0; c < width; c += 16) {
        int32_t* out = sums + (row * rows.limbs + limb) * width + c;
        int32x4_t total[4];
        for (int v = 0; v < 4; ++v) total[v] = vaddq_s32(vld1q_s32(out + 4 * v), vdupq_n_s32(left_out));
        for (int64_t quad = 0; quad < 8 * words; ++quad) {
          const uint8_t* code = codes + c * 32 * words + 64 * quad;
          for (int v = 0; v < 4; ++v) {
            const uint8x16_t masked = vandq_u8(vld1q_u8(code + 16 * v), masks);
            total[v] = limb == 0 ? DotSigned(total[v], masked, bytes + 4 * quad)
                                 : DotUnsigned(total[v], masked, bytes + 4 * quad);
          }
        }
        for (int v = 0; v < 4; ++v) vst1q_s32(out + 4 * v, total[v]);
      }
    }
  }
}

}  // namespace

const Kernels* NeonKernels() {
  static const Kernels kernels = [] {
    Kernels table = CommonKernels("neon");
    table.unpack = GenericUnpack;
    table.dot = Dot;
    table.values = GenericValues;
    table.float_dot = GenericFloatDot;
    return table;
  }();
  return &kernels;
}

}  // namespace pbjax
#else
namespace pbjax {
const Kernels* NeonKernels() { return nullptr; }
}  // namespace pbjax
#endif
