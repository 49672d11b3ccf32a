// The long loops of norm.cpp: statistics of blocks, and the codes and values of blocks with a row's factor in them.

#pragma once

#include "elements.h"

#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) __builtin_fmaf(a, b, c)  // only in the sum of squares, whose last bits no one relies on
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

static const int SUMS = 64;  // partial sums of squares

// h = x + y, rounded to their type as torch rounds.
template <class T>
static NOINLINE void add_line(const typename T::word* FAST x, const typename T::word* FAST y, typename T::word* FAST h, i64 n) {
  for (i64 i = 0; i < n; i++) {
    u32 u = bits_of(number(T::wide(x[i])) + number(T::wide(y[i])));
    h[i] = (u & 0x7fffffffu) > INF ? (typename T::word)T::nan : T::narrow(u);
  }
}

// Adds the squares of n values to SUMS partial sums.
template <class T> static NOINLINE void square_line(const typename T::word* FAST x, i64 n, float* FAST sums) {
  float s[SUMS];
  memcpy(s, sums, sizeof s);
  i64 i = 0;
  for (; i + SUMS <= n; i += SUMS)
    for (int j = 0; j < SUMS; j++) {
      float v = number(T::wide(x[i + j]));
      s[j] = FMA(v, v, s[j]);
    }
  for (; i < n; i++) {
    float v = number(T::wide(x[i]));
    s[0] = FMA(v, v, s[0]);
  }
  memcpy(sums, s, sizeof s);
}

// What the loops need of a format with sign and magnitude: see `code_of`.
struct Fast {
  i32 max, emin, magic, shift, back;
  u32 below, sign;
  explicit Fast(const Cast& c, const Grid& g) {
    max = g.max, emin = g.emin, shift = g.shift, back = 32 - c.bits;
    magic = g.to_magic + (-g.code_off & 127);  // an even number of steps when m > 0, so ties stay ties to even
    sign = 1u << (c.bits - 1), below = sign - 1;
  }
};

// The code of v: as `code_one`, with less work. The sum with a power of two leaves the rounded magnitude, in steps of
// its spacing, in the low bits; the offset of the exponent's part of the code is in the power of two already, and all
// that is above the code's bits is cut off once.
static INLINE u8 code_of(const Fast& g, float value) {
  u32 v = bits_of(value);
  i32 a = least((i32)(v & 0x7fffffffu), g.max), e = most((i32)((u32)a & INF), g.emin);
  u32 sum = bits_of(number((u32)a) + number((u32)(e + g.magic)));
  return (u8)(((sum + (u32)(e >> g.shift)) & g.below) | ((v >> g.back) & g.sign));
}

static INLINE void ahead(const void* at, i64 bytes) {
  for (i64 b = 0; b < bytes; b += 64) __builtin_prefetch((const char*)at + b, 0, 2);
}

// Codes of whole blocks: of x f, or (TWICE) of (x rr) f. N: values of a block, 0 if only `cols` says. The row at `next`
// is fetched meanwhile, so that memory works while the arithmetic does.
template <class T, int N, bool TWICE>
static NOINLINE void norm_codes(const Fast given, const typename T::word* FAST x, u8* FAST y, i64 blocks, i64 cols, float rr,
                                const float* FAST f, const typename T::word* next) {
  const Fast g = given;
  const i64 n = N ? N : cols;
  for (i64 b = 0; b < blocks; b++, x += n, y += n, next += n) {
    float f0 = f[b];
    ahead(next, n * (i64)sizeof(typename T::word));
    for (i64 j = 0; j < n; j++) {
      float v = number(T::wide(x[j]));
      y[j] = code_of(g, TWICE ? (v * rr) * f0 : v * f0);
    }
  }
}

// The same for two's complement.
template <class T, int N>
static NOINLINE void norm_codes_twos(const Grid given, const typename T::word* FAST x, u8* FAST y, i64 blocks, i64 cols,
                                     const float* FAST f, const typename T::word* next) {
  const Grid g = given;
  const i64 n = N ? N : cols;
  for (i64 b = 0; b < blocks; b++, x += n, y += n, next += n) {
    float f0 = f[b];
    ahead(next, n * (i64)sizeof(typename T::word));
    for (i64 j = 0; j < n; j++) y[j] = code_one<false>(g, T::wide(x[j]), f0, 0.f);
  }
}

// Values of whole blocks after a round trip: x rr on the grid moved by the block's scale d, a power of two (see
// `fake_blocks`); DIVIDED: x comes with rr, else it is taken as it is.
template <class T, class U, int N, bool DIVIDED>
static NOINLINE void norm_values(const Grid given, const typename T::word* FAST x, typename U::word* FAST y, i64 blocks,
                                 i64 cols, float rr, const float* FAST d, const typename T::word* next) {
  const Grid g = given;
  const i64 n = N ? N : cols;
  for (i64 b = 0; b < blocks; b++, x += n, y += n, next += n) {
    i32 by = ((i32)(bits_of(d[b]) >> 23) - 127) << 23, top = g.max + by, emin = g.emin + by;
    ahead(next, n * (i64)sizeof(typename T::word));
    for (i64 j = 0; j < n; j++) {
      float value = number(T::wide(x[j]));
      u32 v = bits_of(DIVIDED ? value * rr : value);
      i32 a = least((i32)(v & 0x7fffffffu), top), e = most((i32)((u32)a & INF), emin);
      float magic = number((u32)(e + g.to_magic)), q = (number((u32)a) + magic) - magic;
      y[j] = U::cut(bits_of(number(bits_of(q) | (v & 0x80000000u)) + g.zero));
    }
  }
}
