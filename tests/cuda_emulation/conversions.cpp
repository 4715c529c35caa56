// For a test that compares with torch: every bit pattern to float, and floats to every 16-bit type.
#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void half_from_float(const float* in, unsigned short* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __half_as_ushort(__float2half_rn(in[i]));
}
EXPORT void bfloat16_from_float(const float* in, unsigned short* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
}
EXPORT void float_from_half(const unsigned short* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __half2float(__ushort_as_half(in[i]));
}
EXPORT void float_from_bfloat16(const unsigned short* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = __bfloat162float(__ushort_as_bfloat16(in[i]));
}
