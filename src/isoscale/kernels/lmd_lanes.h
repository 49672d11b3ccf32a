// Numbers side by side for lmd.cpp, as many as one register of this machine holds: storage, noise, powers of two.
//
// The vector types of GCC and Clang, with an instruction by name where they have no word for it (fused products, the sum
// of bytes, 2^n): each of those has a plain form beside it, of the same bits where bits are promised (words and normals).

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

#if WIDTH == 16
static INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static INLINE F lesser(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
static INLINE F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
static INLINE F nearest(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static INLINE F floor_of(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
#elif WIDTH == 8
static INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static INLINE F lesser(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
static INLINE F larger(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
static INLINE F nearest(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static INLINE F floor_of(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
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
static INLINE void write(void* at, i64 i, int type, F x) {  // codes: whole numbers
  U u = (U)x;
  switch (type) {
    case IN_FP32: return store((float*)at + i, x);
    case IN_BF16: return store((u16*)at + i, __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1)) >> 16, U16));
    case ON_GRID16: return store((int16_t*)at + i, __builtin_convertvector(__builtin_convertvector(x, I), I16));
    default: return store((int8_t*)at + i, __builtin_convertvector(__builtin_convertvector(x, I), I8));
  }
}
static INLINE i64 size_of(int type) { return type == IN_FP32 ? 4 : type == ON_GRID8 ? 1 : 2; }

// ---- noise: `normals.py` is the definition

static const u32 FIRST = 0x21F0AAADu, SECOND = 0x735A2D97u, HIGH = 0x9E3779B1u;
static const float CUBIC = 1112070.f, UNIT = 0x1.8cc878p-28f;

static INLINE U words(const u32* keys, U low, U high) {  // of an index: its low half, and HIGH times its high half
  U h = (low + keys[0]) ^ high;
  h = (h ^ (h >> 16)) * FIRST;
  h = (h ^ (h >> 15)) + keys[1];
  h = h * SECOND;
  return h ^ (h >> 15);
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

static INLINE F back_root(F x) {  // 1 / sqrt(x) within 2 ulp, x a normal number
#if WIDTH == 16
  F y = (F)_mm512_rsqrt14_ps((__m512)x);
  return fma(y * 0.5f, fma(-(x * y), y, all(1.f)), y);
#else
  F y;
  for (int j = 0; j < WIDTH; j++) y[j] = 1.f / __builtin_sqrtf(x[j]);
  return y;
#endif
}
