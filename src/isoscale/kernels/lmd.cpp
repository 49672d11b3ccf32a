// A step of log-normal multiplicative dynamics and its next weights, in one pass over memory; `lmd.py` defines it.
//
// How: a block of weights goes through short stages (noise, gradients, moves, noise, weights), each a loop over
// registers without a dependence from one to the next, on what lies in the innermost cache. Nothing random is stored:
// the noise that the gradient was taken with is made again from the index. While noise is made memory has nothing to
// do, so what the next block reads is fetched then.
// All forms are one text. What a run is made of (form, regulariser, storage) is a branch that always goes the same way,
// which hides behind the arithmetic; in the common runs those words are constants.
// What is lost: exponentials are powers of two within 2 ulp of one fused product, not the bits of torch's; and where t
// is exactly 0 the sign is +.

#include "lmd_lanes.h"
#include "threads.h"

enum { LOG_NORMAL, CONSTANT, HALF_NORMAL, EXPONENTIAL };  // regulariser
static const float LOG2E = 0x1.715476p0f, ROOT2 = 0x1.6a09e6p0f, TINY = 0x1p-126f;

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
  float alpha, pulled, rest1, rest2, low, high, lift, rate, cell, top, range, shrink;
  LmdDraw now, next;
  u32 rounding[2][2];
  i32 hyper, rule, median, momentum, grad, weight, raw, single, direct, step, tame, threads;
};

static const int BLOCK = 256;  // elements that go through a stage at once
static const int LINES = BLOCK / LANES;
static const i64 UNIT_OF_WORK = 1024;
struct Arrays { char *a[2], *v[2], *g[2], *out; };
struct alignas(64) Room {  // of a block
  float z[2][BLOCK];  // bells, then u, then bells of the next sample: what is in the innermost cache is read there
  u32 rounding[2][BLOCK];
  float logs[2][BLOCK];  // of medians on a grid; others are read where they lie
};

// What a run is made of: constants where COMMON (fp32 medians, log-normal pull, signs, two betas, gradients g).
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
  INLINE bool tame() const { return COMMON ? true : j.tame; }
  INLINE F power_of(F y) const { return tame() ? tame_power(y) : power(y); }
  INLINE bool step() const { return COMMON ? true : j.step; }
};

// ---- samples

template <class K> static INLINE F part(const K& k, const LmdDraw& d, const float* a, const float* z) {  // p+ or p-
  F y = fma(load<F>(a), all(LOG2E), all(d.offset));
  return k.power_of(d.noise == 0.f ? y : fma(load<F>(z), all(d.noise), y));
}
struct Hyper { F net, gross, square; };  // m+ - m-, m+ + m- and m+^2 + m-^2, over b: m+ m- is b^2
static INLINE Hyper hyper(const float* theta) {
  Pair m = powers(load<F>(theta) * LOG2E);
  F net = m.up - m.down;
  return {net, m.up + m.down, fma(net, net, all(2.f))};
}

template <class K> static INLINE void gradients(const K& k, const Arrays& p, i64 i, int n, float* const* a, Room& r) {
  const LmdDraw& d = k.j.now;
  for (int l = 0; l < n; l += WIDTH) {
    F g = read(p.g[0], i + l, k.grad());
    if (k.direct()) {
      store(r.z[0] + l, g);
      if (!k.hyper()) store(r.z[1] + l, read(p.g[1], i + l, k.grad()));
    } else if (!k.hyper()) {
      store(r.z[0] + l, g * part(k, d, a[0] + l, r.z[0] + l));
      store(r.z[1] + l, -g * part(k, d, a[1] + l, r.z[1] + l));
    } else {
      Hyper h = hyper(a[0] + l);
      F slope = all(d.scale);
      if (d.spread != 0.f) slope = fma(back_root(h.square) * (d.spread * ROOT2) * h.net, load<F>(r.z[0] + l), slope);
      store(r.z[0] + l, g * h.gross * slope);
    }
  }
}
template <class K>
static INLINE void weights(const K& k, const Arrays& p, i64 i, int n, float* const* a, const Room& r) {
  const LmdDraw& d = k.j.next;
  for (int l = 0; l < n; l += WIDTH) {
    F w;
    if (!k.hyper()) {
      w = part(k, d, a[0] + l, r.z[0] + l) - part(k, d, a[1] + l, r.z[1] + l);
    } else {
      Hyper h = hyper(a[0] + l);
      w = h.net * d.scale;
      if (d.spread != 0.f) w = fma(root(h.square) * (d.spread * ROOT2), load<F>(r.z[0] + l), w);
    }
    write(p.out, i + l, k.weight(), w);
  }
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
  const float at[3] = {0x1.306fep0f, 0x1.6a09e6p0f, 0x1.ae89fap0f};  // 2^(1/4), 2^(2/4), 2^(3/4)
  const float under[3] = {0x1.ae89fap-1f, 0x1.6a09e6p-1f, 0x1.306fep-1f};
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

template <class K>
static INLINE void moves(const K& k, const Arrays& p, i64 i, int n, int side, float* a, const Room& r) {
  const Lmd& j = k.j;
  for (int l = 0; l < n; l += WIDTH) {
    F stored = read(p.v[side], i + l, k.momentum()), v = stored, u = load<F>(r.z[side] + l), was = load<F>(a + l);
    if (k.momentum() == ON_GRID8) v = momentum_of(j, stored);
    F t = fma(u - v, all(j.rest1), v), kept = k.single() ? t : fma(u - v, all(j.rest2), v);
    F s = k.raw() ? t * j.alpha : (F)(((U)t & 0x80000000u) | (U)all(j.alpha));  // alpha is not negative
    F turn = fma(pull(j, k.rule(), k.hyper(), was), all(j.pulled), s);
    if (!k.tame()) turn = lesser(larger(turn, all(-1.f)), all(1.f));
    F to = lesser(larger(was - turn, all(j.low)), all(j.high));
    I dead = u == 0.f;
    U bits = load<U>(r.rounding[side] + l);
    if (k.median() != IN_FP32) {
      F code = floor_of(to * (1.f / j.cell) + uniform(bits, 0));
      code = pick(dead, was * (1.f / j.cell), lesser(larger(code, all(-j.top - 1.f)), all(j.top)));
      write(p.a[side], i + l, k.median(), code);
      to = code * j.cell;
    }
    if (k.momentum() == ON_GRID8) kept = momentum_code(j, kept, uniform(bits, 1));
    store(a + l, pick(dead, was, to));
    write(p.v[side], i + l, k.momentum(), pick(dead, stored, kept));
  }
}

// ---- the walk

struct Walk {  // the index of an element is start + (i / inner) stride + i % inner; a line is 16 indices
  i64 inner, stride, left;  // left: elements in this row
  u64 index;
  bool even;  // this block: one row, whole lines, and one high half of their numbers
  u32 first, above;
  alignas(64) u32 low[BLOCK], high[BLOCK], lane[BLOCK];  // of an uneven one, by element
  Walk(const Lmd& j, i64 i) {
    inner = j.inner, stride = j.stride, left = j.inner - i % j.inner;
    index = (u64)(j.start + i / j.inner * j.stride + i % j.inner);
  }
  void next() {
    u64 line = index / LANES;
    first = (u32)line, above = (u32)(line >> 32) * HIGH;
    even = left > BLOCK && index % LANES == 0 && first <= 0u - LINES;
    if (even) {
      left -= BLOCK, index += BLOCK;
      return;
    }
    for (int l = 0; l < BLOCK; l++) {
      low[l] = (u32)(index / LANES), high[l] = (u32)(index / LANES >> 32) * HIGH, lane[l] = index % LANES;
      index++;
      if (--left == 0) left = inner, index += (u64)(stride - inner);
    }
  }
};

struct Stream {  // what its words are made of, and where they go
  u32 keys[2];
  alignas(64) u32 flip[LANES], times[LANES], lines[LINES];  // of the lanes, of the lines of an even block
  Stream() {}
  Stream(const u32* k) {
    keys[0] = k[0], keys[1] = k[1];
    for (int l = 0; l < LANES; l++) lane_keys(k[1], l, flip + l, times + l);
  }
  void next(const Walk& walk) {
    for (int l = 0; l < LINES; l += WIDTH) {
      U line = count() + (walk.first + l + keys[0]);
      store(lines + l, mix(line ^ walk.above, keys[1]));
    }
  }
};

typedef const char* const* Ahead;  // SIDES + 1 addresses to fetch
template <bool BELLS, int SIDES, bool EVEN>
static INLINE void noise_of(const Walk& walk, const Stream* s, void* out, Ahead ahead) {
  for (int l = 0; l < BLOCK; l += WIDTH) {
#pragma GCC unroll 3
    for (int at = 0; at <= SIDES; at++) __builtin_prefetch(ahead[at] + l * 4, 0, 2);
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; side++) {
      U flip, times, line;
      if (EVEN) {
        flip = load<U>(s[side].flip + l % LANES), times = load<U>(s[side].times + l % LANES);
        line = s[side].lines[l / LANES] - U{};
      } else {
        line = mix((load<U>(walk.low + l) + s[side].keys[0]) ^ load<U>(walk.high + l), s[side].keys[1]);
        for (int at = 0; at < WIDTH; at++)
          flip[at] = s[side].flip[walk.lane[l + at]], times[at] = s[side].times[walk.lane[l + at]];
      }
      U h = words(line, flip, times);
      if (BELLS) store((float*)out + side * BLOCK + l, bell(h));
      else store((u32*)out + side * BLOCK + l, h);
    }
  }
}
template <bool BELLS, int SIDES> static INLINE void noise(const Walk& walk, Stream* s, void* out, Ahead ahead) {
  for (int side = 0; side < SIDES && walk.even; side++) s[side].next(walk);
  if (walk.even) noise_of<BELLS, SIDES, true>(walk, s, out, ahead);
  else noise_of<BELLS, SIDES, false>(walk, s, out, ahead);
}

struct Streams { Stream now[2], next[2], rounding[2]; };
template <class K>
static INLINE void block(const K& k, const Arrays& p, i64 i, int n, Walk& walk, Streams& streams) {
  const Lmd& j = k.j;
  Room r;
  float* a[2];
  const int sides = k.hyper() ? 1 : 2, median = k.median();
  const bool now = !k.direct() && (k.hyper() ? j.now.spread : j.now.noise) != 0.f;
  const bool next = (k.hyper() ? j.next.spread : j.next.noise) != 0.f;
  const bool grids = median != IN_FP32 || k.momentum() == ON_GRID8;
  const i64 b = i + BLOCK;  // what the next block reads is fetched while noise is made: then memory has nothing to do
  walk.next();
  for (int s = 0; s < sides; s++) {
    a[s] = median == IN_FP32 ? (float*)p.a[s] + i : r.logs[s];
    for (int l = 0; median != IN_FP32 && l < n; l += WIDTH) store(a[s] + l, read(p.a[s], i + l, median) * j.cell);
  }
  const i64 m = b * size_of(k.momentum()), q = b * size_of(median);
  const char* first[3] = {p.g[0] + b * size_of(k.grad()), p.v[0] + m, p.v[1] + m};
  const char* second[3] = {p.out + b * size_of(k.weight()), p.a[0] + q, p.a[1] + q};
  if (k.step()) {
    if (now && k.hyper()) noise<true, 1>(walk, streams.now, r.z, first);
    if (now && !k.hyper()) noise<true, 2>(walk, streams.now, r.z, first);
    if (grids && k.hyper()) noise<false, 1>(walk, streams.rounding, r.rounding, first);
    if (grids && !k.hyper()) noise<false, 2>(walk, streams.rounding, r.rounding, first);
    gradients(k, p, i, n, a, r);
    for (int s = 0; s < sides; s++) moves(k, p, i, n, s, a[s], r);
  }
  if (next && k.hyper()) noise<true, 1>(walk, streams.next, r.z, second);
  if (next && !k.hyper()) noise<true, 2>(walk, streams.next, r.z, second);
  weights(k, p, i, n, a, r);
}

template <class K> static void lmd_work(void* what, i64 from, i64 to, int) {
  const Lmd j = *(const Lmd*)what;  // a copy: what is written cannot change it, so it stays in registers
  const K k = {j};
  i64 i = from * UNIT_OF_WORK, end = least(to * UNIT_OF_WORK, j.n);
  Arrays p = {}, q = {};
  for (int s = 0; s < 2; s++) p.a[s] = (char*)j.medians[s], p.v[s] = (char*)j.momenta[s], p.g[s] = (char*)j.given[s];
  p.out = (char*)j.out;
  Walk walk(j, i);
  Streams streams;
  for (int s = 0; s < (j.hyper ? 1 : 2); s++) {
    streams.now[s] = Stream(j.now.keys[s]), streams.next[s] = Stream(j.next.keys[s]);
    streams.rounding[s] = Stream(j.rounding[s]);
  }
  for (; i + BLOCK <= end; i += BLOCK) block(k, p, i, BLOCK, walk, streams);
  if (i == end) return;
  alignas(64) char room[7][4 * BLOCK] = {};
  char **real = (char**)&p, **copy = (char**)&q;  // the rest: the same, on copies
  const int types[7] = {k.median(), k.median(), k.momentum(), k.momentum(), k.grad(), k.grad(), k.weight()};
  for (int b = 0; b < 7; b++) {
    i64 size = size_of(types[b]);
    copy[b] = room[b];
    if (real[b]) memcpy(room[b], real[b] + i * size, (end - i) * size);
  }
  block(k, q, 0, BLOCK, walk, streams);
  for (int b = 0; b < 7; b++) {
    i64 size = size_of(types[b]);
    if (real[b] && b != 4 && b != 5) memcpy(real[b] + i * size, room[b], (end - i) * size);
  }
}

typedef void (*LmdWork)(void*, i64, i64, int);
template <bool HYPER, int MOMENTUM> static LmdWork common(const Lmd& j) {
  if (j.grad == IN_FP32) return lmd_work<Kind<true, HYPER, MOMENTUM, IN_FP32>>;
  return lmd_work<Kind<true, HYPER, MOMENTUM, IN_BF16>>;
}
template <bool HYPER> static LmdWork chosen(const Lmd& j) {
  bool plain = j.step && j.tame && !j.raw && !j.single && !j.direct && j.rule == LOG_NORMAL && j.grad == j.weight;
  if (!plain || j.median != IN_FP32 || j.momentum == ON_GRID8) return lmd_work<Kind<false, HYPER, 0, 0>>;
  return j.momentum == IN_FP32 ? common<HYPER, IN_FP32>(j) : common<HYPER, IN_BF16>(j);
}

extern "C" int isoscale_lmd_size() { return (int)sizeof(Lmd); }
extern "C" void isoscale_lmd(const Lmd* j) {
  i64 units = (j->n + UNIT_OF_WORK - 1) / UNIT_OF_WORK;
  parallel(units, j->n, j->threads, j->hyper ? chosen<true>(*j) : chosen<false>(*j), (void*)j);
}

// The words and normals of `j->next.keys[0]` at the place of j, as the steps have them: for tests.
extern "C" void isoscale_lmd_noise(const Lmd* j, u32* bits, float* normals) {
  Walk walk(*j, 0);
  const char* ahead[2] = {};
  Stream stream(j->next.keys[0]);
  alignas(64) u32 h[BLOCK];
  alignas(64) float z[BLOCK];
  for (i64 i = 0; i < j->n; i += BLOCK) {
    i64 bytes = 4 * least<i64>(BLOCK, j->n - i);
    walk.next();
    noise<false, 1>(walk, &stream, h, ahead);
    noise<true, 1>(walk, &stream, z, ahead);
    for (int l = 0; l < BLOCK; l++) z[l] *= UNIT;
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
