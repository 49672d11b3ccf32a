// Numbers side by side for lmd.cpp, as many as a register of this machine holds: storage, noise, powers of two.
//
// The vector types of GCC and Clang, with an instruction by name where these have no word for it (fused products, the
// sum of bytes, tables): each has a plain form beside it, of the same bits where bits are promised (words and normals).

#pragma once

#include "elements.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDTH 16
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef u32 U __attribute__((vector_size(4 * WIDTH)));
typedef i32 I __attribute__((vector_size(4 * WIDTH)));
typedef u16 U16 __attribute__((vector_size(2 * WIDTH)));
typedef int16_t I16 __attribute__((vector_size(2 * WIDTH)));
typedef int8_t I8 __attribute__((vector_size(WIDTH)));

template <class V> static INLINE V load(const void* at) { V v; memcpy(&v, at, sizeof v); return v; }
template <class V> static INLINE void store(void* at, V v) { memcpy(at, &v, sizeof v); }
static INLINE F all(float x) { return x - F{}; }  // - 0 is nothing at all, + 0 would be an addition
static INLINE F pick(I where, F yes, F no) { return where ? yes : no; }

// 8 and 9: to the nearest and to the next lower whole number, without exceptions
#if WIDTH == 16
static INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static INLINE F less(F a, F b, F c) { return (F)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }  // c - a b
static INLINE F lesser(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
static INLINE F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
static INLINE F nearest(F x) { return (F)_mm512_roundscale_ps((__m512)x, 8); }
static INLINE F floor_of(F x) { return (F)_mm512_roundscale_ps((__m512)x, 9); }
#elif WIDTH == 8
static INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static INLINE F lesser(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
static INLINE F larger(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
static INLINE F nearest(F x) { return (F)_mm256_round_ps((__m256)x, 8); }
static INLINE F floor_of(F x) { return (F)_mm256_round_ps((__m256)x, 9); }
#else
static INLINE F fma(F a, F b, F c) { return a * b + c; }
static INLINE F lesser(F a, F b) { return a < b ? a : b; }
static INLINE F larger(F a, F b) { return a > b ? a : b; }
static INLINE F nearest(F x) { return (x + 0x1.8p23f) - 0x1.8p23f; }  // |x| < 2^22: of larger ones nothing is asked
static INLINE F floor_of(F x) { F r = nearest(x); return r - pick(r > x, all(1.f), F{}); }
#endif

// ---- storage

enum { IN_FP32, IN_BF16, ON_GRID16, ON_GRID8 };

static INLINE F read(const void* at, i64 i, int type) {
  switch (type) {
    case IN_FP32: return load<F>((const float*)at + i);
    case IN_BF16: return (F)(__builtin_convertvector(load<U16>((const u16*)at + i), U) << 16);
    case ON_GRID16: return __builtin_convertvector(__builtin_convertvector(load<I16>((const int16_t*)at + i), I), F);
    default: return __builtin_convertvector(__builtin_convertvector(load<I8>((const int8_t*)at + i), I), F);
  }
}
static INLINE U16 narrow(F x) {  // to bfloat16, nearest-even; what is below 2^-126 may become 0
#if WIDTH == 16 && defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh((__m512)x);
#else
  U u = (U)x;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1)) >> 16, U16);
#endif
}
static INLINE void write(void* at, i64 i, int type, F x) {  // codes: whole numbers
  switch (type) {
    case IN_FP32: return store((float*)at + i, x);
    case IN_BF16: return store((u16*)at + i, narrow(x));
    case ON_GRID16: return store((int16_t*)at + i, __builtin_convertvector(__builtin_convertvector(x, I), I16));
    default: return store((int8_t*)at + i, __builtin_convertvector(__builtin_convertvector(x, I), I8));
  }
}
static INLINE i64 size_of(int type) { return type == IN_FP32 ? 4 : type == ON_GRID8 ? 1 : 2; }

// ---- noise: `normals.py` is the definition

static const u32 FIRST = 0x21F0AAADu, SECOND = 0x735A2D97u, HIGH = 0x9E3779B1u;
static const float CUBIC = 1112070.f, UNIT = 0x1.8cc878p-28f;

static const int LANES = 16;

template <class H> static INLINE H mix(H h, u32 key) {  // h: a low half + the first key, ^ HIGH times the high half
  h = (h ^ (h >> 16)) * FIRST;
  h = ((h ^ (h >> 15)) + key) * SECOND;
  return h ^ (h >> 15);
}
static INLINE void lane_keys(u32 key, u32 lane, u32* flip, u32* times) {
  *flip = mix(key + lane * 0x9E3779B9u, 0u);
  *times = (*flip >> 16 | *flip << 16) | 1u;
}
static INLINE U words(U line, U flip, U times) {  // of the hash of a line, and the keys of the lanes
  U h = (line ^ flip) * times;
  return (h ^ (h >> 16)) * SECOND;
}
static INLINE U count() {
  U c = {};
  for (int l = 0; l < WIDTH; l++) c[l] = l;
  return c;
}
static INLINE F bell(U h) {  // normal numbers but for the factor UNIT; s s + CUBIC is exact, fused or not
#if WIDTH == 16 && defined(__AVX512VNNI__)
  I s = (I)_mm512_dpbusd_epi32(_mm512_set1_epi32(-510), (__m512i)h, _mm512_set1_epi8(1));
#else
  h = (h & 0x00ff00ffu) + ((h >> 8) & 0x00ff00ffu);
  I s = (I)((h + (h >> 16)) & 0xffffu) - 510;
#endif
  F x = __builtin_convertvector(s, F);
  return x * fma(x, x, all(CUBIC));
}
static INLINE F uniform(U h, int half) {  // in [0, 1), of 16 of the bits
  return __builtin_convertvector((I)((h >> (16 * half)) & 0xffffu), F) * 0x1p-16f;
}

// ---- functions

// 2^y within 2 ulp where that is a normal number; 0 and inf beyond, or the nearest normal numbers.
static INLINE F power(F y) {
#if WIDTH != 16
  y = lesser(larger(y, all(-126.f)), all(127.49f));
#endif
  F n = nearest(y), f = y - n;
  F p = fma(all(0x1.5bd97cp-10f), f, all(0x1.3ce8b2p-7f));  // the smallest relative error on [-1/2, 1/2] with p(0) = 1
  p = fma(p, f, all(0x1.c6b6dap-5f));
  p = fma(p, f, all(0x1.ebf9c2p-3f));
  p = fma(p, f, all(0x1.62e42ap-1f));
  p = fma(p, f, all(1.f));
#if WIDTH == 16
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (F)((U)p + ((U)__builtin_convertvector(n, I) << 23));
#endif
}

#if WIDTH == 16
static const U table = {
    0x3f800000u, 0x3f7daac3u, 0x3f7b95c2u, 0x3f79c3d3u, 0x3f7837f0u, 0x3f76f532u, 0x3f75fed7u, 0x3f75583fu,
    0x3f7504f3u, 0x3f7508a4u, 0x3f75672au, 0x3f76248cu, 0x3f7744fdu, 0x3f78ccdfu, 0x3f7ac0c7u, 0x3f7d257du};
#endif
// The same for |y| < 120, where a range check is spared: 2^(k/16) from a table, k nearest to 16 y, times 2^(the rest).
#if WIDTH == 16
static INLINE F tame_power(F y) {
  F t = y + 0x1.8p19f, f = y - (t - 0x1.8p19f);
  F s = (F)((U)_mm512_permutexvar_epi32((__m512i)t, (__m512i)table) + ((U)t << 19));
  F q = fma(fma(all(0x1.c6acd6p-5f), f, all(0x1.ebfff4p-3f)), f, all(0x1.62e43p-1f));
  return fma(f * s, q, s);
}
#else
static INLINE F tame_power(F y) { return power(y); }
#endif

struct Pair { F up, down; };
static INLINE Pair powers(F y) {  // 2^y and 2^-y
#if WIDTH == 16
  const U other = {
    0x3f800000u, 0x3f7d257du, 0x3f7ac0c7u, 0x3f78ccdfu, 0x3f7744fdu, 0x3f76248cu, 0x3f75672au, 0x3f7508a4u,
    0x3f7504f3u, 0x3f75583fu, 0x3f75fed7u, 0x3f76f532u, 0x3f7837f0u, 0x3f79c3d3u, 0x3f7b95c2u, 0x3f7daac3u};
  F t = y + 0x1.8p19f, f = y - (t - 0x1.8p19f), g = f * f;
  U shift = (U)t << 19;
  F up = (F)((U)_mm512_permutexvar_epi32((__m512i)t, (__m512i)table) + shift);
  F down = (F)((U)_mm512_permutexvar_epi32((__m512i)t, (__m512i)other) - shift);
  F even = fma(all(0x1.ebfff4p-3f), g, all(1.f)), odd = f * fma(all(0x1.c6acd6p-5f), g, all(0x1.62e43p-1f));
  return {up * (even + odd), down * (even - odd)};
#else
  return {power(y), power(-y)};
#endif
}

// 1 / sqrt(2 x) and sqrt(x / 2) within 2 ulp: so halved, a step of Newton's is a product less.
static INLINE F back_root(F x) {
#if WIDTH == 16
  F y = (F)_mm512_rsqrt14_ps((__m512)(x + x));
  return y * less(x * y, y, all(1.5f));
#else
  F y;
  for (int j = 0; j < WIDTH; j++) y[j] = 1.f / __builtin_sqrtf(x[j] + x[j]);
  return y;
#endif
}
static INLINE F root(F x) {
#if WIDTH == 16
  F y = (F)_mm512_rsqrt14_ps((__m512)(x + x)), r = x * y;
  return r * less(r, y, all(1.5f));
#else
  F y;
  for (int j = 0; j < WIDTH; j++) y[j] = __builtin_sqrtf(x[j] * 0.5f);
  return y;
#endif
}
