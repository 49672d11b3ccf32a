// The long loops of norm.cpp: sums of squares, and the codes and values of blocks with a row's factor in them.

#pragma once

#include "lanes.h"

static const int SUMS = 64;  // partial sums of squares

// h = x + y, rounded to their type as torch rounds.
static INLINE U32s sum_of(U32s x, U32s y) {
  U32s u = (U32s)((F32s)x + (F32s)y);
  return (I32s)(u & 0x7fffffffu) > (i32)INF ? (U32s){} + NAN_BITS : u;
}
template <class T>
static NOINLINE void add_line(const typename T::word* FAST x, const typename T::word* FAST y, typename T::word* FAST h, i64 n) {
  i64 i = 0;
  for (; i + UNIT <= n; i += UNIT) {
    Two a = two(x + i), b = two(y + i);
    put(x, {sum_of(a.p, b.p), sum_of(a.q, b.q)}, h + i);
  }
  for (; i < n; i++) {
    u32 u = bits_of(number(T::wide(x[i])) + number(T::wide(y[i])));
    h[i] = (u & 0x7fffffffu) > INF ? (typename T::word)T::nan : T::narrow(u);
  }
}

// Bits of the largest magnitude of each block. One block after the other: memory's own look-ahead follows that best.
template <class T, int N> static NOINLINE void tops(const typename T::word* FAST x, i64 blocks, u32* FAST amax) {
  for (i64 b = 0; b < blocks; b++, x += N) {
    typename T::word top = 0;
    for (int j = 0; j < N; j++) {
      typename T::word a = x[j] & T::rest;
      top = a > top ? a : top;
    }
    amax[b] = T::wide(top);
  }
}

// Adds the squares of n values to SUMS partial sums.
template <class T> static NOINLINE void square_line(const typename T::word* FAST x, i64 n, float* FAST sums) {
  float s[SUMS];
  memcpy(s, sums, sizeof s);
  i64 i = 0;
  for (; i + SUMS <= n; i += SUMS) {
    Two a = two(x + i), b = two(x + i + UNIT);
    F32s v[4] = {(F32s)a.p, (F32s)a.q, (F32s)b.p, (F32s)b.q};
    for (int k = 0; k < 4; k++)
      for (int j = 0; j < LANES; j++) s[k * LANES + j] = FMA(v[k][j], v[k][j], s[k * LANES + j]);
  }
  for (; i < n; i++) {
    float v = number(T::wide(x[i]));
    s[0] = FMA(v, v, s[0]);
  }
  memcpy(sums, s, sizeof s);
}

static INLINE void fetch(const void* at, i64 bytes) {
  for (i64 b = 0; b < bytes; b += 64) __builtin_prefetch((const char*)at + b, 0, 2);
}

// What the loops need of a format.
struct Fast {
  i32 max, emin, magic, to_magic, shift, bits;
  u32 below, mask;
  float zero;
  Fast(const Cast& c, const Grid& g) {
    max = g.max, emin = g.emin, shift = g.shift, bits = c.bits, to_magic = g.to_magic;
    magic = g.to_magic + (-g.code_off & 127);  // an even number of steps when m > 0, so ties stay ties to even
    mask = g.mask, below = mask >> 1, zero = g.zero;
  }
};

static INLINE I32s larger(I32s a, I32s b) { return a > b ? a : b; }
static INLINE I32s smaller(I32s a, I32s b) { return a < b ? a : b; }

// The codes of v without their signs: as `code_one`, with less work. The sum with a power of two leaves the rounded
// magnitude, in steps of its spacing, in the low bits; the offset of the exponent's part of the code is in the power of
// two already. What stands above the code's bits is cut off later. Two's complement: with its sign.
template <bool TWOS> static INLINE U32s codes_of(const Fast& g, F32s value) {
  U32s v = (U32s)value;
  I32s a = smaller((I32s)(v & 0x7fffffffu), (I32s){} + g.max), e = larger(a & (i32)INF, (I32s){} + g.emin);
  U32s code = (U32s)((F32s)a + (F32s)(e + g.magic)) + (U32s)(e >> g.shift);
  if (!TWOS) return code;
  U32s minus = (U32s)((I32s)v >> 31);
  return ((code & g.below) ^ minus) - minus;
}

// A float for each value of a unit. Blocks of 16: the first is for 16 of them, the second for the other 16.
struct TwoF { F32s p, q; };
template <class W, int N> static INLINE TwoF spread(const float* f) {
  F32s first = (F32s){} + f[0];
  if (N != 16) return {first, first};
  F32s second = (F32s){} + f[1];
  if (sizeof(W) == 4) return {first, second};
  F32s both = PICK(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  return {both, both};
}

// Codes of whole blocks of N values (0: of `cols`, a multiple of 32; 16: an even number of blocks): of x f, or (TWICE) of
// (x rr) f, with each block's f. The row at `next` is fetched meanwhile: memory works while arithmetic does.
template <class T, int N, bool TWOS, bool TWICE>
static NOINLINE void norm_codes(const Fast given, const typename T::word* FAST x, u8* FAST y, i64 blocks, i64 cols, float rr,
                                const float* FAST f, const typename T::word* next) {
  typedef typename T::word word;
  const Fast g = given;
  const i64 n = N ? UNIT : cols;
  for (i64 b = 0; b < blocks; b += N == 16 ? 2 : 1, x += n, y += n, next += n) {
    TwoF by = spread<word, N>(f + b);
    fetch(next, n * (i64)sizeof(word));
    for (i64 i = 0; i < n; i += UNIT) {
      Two v = two(x + i);
      F32s p = (F32s)v.p, q = (F32s)v.q;
      if (TWICE) p *= rr, q *= rr;
      put_codes(x + i, {codes_of<TWOS>(g, p * by.p), codes_of<TWOS>(g, q * by.q)}, y + i, TWOS ? g.mask : g.below, g.bits);
    }
  }
}

// Values after a round trip. POWER: d is a power of two, and the grid is moved to y instead of y to the grid and back
// (see `fake_blocks`; top and emin are those of the moved grid); else y r is rounded, and grows by d.
template <bool POWER> static INLINE U32s value_of(const Fast& g, F32s y, F32s r, F32s d, I32s top, I32s emin) {
  U32s v = (U32s)(POWER ? y : y * r);
  I32s a = smaller((I32s)(v & 0x7fffffffu), top), e = larger(a & (i32)INF, emin);
  F32s magic = (F32s)(e + g.to_magic), q = ((F32s)a + magic) - magic, signed_ = (F32s)((U32s)q | (v & 0x80000000u)) + g.zero;
  return (U32s)(POWER ? signed_ : signed_ * d);
}

// Values of blocks as above, of x rr (DIVIDED) or of x.
template <class T, class U, int N, bool POWER, bool DIVIDED>
static NOINLINE void norm_values(const Fast given, const typename T::word* FAST x, typename U::word* FAST y, i64 blocks,
                                 i64 cols, float rr, const float* FAST r, const float* FAST d, const typename T::word* next) {
  typedef typename T::word word;
  const Fast g = given;
  const i64 n = N ? UNIT : cols;
  for (i64 b = 0; b < blocks; b += N == 16 ? 2 : 1, x += n, y += n, next += n) {
    TwoF shrink = spread<word, N>(r + b), grow = spread<word, N>(d + b);
    I32s zero = {}, first = zero, second = zero;
    if (POWER) first = ((I32s)grow.p & (i32)INF) - (127 << 23), second = ((I32s)grow.q & (i32)INF) - (127 << 23);
    fetch(next, n * (i64)sizeof(word));
    for (i64 i = 0; i < n; i += UNIT) {
      Two v = two(x + i);
      F32s p = (F32s)v.p, q = (F32s)v.q;
      if (DIVIDED) p *= rr, q *= rr;
      put(x, {value_of<POWER>(g, p, shrink.p, grow.p, first + g.max, first + g.emin),
              value_of<POWER>(g, q, shrink.q, grow.q, second + g.max, second + g.emin)}, y + i);
    }
  }
}
