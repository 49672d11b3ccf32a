// A step of log-normal multiplicative dynamics, and its next weights, in one pass over memory; `lmd.py` is the definition.
//
// How: a register's worth of weights at a time goes through everything: the sample that the gradient was taken at is made
// again from the index (nothing random is stored), the medians move, the next sample is made and the weights are written.
// All forms are one text. What a run is made of (form, regulariser, storage) is a branch that always goes the same way,
// which hides behind the arithmetic; in the common runs those words are constants.
// Exponentials are powers of two of one fused product: log2(e) is in the factors. What is lost: exponentials within 2 ulp
// of that product, not the bits of torch's.

#include "lmd_lanes.h"
#include "threads.h"

enum { LOG_NORMAL, CONSTANT, HALF_NORMAL, EXPONENTIAL };  // regulariser
static const float LOG2E = 0x1.715476p0f, TINY = 0x1p-126f;

struct LmdDraw {  // mirrored field by field in cpu_lmd.py, as Lmd
  float noise, offset, scale, spread;  // exponent: log2(e) a + noise bell + offset; scale and spread: of theta only
  u32 keys[2][2];
};
extern "C" struct Lmd {
  void* medians[2];
  void* momenta[2];
  const void* given[2];
  void* out;
  i64 n, start, inner, stride;
  float alpha, decay, beta1, rest1, beta2, rest2, low, high, lift, rate, cell, top, range, shrink;
  LmdDraw now, next;
  u32 rounding[2][2];
  i32 hyper, rule, median, momentum, grad, weight, raw, single, direct, step, threads;
};

struct Arrays { char *a[2], *v[2], *g[2], *out; };
static const int BLOCK = 256;  // elements whose noise is made at once
static const i64 UNIT_OF_WORK = 1024;
struct Noise { float now[2][BLOCK], next[2][BLOCK]; u32 rounding[2][BLOCK]; };

// What a run is made of: constants where COMMON (fp32 medians, log-normal pull, signs, two betas, gradients at the sample).
template <bool COMMON, bool HYPER, int MOMENTUM, int FLOAT> struct Kind {
  const Lmd& j;
  INLINE bool hyper() const { return HYPER; }
  INLINE int rule() const { return COMMON ? (int)LOG_NORMAL : j.rule; }
  INLINE int median() const { return COMMON ? (int)IN_FP32 : j.median; }
  INLINE int momentum() const { return COMMON ? MOMENTUM : j.momentum; }
  INLINE int grad() const { return COMMON ? FLOAT : j.grad; }
  INLINE int weight() const { return COMMON ? FLOAT : j.weight; }
  INLINE bool raw() const { return COMMON ? false : j.raw; }
  INLINE bool single() const { return COMMON ? false : j.single; }
  INLINE bool direct() const { return COMMON ? false : j.direct; }
  INLINE bool step() const { return COMMON ? true : j.step; }
};

// ---- samples

static INLINE F part(const LmdDraw& d, F a, const float* z) {  // p+ or p- of the split
  F y = fma(a, all(LOG2E), all(d.offset));
  return power(d.noise == 0.f ? y : fma(load<F>(z), all(d.noise), y));
}
struct Hyper { F net, gross, square; };
static INLINE Hyper hyper(const LmdDraw& d, F theta) {
  F up = power(fma(theta, all(LOG2E), all(d.offset))), down = power(fma(theta, all(-LOG2E), all(d.offset)));
  return {up - down, up + down, larger(fma(up, up, down * down), all(0x1p-120f))};
}
template <class K> static INLINE F weights(const K& k, const LmdDraw& d, const F* a, const float* z) {
  if (!k.hyper()) return part(d, a[0], z) - part(d, a[1], z + BLOCK);
  Hyper h = hyper(d, a[0]);
  F w = h.net * d.scale;
  return d.spread == 0.f ? w : fma(h.square * back_root(h.square) * d.spread, load<F>(z), w);
}
template <class K> static INLINE void gradients(const K& k, const LmdDraw& d, const F* a, F g, const float* z, F* u) {
  if (!k.hyper()) {
    u[0] = g * part(d, a[0], z), u[1] = -(g * part(d, a[1], z + BLOCK));
    return;
  }
  Hyper h = hyper(d, a[0]);
  F slope = all(d.scale);
  if (d.spread != 0.f) slope = fma(h.net * back_root(h.square) * d.spread, load<F>(z), slope);
  u[0] = g * h.gross * slope;
}

// ---- the update

static INLINE F pull(const Lmd& j, int rule, bool hyper, F a) {  // R
  if (rule == LOG_NORMAL) return a;
  if (rule == CONSTANT) return all(1.f);
  F up = power(fma(a, all(j.rate), all(j.lift)));
  return hyper ? (up - power(fma(a, all(-j.rate), all(j.lift)))) * 0.5f : up - 1.f;
}

// Codes of momenta on the grid of quarter octaves, below 2^range; 0 is zero.
static INLINE F momentum_of(const Lmd& j, F code) {
  F size = (F)((U)code & 0x7fffffffu);
  F v = power((size - 127.f) * 0.25f + j.range);
  return (F)((U)pick(size == 0.f, F{}, v) | ((U)code & 0x80000000u));
}
static INLINE F momentum_code(const Lmd& j, F v, F u) {  // between two neighbours by chance, without bias
  F x = larger((F)((U)v & 0x7fffffffu) * j.shrink, all(TINY));
  F m = (F)(((U)x & 0x007fffffu) | 0x3f800000u), factor = all(1.f), quarter = F{};
  const float at[3] = {0x1.306fep0f, 0x1.6a09e6p0f, 0x1.ae89fap0f}, under[3] = {0x1.ae89fap-1f, 0x1.6a09e6p-1f, 0x1.306fep-1f};
  for (int q = 0; q < 3; q++) {
    I above = m >= at[q];
    factor = pick(above, all(under[q]), factor), quarter = pick(above, all(q + 1.f), quarter);
  }
  F below = __builtin_convertvector((I)((U)x >> 23) - 127, F) * 4.f + quarter + 127.f;
  F share = pick(below <= 0.f, x * 0x1.6a09e6p31f, (m * factor - 1.f) * 0x1.5240fp2f);
  below = lesser(larger(below, F{}), all(127.f));
  F code = lesser(below + pick(u < share, all(1.f), F{}), all(127.f));
  return (F)((U)code | ((U)v & 0x80000000u));
}

template <class K> static INLINE F moved(const K& k, const Arrays& p, i64 i, int side, F a, F u, const u32* rounding) {
  const Lmd& j = k.j;
  F stored = read(p.v[side], i, k.momentum()), v = stored;
  if (k.momentum() == ON_GRID8) v = momentum_of(j, stored);
  F t = fma(v, all(j.beta1), u * j.rest1), kept = t;
  if (!k.single()) kept = fma(v, all(j.beta2), u * j.rest2);
  F s = t;
  if (!k.raw()) s = pick(t == 0.f, F{}, (F)(((U)t & 0x80000000u) | 0x3f800000u));
  F turn = fma(pull(j, k.rule(), k.hyper(), a), all(j.decay), s) * j.alpha;
  F to = a - lesser(larger(turn, all(-1.f)), all(1.f));
  to = lesser(larger(to, all(j.low)), all(j.high));
  U bits = load<U>(rounding);
  I dead = u == 0.f;
  if (k.median() == IN_FP32) {
    to = pick(dead, a, to);
    write(p.a[side], i, IN_FP32, to);
  } else {
    F code = floor_of(to * (1.f / j.cell) + uniform(bits, 0));
    code = pick(dead, a * (1.f / j.cell), lesser(larger(code, all(-j.top - 1.f)), all(j.top)));
    write(p.a[side], i, k.median(), code);
    to = code * j.cell;
  }
  if (k.momentum() == ON_GRID8) kept = momentum_code(j, kept, uniform(bits, 1));
  write(p.v[side], i, k.momentum(), pick(dead, stored, kept));
  return to;
}

template <class K> static INLINE void lanes(const K& k, const Arrays& p, i64 i, const Noise& z, i64 at) {
  const Lmd& j = k.j;
  F a[2], u[2];
  int sides = k.hyper() ? 1 : 2;
  for (int s = 0; s < sides; s++) {
    a[s] = read(p.a[s], i, k.median());
    if (k.median() != IN_FP32) a[s] *= j.cell;
  }
  if (k.step()) {
    F g = read(p.g[0], i, k.grad());
    if (!k.direct()) {
      gradients(k, j.now, a, g, z.now[0] + at, u);
    } else {
      u[0] = g;
      if (sides == 2) u[1] = read(p.g[1], i, k.grad());
    }
    for (int s = 0; s < sides; s++) a[s] = moved(k, p, i, s, a[s], u[s], z.rounding[s] + at);
  }
  write(p.out, i, k.weight(), weights(k, j.next, a, z.next[0] + at));
}

// ---- the walk

// Indices of a block: start + (i / inner) stride + i % inner, as low halves and HIGH times the high ones.
struct Walk {
  i64 inner, stride, left;  // left: elements in this row
  u64 index;
  Walk(const Lmd& j, i64 i) {
    inner = j.inner, stride = j.stride, left = j.inner - i % j.inner;
    index = (u64)(j.start + i / j.inner * j.stride + i % j.inner);
  }
  void next(u32* FAST low, u32* FAST high) {
    if (left > BLOCK && (u32)index <= 0u - BLOCK) {
      u32 first = (u32)index, above = (u32)(index >> 32) * HIGH;
      for (int l = 0; l < BLOCK; l++) low[l] = first + l, high[l] = above;
      left -= BLOCK, index += BLOCK;
      return;
    }
    for (int l = 0; l < BLOCK; l++) {
      low[l] = (u32)index, high[l] = (u32)(index >> 32) * HIGH;
      index++;
      if (--left == 0) left = inner, index += (u64)(stride - inner);
    }
  }
};

static void bells(const u32* keys, const u32* low, const u32* high, float* z) {
  for (int l = 0; l < BLOCK; l += WIDTH) store(z + l, bell(words(keys, load<U>(low + l), load<U>(high + l))));
}
template <class K> static INLINE void fill(const K& k, Noise& z, Walk& walk) {
  const Lmd& j = k.j;
  u32 low[BLOCK], high[BLOCK];
  walk.next(low, high);
  bool grids = k.median() != IN_FP32 || k.momentum() == ON_GRID8;
  for (int s = 0; s < (k.hyper() ? 1 : 2); s++) {
    if (k.step() && !k.direct() && (k.hyper() ? j.now.spread : j.now.noise) != 0.f) bells(j.now.keys[s], low, high, z.now[s]);
    if ((k.hyper() ? j.next.spread : j.next.noise) != 0.f) bells(j.next.keys[s], low, high, z.next[s]);
    for (int l = 0; grids && k.step() && l < BLOCK; l += WIDTH)
      store(z.rounding[s] + l, words(j.rounding[s], load<U>(low + l), load<U>(high + l)));
  }
}

template <class K> static void lmd_work(void* what, i64 from, i64 to, int) {
  const Lmd j = *(const Lmd*)what;  // a copy: what is written cannot change it, so it stays in registers
  const K k = {j};
  i64 i = from * UNIT_OF_WORK, end = least(to * UNIT_OF_WORK, j.n);
  Arrays p = {}, q = {};
  for (int s = 0; s < 2; s++) p.a[s] = (char*)j.medians[s], p.v[s] = (char*)j.momenta[s], p.g[s] = (char*)j.given[s];
  p.out = (char*)j.out;
  Walk walk(j, i);
  Noise z;
  char room[7][4 * WIDTH] = {};
  char **real = (char**)&p, **copy = (char**)&q;
  const int types[7] = {k.median(), k.median(), k.momentum(), k.momentum(), k.grad(), k.grad(), k.weight()};
  for (; i < end; i += BLOCK) {
    fill(k, z, walk);
    i64 count = least<i64>(BLOCK, end - i), at = 0;
    for (; at + WIDTH <= count; at += WIDTH) lanes(k, p, i + at, z, at);
    if (at == count) continue;
    for (int b = 0; b < 7; b++) {  // the rest: the same, on copies
      i64 size = size_of(types[b]);
      copy[b] = room[b];
      if (real[b]) memcpy(room[b], real[b] + (i + at) * size, (count - at) * size);
    }
    lanes(k, q, 0, z, at);
    for (int b = 0; b < 7; b++) {
      i64 size = size_of(types[b]);
      if (real[b] && b != 4 && b != 5) memcpy(real[b] + (i + at) * size, room[b], (count - at) * size);
    }
  }
}

template <bool HYPER> static void (*chosen(const Lmd& j))(void*, i64, i64, int) {
  bool common = j.step && !j.raw && !j.single && !j.direct && j.rule == LOG_NORMAL && j.median == IN_FP32;
  if (common && j.momentum != ON_GRID8 && j.grad == j.weight) {
    if (j.momentum == IN_FP32) return j.grad == IN_FP32 ? lmd_work<Kind<true, HYPER, IN_FP32, IN_FP32>> : lmd_work<Kind<true, HYPER, IN_FP32, IN_BF16>>;
    return j.grad == IN_FP32 ? lmd_work<Kind<true, HYPER, IN_BF16, IN_FP32>> : lmd_work<Kind<true, HYPER, IN_BF16, IN_BF16>>;
  }
  return lmd_work<Kind<false, HYPER, 0, 0>>;
}

extern "C" int isoscale_lmd_size() { return (int)sizeof(Lmd); }
extern "C" void isoscale_lmd(const Lmd* j) {
  parallel((j->n + UNIT_OF_WORK - 1) / UNIT_OF_WORK, j->n, j->threads, j->hyper ? chosen<true>(*j) : chosen<false>(*j), (void*)j);
}

// The words and normals of `j->next.keys[0]` at the place of j, as the steps have them: for tests.
extern "C" void isoscale_lmd_noise(const Lmd* j, u32* bits, float* normals) {
  Walk walk(*j, 0);
  u32 low[BLOCK], high[BLOCK], h[BLOCK];
  float z[BLOCK];
  for (i64 i = 0; i < j->n; i += BLOCK) {
    i64 bytes = 4 * least<i64>(BLOCK, j->n - i);
    walk.next(low, high);
    bells(j->next.keys[0], low, high, z);
    for (int l = 0; l < BLOCK; l += WIDTH) {
      store(h + l, words(j->next.keys[0], load<U>(low + l), load<U>(high + l)));
      store(z + l, load<F>(z + l) * UNIT);
    }
    memcpy(bits + i, h, bytes), memcpy(normals + i, z, bytes);
  }
}

// ---- is all of it finite?

struct Finite { const char* x; i64 n, size; int bad; };
static void finite_work(void* what, i64 from, i64 to, int) {
  Finite& f = *(Finite*)what;
  i64 per = UNIT_OF_WORK * f.size, end = least(to * per, f.n * f.size);
  bool half = f.size == 2;
  for (i64 i = from * per; i < end;) {
    U bad = {}, u;
    for (i64 stop = least(end, i + 4 * per); i < stop; i += sizeof u) {  // an exponent of ones only
      if (i + (i64)sizeof u <= end) u = load<U>(f.x + i);
      else u = U{}, memcpy(&u, f.x + i, end - i);
      bad |= (U)((u << 1) >= 0xff000000u);
      if (half) bad |= (U)((u << 17) >= 0xff000000u);
    }
    u32 any = 0;
    for (int l = 0; l < WIDTH; l++) any |= bad[l];
    if (any) { __atomic_store_n(&f.bad, 1, __ATOMIC_RELAXED); return; }
  }
}
extern "C" int isoscale_finite(const void* x, i64 n, i64 size, i32 threads) {  // size: bytes of a number
  Finite f = {(const char*)x, n, size, 0};
  parallel((n + UNIT_OF_WORK - 1) / UNIT_OF_WORK, n, threads, finite_work, &f);
  return !f.bad;
}
