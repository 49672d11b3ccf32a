// The elements of casts: bits, scales, rounding, thresholds, packing. Included by cast.cpp, which says how and why.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian machines only"
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef int64_t i64;

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define FAST __restrict__

enum { NONE, E8M0, E4M3, FP32 };                            // scale
enum { FLOOR, CEIL, EVEN, RCEIL, AMAX };                    // rule
enum { NEAREST_EVEN, ZERO, NEAREST_AWAY, UP, DOWN, RANDOM };  // rounding
static const u32 INF = 0x7f800000u, NAN_BITS = 0x7fc00000u;
static const int PIECE = 2048, TILE = 256, DEPTH = 64;  // elements of a pass in L1; columns and rows of a strided tile

extern "C" struct Cast {  // mirrored field by field in cpu.py
  const void* x;
  void* out;
  void* scales;
  float* tensor_scale;
  i64 L, R, n, row_codes;  // strided: R is the number of columns
  i64 rows, cols;
  i64 offset, step_l, step_r, step_c;  // index of an element for the random bits, rows layout
  i32 strided, dtype, bits, m, bias, emin, emax, twos, scale, rule, rounding, random_bits;
  u32 k0, k1;
  float max, tensor_amax;
  i32 has_amax, nan_code, max_code, inf_code, threads;
};

static INLINE u32 bits_of(float f) { u32 u; memcpy(&u, &f, 4); return u; }
static INLINE float number(u32 u) { float f; memcpy(&f, &u, 4); return f; }
template <class A> static INLINE A least(A a, A b) { return a < b ? a : b; }
template <class A> static INLINE A most(A a, A b) { return a > b ? a : b; }

struct F32 {
  typedef u32 word;
  static const u32 rest = 0x7fffffffu, nan = NAN_BITS, inf = INF;
  static INLINE u32 wide(u32 w) { return w; }
  static INLINE u32 narrow(u32 u) { return u; }
  static INLINE u32 cut(u32 u) { return u; }  // narrow what the type holds exactly
};
struct BF16 {
  typedef u16 word;
  static const u16 rest = 0x7fff, nan = 0x7fc0, inf = 0x7f80;
  static INLINE u32 wide(u16 w) { return (u32)w << 16; }
  static INLINE u16 narrow(u32 u) { return (u16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16); }
  static INLINE u16 cut(u32 u) { return (u16)(u >> 16); }
};
// ---- scales: from the bits of amax, many blocks at a time

struct Scaling { float r, d; };

static INLINE u32 e4m3_value(float t, u32* code) {  // nearest-even, t in [0, 448]
  u32 a = bits_of(t), e = most(a & INF, 121u << 23), magic = e + (20u << 23), sum = bits_of(number(a) + number(magic));
  *code = (e >> 20) - (121u << 3) + (sum - magic);
  return bits_of(number(sum) - number(magic));
}

// Fills r, d and the stored scale of `count` blocks; true when one of them is special (holds an Inf or NaN). Such a
// block is shrunk like a block of zeros, and grows by NaN.
static bool scale_blocks(const Cast& c, float s_enc, float s_dec, const u32* FAST amax, i64 count, float* FAST r,
                         float* FAST d, u32* FAST stored) {
  u32 special = 0, tiny = 0;
  for (i64 b = 0; b < count; b++) special |= amax[b] >= INF, tiny |= amax[b] < 0x00800000u;
  if (c.scale == E4M3) {
    for (i64 b = 0; b < count; b++) {
      bool bad = amax[b] >= INF;
      float t = (number(bad ? 0u : amax[b]) / c.max) * s_enc;
      u32 code, value = e4m3_value(t < 448.f ? t : 448.f, &code);
      float back = number(value) * s_dec, inverse = 1.f / back;
      stored[b] = bad ? 0x7fu : code;
      d[b] = bad ? number(NAN_BITS) : back;
      inverse = inverse < 0x1.fffffep127f ? inverse : 0x1.fffffep127f;
      r[b] = value == 0 ? 0.f : inverse;
    }
  } else if (c.rule == AMAX) {
    for (i64 b = 0; b < count; b++) {
      bool bad = amax[b] >= INF;
      float s = number(bad ? 0u : amax[b]) / c.max;
      s = s > 0x1p-126f ? s : 0x1p-126f;
      s = bad || amax[b] == 0 ? 1.f : s;
      r[b] = 1.f / s;
      stored[b] = bad ? NAN_BITS : bits_of(s);
      d[b] = number(stored[b]);
    }
  } else {
    i32 add = c.rule == EVEN ? 1 << (22 - c.m) : 0, emax = c.emax, low = c.scale == FP32 ? -126 : -127;
    i32 above = c.rule == CEIL ? 0 : c.rule == RCEIL ? (i32)(bits_of(c.max) & 0x7fffff) : 0x7fffff;
    bool zero_is_one = c.scale == FP32;
    if (c.scale == E8M0 && !special && !tiny) {  // the same as below, without the rare cases: vectorised
      for (i64 b = 0; b < count; b++) {
        i32 u = (i32)amax[b], code = ((u + add) >> 23) - emax + ((u & 0x7fffff) > above ? 1 : 0);
        code = least(most(code, 0), 254);
        i32 grow = code << 23, shrink = (254 - code) << 23;
        grow = code == 0 ? 0x00400000 : grow;
        shrink = code == 254 ? 0x00400000 : shrink;
        stored[b] = (u32)code;
        memcpy(&d[b], &grow, 4);
        memcpy(&r[b], &shrink, 4);
      }
      return false;
    }
    for (i64 b = 0; b < count; b++) {
      bool bad = amax[b] >= INF;
      i32 u = bad ? 0 : (i32)amax[b], whole = (i32)bits_of((float)u);  // a subnormal is a whole number of 2^-149
      bool tiny = u < 0x00800000;
      i32 v = tiny ? whole : u;
      i32 e = ((v + add) >> 23) - (tiny ? 276 : 127) - emax + ((v & 0x7fffff) > above);
      e = e < low ? low : e > 127 ? 127 : e;
      e = zero_is_one && u == 0 ? 0 : e;
      u32 power = e == -127 ? 0x00400000u : (u32)(e + 127) << 23;
      r[b] = number(e == 127 ? 0x00400000u : (u32)(127 - e) << 23);
      d[b] = number(bad ? NAN_BITS : power);
      stored[b] = zero_is_one ? (bad ? NAN_BITS : power) : bad ? 255u : (u32)(e + 127);
    }
  }
  return special;
}

// ---- elements

struct Grid {
  i32 max, emin, to_magic, to_spacing, shift, code_off;
  i32 low, high;  // scales 2^e, as exponent fields, under which no step in the input's own range leaves the normal numbers
  u32 flip, sign, mask;
  float zero;  // -0 keeps a -0, +0 (two's complement) does not
  explicit Grid(const Cast& c) {
    max = (i32)bits_of(c.max), emin = (c.emin + 127) << 23, to_magic = (23 - c.m) << 23, to_spacing = c.m << 23;
    shift = 23 - c.m, code_off = (128 - c.bias) << c.m, zero = c.twos ? 0.f : -0.f;
    low = 1 - c.emin + c.m, high = 231 - c.emax + c.m;
    mask = (1u << c.bits) - 1, sign = c.twos ? 0 : 1u << (c.bits - 1), flip = c.twos ? ~0u : 0;
  }
};

// Magnitude and exponent field of a value, clamped; as ints, so that a NaN counts as the largest value.
static INLINE void split(const Grid& g, u32 v, i32& a, i32& e) {
  a = least((i32)(v & 0x7fffffffu), g.max);
  e = most((i32)((u32)a & INF), g.emin);
}
static INLINE float steps(const Grid& g, i32 a, i32 e, float threshold) {  // |v| in units of its spacing, rounded
  float t = number((u32)a) * number((254u << 23) - (u32)(e - g.to_spacing));
  float whole = (float)(i32)t;
  return whole + (t - whole > threshold ? 1.f : 0.f);
}
template <bool FREE> static INLINE u32 fake_one(const Grid& g, u32 x, float r, float d, float threshold) {
  u32 v = bits_of(number(x) * r);
  i32 a, e;
  split(g, v, a, e);
  float q;
  if (FREE) {
    q = steps(g, a, e, threshold) * number((u32)(e - g.to_spacing));
  } else {
    float magic = number((u32)(e + g.to_magic));
    q = (number((u32)a) + magic) - magic;
  }
  return bits_of((number(bits_of(q) | (v & 0x80000000u)) + g.zero) * d);
}
template <bool FREE> static INLINE u8 code_one(const Grid& g, u32 x, float r, float threshold) {
  u32 v = bits_of(number(x) * r), s = (u32)((i32)v >> 31);
  i32 a, e, t;
  split(g, v, a, e);
  if (FREE) {
    t = (i32)steps(g, a, e, threshold);
  } else {
    i32 magic = e + g.to_magic;
    t = (i32)bits_of(number((u32)a) + number((u32)magic)) - magic;
  }
  u32 code = (u32)((e >> g.shift) - g.code_off + t), flip = s & g.flip;  // two's complement: -code = ~code + 1
  return (u8)((((code ^ flip) - flip) | (s & g.sign)) & g.mask);
}

// A line of elements. Either one r and d for all of them, or (EACH) one for each.
template <class T, bool FREE, bool EACH>
static NOINLINE void fake_line(Grid g, const typename T::word* FAST x, typename T::word* FAST y, i64 n,
                               const float* FAST r, const float* FAST d, const float* FAST threshold) {
  float r0 = *r, d0 = *d;
  for (i64 j = 0; j < n; j++)
    y[j] = T::narrow(fake_one<FREE>(g, T::wide(x[j]), EACH ? r[j] : r0, EACH ? d[j] : d0, FREE ? threshold[j] : 0.f));
}
template <class T, bool FREE, bool EACH>
static NOINLINE void code_line(Grid g, const typename T::word* FAST x, u8* FAST y, i64 n, const float* FAST r,
                               const float* FAST threshold) {
  float r0 = *r;
  for (i64 j = 0; j < n; j++) y[j] = code_one<FREE>(g, T::wide(x[j]), EACH ? r[j] : r0, FREE ? threshold[j] : 0.f);
}
// Whole blocks of N, nearest-even. With a scale 2^e (POWER) the grid is moved to the input, and not the input to the
// grid and back: two products less, all exact either way, and the result needs no rounding to the input's type.
template <class T, int N, bool POWER>
static NOINLINE void fake_blocks(Grid g, const typename T::word* FAST x, typename T::word* FAST y, i64 blocks,
                                 const float* FAST r, const float* FAST d) {
  for (i64 b = 0; b < blocks; b++, x += N, y += N) {
    float r0 = r[b], d0 = d[b];
    i32 field = (i32)(bits_of(d0) >> 23);
    if (POWER && field >= g.low && field <= g.high) {
      i32 top = g.max + ((field - 127) << 23), emin = g.emin + ((field - 127) << 23);
      for (int j = 0; j < N; j++) {
        u32 v = T::wide(x[j]);
        i32 a = least((i32)(v & 0x7fffffffu), top), e = most((i32)((u32)a & INF), emin);
        float magic = number((u32)(e + g.to_magic)), q = (number((u32)a) + magic) - magic;
        y[j] = T::cut(bits_of(number(bits_of(q) | (v & 0x80000000u)) + g.zero));
      }
    } else {
      for (int j = 0; j < N; j++) y[j] = T::narrow(fake_one<false>(g, T::wide(x[j]), r0, d0, 0.f));
    }
  }
}
template <class T, int N>
static NOINLINE void code_blocks(Grid g, const typename T::word* FAST x, u8* FAST y, i64 blocks, const float* FAST r) {
  for (i64 b = 0; b < blocks; b++, x += N, y += N) {
    float r0 = r[b];
    for (int j = 0; j < N; j++) y[j] = code_one<false>(g, T::wide(x[j]), r0, 0.f);
  }
}
template <class T> static NOINLINE u32 amax_line(const typename T::word* FAST x, i64 n) {
  typename T::word top = 0;
  for (i64 j = 0; j < n; j++) {
    typename T::word a = x[j] & T::rest;
    top = a > top ? a : top;
  }
  return T::wide(top);
}
template <class T, int N> static NOINLINE void amax_blocks(const typename T::word* FAST x, i64 blocks, u32* FAST amax) {
  for (i64 b = 0; b < blocks; b++, x += N) {
    typename T::word top = 0;
    for (int j = 0; j < N; j++) {
      typename T::word a = x[j] & T::rest;
      top = a > top ? a : top;
    }
    amax[b] = most(amax[b], T::wide(top));
  }
}

// ---- thresholds: a magnitude is rounded up iff its fraction is above

static INLINE u32 mix(u32 h) {
  h ^= h >> 16, h *= 0x21f0aaadu, h ^= h >> 15, h *= 0x735a2d97u;
  return h ^ (h >> 15);
}
template <class T>
static void thresholds(const Cast& c, const typename T::word* FAST x, i64 n, u64 index, u64 step, float* FAST out) {
  if (c.rounding == RANDOM) {
    u32 k0 = c.k0, k1 = c.k1, low = (u32)index, high = (u32)(index >> 32);
    int drop = 32 - c.random_bits;
    float unit = number((u32)(127 - c.random_bits) << 23);
    if (step == 1 && (u32)(low + n) >= low) {
      for (i64 j = 0; j < n; j++) {
        u32 h = mix((mix((low + (u32)j) + k0) ^ high) + k1);
        out[j] = ((float)(i32)(h >> drop) + 0.5f) * unit;
      }
    } else {
      for (i64 j = 0; j < n; j++) {
        u64 i = index + (u64)j * step;
        u32 h = mix((mix((u32)i + k0) ^ (u32)(i >> 32)) + k1);
        out[j] = ((float)(i32)(h >> drop) + 0.5f) * unit;
      }
    }
    return;
  }
  float half = number(0x3effffffu);  // just below 1/2
  float plus = c.rounding == NEAREST_AWAY ? half : c.rounding == UP ? 0.f : 2.f;
  float minus = c.rounding == NEAREST_AWAY ? half : c.rounding == DOWN ? 0.f : 2.f;
  for (i64 j = 0; j < n; j++) out[j] = x[j] > T::rest ? minus : plus;
}

// ---- packing

static INLINE i64 group_of(int bits) { return bits == 4 ? 2 : bits == 6 ? 4 : 1; }

// n is a multiple of the group; bits above those of a code do not count.
static void pack(const u8* FAST codes, i64 n, int bits, u8* FAST out) {
  if (bits == 8) {
    memcpy(out, codes, n);
  } else if (bits == 4) {
    for (i64 i = 0; i < n / 2; i++) {
      u16 w;
      memcpy(&w, codes + 2 * i, 2);
      out[i] = (u8)((w & 15) | (w >> 4 & 0xf0));
    }
  } else {
    i64 i = 0;
    for (; i + 12 <= n; i += 8) {  // writes 8 bytes, of which 6 count
      u64 w;
      memcpy(&w, codes + i, 8);
      w = (w & 0x003f003f003f003full) | (w & 0x3f003f003f003f00ull) >> 2;
      w = (w & 0x00000fff00000fffull) | (w & 0x0fff00000fff0000ull) >> 4;
      w = (w & 0xffffffull) | (w >> 32) << 24;
      memcpy(out + i / 4 * 3, &w, 8);
    }
    for (; i < n; i += 4) {
      u32 w = (codes[i] & 63) | (codes[i + 1] & 63) << 6 | (codes[i + 2] & 63) << 12 | (codes[i + 3] & 63u) << 18;
      u8* to = out + i / 4 * 3;
      to[0] = (u8)w, to[1] = (u8)(w >> 8), to[2] = (u8)(w >> 16);
    }
  }
}
static void unpack(const u8* FAST in, i64 n, int bits, u8* FAST codes) {  // n is a multiple of the group
  if (bits == 8) {
    memcpy(codes, in, n);
  } else if (bits == 4) {
    for (i64 i = 0; i < n / 2; i++) {
      u16 w = (u16)((in[i] & 15) | (in[i] & 0xf0) << 4);
      memcpy(codes + 2 * i, &w, 2);
    }
  } else {
    i64 i = 0;
    for (; i + 12 <= n; i += 8) {
      u64 w;
      memcpy(&w, in + i / 4 * 3, 8);
      w = (w & 0xffffffull) | (w & 0xffffff000000ull) << 8;
      w = (w & 0x00000fff00000fffull) | (w & 0x00fff00000fff000ull) << 4;
      w = (w & 0x003f003f003f003full) | (w & 0x0fc00fc00fc00fc0ull) << 2;
      memcpy(codes + i, &w, 8);
    }
    for (; i < n; i += 4) {
      const u8* from = in + i / 4 * 3;
      u32 w = from[0] | from[1] << 8 | (u32)from[2] << 16;
      for (int k = 0; k < 4; k++) codes[i + k] = (w >> (6 * k)) & 63;
    }
  }
}
