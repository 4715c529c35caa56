// Stands in for the CUDA toolkit's header: half precision by float arithmetic, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  unsigned short bits;

  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  __half(float value);
  operator float() const;
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponents' biases differ by 112; a product by a power of 2 makes subnormal halves right, too.
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(scaled));
}

inline __half __float2half_rn(float value) {
  if (value != value) return __half_raw{0x7fff};  // the device's only NaN
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
  const float magnitude = fabsf(value);
  unsigned bits;
  if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    bits = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);  // the addition rounds to 2^-24
  } else {
    const unsigned whole = __float_as_uint(magnitude) - (112u << 23);
    bits = (whole + 0xfff + (whole >> 13 & 1)) >> 13;
  }
  return __half_raw{static_cast<unsigned short>(sign | bits)};
}

inline __half::__half(float value) : __half(__float2half_rn(value)) {}
inline __half::operator float() const { return __half2float(*this); }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 value) { return {value.x, value.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__half2 value) { return value.x; }
inline float __high2float(__half2 value) { return value.y; }
