// Sixteen numbers side by side, in the vector types of GCC and Clang, which lower to what the machine has: for the few
// loops that a compiler does not vectorise well by itself (16-bit words in, bytes out).
//
// The unit is 32 neighbours in two vectors. Of float32 they are the first and the second half; of bfloat16 the even and
// the odd ones, since these come out of a 32-bit word by a shift and a mask.

#pragma once

#include "elements.h"

#if defined(__FP_FAST_FMAF)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)  // only in the sum of squares, whose last bits no one relies on
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

static const int LANES = 16, UNIT = 32;
typedef u32 U32s __attribute__((vector_size(4 * LANES)));
typedef i32 I32s __attribute__((vector_size(4 * LANES)));
typedef float F32s __attribute__((vector_size(4 * LANES)));
typedef u16 U16s __attribute__((vector_size(2 * LANES)));
typedef u8 U8s __attribute__((vector_size(LANES)));
typedef u16 U16d __attribute__((vector_size(4 * LANES)));  // twice as many
typedef u8 U8d __attribute__((vector_size(2 * LANES)));
struct Two { U32s p, q; };

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (U32s){__VA_ARGS__})
#endif

template <class V> static INLINE V load(const void* at) { V v; memcpy(&v, at, sizeof v); return v; }
template <class V> static INLINE void store(void* at, V v) { memcpy(at, &v, sizeof v); }

// ---- in: the bits of 32 values as float32; out: codes, or values in a type that holds them exactly or rounded

static INLINE Two two(const u32* x) { return {load<U32s>(x), load<U32s>(x + LANES)}; }
static INLINE Two two(const u16* x) {
  U32s both = load<U32s>(x);
  return {both << 16, both & 0xffff0000u};
}
// The low bits of c with the signs of v, whose bits lie `back` higher; what stands above a code is for `pack` to cut off.
static INLINE U32s with_signs(U32s c, U32s v, u32 low, i32 back) { return (c & low) | ((v >> back) & ~low); }
static INLINE void put_codes(const u32* x, Two c, u8* y, u32 low, i32 bits) {
  Two v = two(x);
  store(y, __builtin_convertvector(with_signs(c.p, v.p, low, 32 - bits), U8s));
  store(y + LANES, __builtin_convertvector(with_signs(c.q, v.q, low, 32 - bits), U8s));
}
static INLINE void put_codes(const u16* x, Two c, u8* y, u32 low, i32 bits) {  // two codes in a word, as two values were
  U32s both = (c.p & 0xffffu) | c.q << 16;
  store(y, __builtin_convertvector((U16d)with_signs(both, load<U32s>(x), low * 0x10001u, 16 - bits), U8d));
}

static INLINE U32s rounded(U32s u) { return (u + 0x7fffu + ((u >> 16) & 1)) >> 16; }
static INLINE void put(const u32*, Two v, u32* y) { store(y, v.p), store(y + LANES, v.q); }
static INLINE void put(const u16*, Two v, u32* y) {
  store(y, PICK(v.p, v.q, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(y + LANES, PICK(v.p, v.q, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
static INLINE void put(const u16*, Two v, u16* y) { store(y, rounded(v.p) | rounded(v.q) << 16); }
static INLINE void put(const u32*, Two v, u16* y) {
  store(y, __builtin_convertvector(rounded(v.p), U16s)), store(y + LANES, __builtin_convertvector(rounded(v.q), U16s));
}
