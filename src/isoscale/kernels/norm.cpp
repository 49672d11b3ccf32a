// A norm and a cast of its result, row by row: x is read once from memory, and x / r is never written.
//
// How: the first look at a row gives the largest magnitude m of each block, and from those (MXNorm) or from the squares
// (RMSNorm) the divisor r. Rounding is monotone, so the largest magnitude of a block of y = x (1 / r) is m (1 / r),
// rounded: scales need no second look. The second look, at a row that is still in the cache, multiplies with 1 / r and
// the block's scale at once and writes codes (or values), while the next row is fetched.
// MXNorm's sum over blocks is one of integers (2^-36 of the largest magnitude's power of two), so no order of adding
// changes a bit of r, and each device gives the same.
// What is lost: nothing in bits. Rows that are all in range take the short way; a block that is not (of zeros, clamped,
// tiny, special) takes the long one, which writes y down and casts that.

#include "norm_lines.h"
#include "threads.h"

enum { MX1, MX2, RMS };  // kind
static const u32 LEAST = 67u << 23;  // 2^-60

extern "C" struct Norm {  // mirrored field by field in cpu_norm.py
  const void* residual;
  void* summed;
  float* rms;
  float eps, w_full, w_last, clamp;
  i32 kind, ride, out_dtype, fake, stat;
};

struct NormJob {
  Cast c;
  Norm n;
  Grid g;
  Fast fast;
  i64 K, span, row_bytes;  // span: blocks of a piece
  bool power, mend, simple;
  float s_enc, s_dec;
  int failed;
  NormJob(const Cast& cast, const Norm& norm) : c(cast), n(norm), g(cast), fast(cast, g) {
    K = (c.n + c.cols - 1) / c.cols, span = most<i64>(1, PIECE / c.cols), row_bytes = c.row_codes * c.bits / 8;
    power = c.rule != AMAX, mend = c.nan_code == 1 << (c.bits - 1), failed = 0;
    simple = !mend && c.m > 0 && (c.cols == 16 || c.cols % UNIT == 0);
    s_enc = s_dec = 1.f;
    if (c.scale == E4M3) {
      s_enc = c.tensor_amax == 0.f ? 1.f : least((c.max * 448.f) / c.tensor_amax, 0x1.fffffep127f);
      s_dec = 1.f / s_enc;
    }
  }
};

struct NormRoom {  // of one thread
  void* all;
  u32 *amax, *top, *stored, *y, *value, *fine;
  float *r, *d, *f;
  u8 *codes, *ok;
  NormRoom(i64 K, i64 row, i64 parts) {  // parts: blocks of the statistic, where they are not those of the scales
    i64 floats = K + 16, fines = parts ? parts + 16 : 0;
    all = malloc(4 * (6 * floats + 2 * PIECE + fines) + row + floats + 128);
    amax = (u32*)all, top = amax + floats, stored = top + floats, r = (float*)(stored + floats), d = r + floats;
    f = d + floats, y = (u32*)(f + floats), value = y + PIECE, fine = value + PIECE;
    codes = (u8*)(fine + fines), ok = codes + row + 64;
  }
  ~NormRoom() { free(all); }
};

// ---- the divisor

static float power_of_two(i32 e) { return number((u32)(e + 127) << 23); }  // normal numbers only

typedef i64 I64s __attribute__((vector_size(8 * LANES)));
template <bool SQUARE> static INLINE I64s parts_of(F32s m, float first, float second) {
  F32s v = m * first * second;
  return __builtin_convertvector((SQUARE ? v * v : v) * 0x1p36f, I64s);  // towards zero
}
template <bool SQUARE> static float mx_rms(const Norm& n, const u32* amax, i64 K) {
  u32 top = 0;
  for (i64 k = 0; k < K; k++) top = most(top, amax[k]);
  if (top >= INF) return number(NAN_BITS);
  bool tiny = top < 0x00800000u;
  i32 e = top == 0 ? 0 : (i32)(bits_of(tiny ? (float)(i32)top : number(top)) >> 23) - (tiny ? 276 : 127);
  i32 half = e >> 1;  // 2^-e may be no number; in two steps it is one
  float first = power_of_two(-half), second = power_of_two(half - e);
  I64s sums = {};
  u32 rest[LANES] = {0}, last[LANES] = {amax[K - 1]};
  i64 k = 0, whole = 0;
  for (; k + LANES <= K - 1; k += LANES) sums += parts_of<SQUARE>(load<F32s>(amax + k), first, second);
  memcpy(rest, amax + k, 4 * (K - 1 - k));
  sums += parts_of<SQUARE>(load<F32s>(rest), first, second);
  for (int j = 0; j < LANES; j++) whole += sums[j];
  float g = (n.w_full * (float)whole + n.w_last * (float)parts_of<SQUARE>(load<F32s>(last), first, second)[0]) * 0x1p-36f;
  return (SQUARE ? __builtin_sqrtf(g) : g) * power_of_two(half) * power_of_two(e - half) + n.eps;
}

template <class T> static float plain_rms(const Norm& n, const float* sums, const typename T::word* x, i64 size) {
  float all[SUMS];
  memcpy(all, sums, sizeof all);
  for (int step = SUMS / 2; step; step /= 2)
    for (int j = 0; j < step; j++) all[j] += all[j + step];
  if (all[0] >= 0x1p-100f && all[0] < number(INF)) return __builtin_sqrtf(all[0] / (float)size + n.eps);
  double sum = 0;  // squares that float32 cannot hold
  for (i64 i = 0; i < size; i++) sum += (double)number(T::wide(x[i])) * (double)number(T::wide(x[i]));
  return (float)__builtin_sqrt(sum / (double)size + (double)n.eps);
}

// ---- one row

// The long way for a block: y as the definition has it, and a cast of that. Returns where y lies.
template <class T> static const u32* written(const NormJob& j, NormRoom& s, const typename T::word* x, i64 n, float rr) {
  float clamp = j.n.clamp;
  for (i64 i = 0; i < n; i++) {
    float v = number(T::wide(x[i]));
    v = j.n.ride ? v : v * rr;
    s.y[i] = bits_of(v > clamp ? clamp : v < -clamp ? -clamp : v);
  }
  return s.y;
}
template <class T>
static void long_codes(const NormJob& j, NormRoom& s, const typename T::word* x, u8* out, i64 n, float rr, float r) {
  u8 nan = (u8)most(j.c.nan_code, 0);
  for (i64 p = 0; p < n; p += PIECE) {
    i64 count = least<i64>(PIECE, n - p);
    const u32* y = written<T>(j, s, x + p, count, rr);
    code_line<F32, false, false>(j.g, y, out + p, count, &r, 0);
    for (i64 i = 0; j.mend && i < count; i++) out[p + i] = out[p + i] == nan ? 0 : out[p + i];
    for (i64 i = 0; i < count; i++) {
      u32 a = y[i] & 0x7fffffffu;
      out[p + i] = a > INF || (a == INF && r == 0.f) ? nan : out[p + i];
    }
  }
}
template <class T, class U>
static void long_values(const NormJob& j, NormRoom& s, const typename T::word* x, typename U::word* out, i64 n, float rr,
                        float r, float d) {
  for (i64 p = 0; p < n; p += PIECE) {
    i64 count = least<i64>(PIECE, n - p);
    const u32* y = written<T>(j, s, x + p, count, rr);
    fake_line<F32, false, false>(j.g, y, s.value, count, &r, &d, 0);
    for (i64 i = 0; i < count; i++) {
      u32 u = s.value[i];
      out[p + i] = (u & 0x7fffffffu) > INF ? (typename U::word)U::nan : U::narrow(u);
    }
  }
}

// The long way or the short one, block by block: for rows that hold a block which must go the long way.
static void sort_out(const NormJob& j, NormRoom& s, const u32* top, i64 count, u32 clamp) {
  for (i64 b = 0; b < count; b++) {
    bool ok = j.simple && top[b] < INF && (j.n.ride || top[b] < clamp);
    i32 field = (i32)(bits_of(s.d[b]) >> 23);
    if (j.n.fake && j.power) ok = ok && field >= j.g.low && field <= j.g.high;
    else if (j.power && !j.n.ride) ok = ok && bits_of(s.f[b]) - 0x00800000u < 0x7f000000u && top[b] >= LEAST;
    s.ok[b] = ok;
  }
}

// The same as `prepare` for what most rows are: codes with E8M0 scales, all blocks in range (riding, rr is 1). False where
// one is not.
static bool prepare_plain(const NormJob& j, NormRoom& s, const u32* FAST amax, i64 count, float rr, u8* FAST scales) {
  u32 clamp = bits_of(j.n.clamp), bad = 0;
  i32 add = j.c.rule == EVEN ? 1 << (22 - j.c.m) : 0, emax = j.c.emax;
  i32 above = j.c.rule == CEIL ? 0 : j.c.rule == RCEIL ? (i32)(bits_of(j.c.max) & 0x7fffff) : 0x7fffff;
  float *FAST f = s.f, *FAST r = s.r;
  for (i64 b = 0; b < count; b++) {
    u32 u = bits_of(number(amax[b]) * rr);
    i32 code = (((i32)u + add) >> 23) - emax + ((i32)(u & 0x7fffff) > above ? 1 : 0);
    float shrink = number((u32)(254 - code) << 23), by = rr * shrink;
    bad |= (u >= clamp) | (u < LEAST) | ((u32)code - 1u >= 253u) | (bits_of(by) - 0x00800000u >= 0x7f000000u);
    f[b] = by, r[b] = shrink, scales[b] = (u8)code;
  }
  return !bad;
}

// Scales and factors of `count` blocks from amax; true when all of them may go the short way.
static bool prepare(const NormJob& j, NormRoom& s, const u32* FAST amax, i64 count, float rr) {
  u32 *FAST top = s.top, clamp = bits_of(j.n.clamp), out = !j.simple;
  float *FAST f = s.f, *FAST r = s.r;
  bool ride = j.n.ride, power = j.power && !ride;
  for (i64 b = 0; b < count; b++) {
    u32 u = bits_of(number(amax[b]) * rr) & 0x7fffffffu;
    top[b] = ride ? amax[b] : u > clamp && u <= INF ? clamp : u;
  }
  out |= scale_blocks(j.c, j.s_enc, j.s_dec, top, count, r, s.d, s.stored);
  for (i64 b = 0; b < count; b++) {  // x rr r in one product: exact unless it leaves the normal numbers; and what y
    f[b] = power ? rr * r[b] : r[b];   // loses below 2^-126 does not count beside a top of 2^-60
    out |= power && !j.n.fake && ((bits_of(f[b]) - 0x00800000u >= 0x7f000000u) | (top[b] < LEAST));
    out |= !ride && top[b] >= clamp;
  }
  if (j.n.fake && j.power)
    for (i64 b = 0; b < count; b++) {
      i32 field = (i32)(bits_of(s.d[b]) >> 23);
      out |= (field < j.g.low) | (field > j.g.high);
    }
  if (out) sort_out(j, s, top, count, clamp);
  return !out;
}

template <class T, int N>
static void short_codes(const NormJob& j, const typename T::word* x, u8* out, i64 blocks, float rr, const float* f,
                        const typename T::word* next) {
  bool twice = !j.power && !j.n.ride;
  auto run = j.c.twos ? (twice ? norm_codes<T, N, true, true> : norm_codes<T, N, true, false>)
                      : (twice ? norm_codes<T, N, false, true> : norm_codes<T, N, false, false>);
  run(j.fast, x, out, blocks, j.c.cols, rr, f, next);
}
template <class T, class U, int N>
static void short_values(const NormJob& j, const typename T::word* x, typename U::word* out, i64 blocks, float rr,
                         const float* r, const float* d, const typename T::word* next) {
  auto run = j.power ? (j.n.ride ? norm_values<T, U, N, true, false> : norm_values<T, U, N, true, true>)
                     : (j.n.ride ? norm_values<T, U, N, false, false> : norm_values<T, U, N, false, true>);
  run(j.fast, x, out, blocks, j.c.cols, rr, r, d, next);
}

// Blocks [b0, b0 + count) of a row; amax: theirs. `next` - x: how far ahead memory is fetched.
template <class T, class U>
static void cast_part(const NormJob& j, NormRoom& s, const typename T::word* x, void* out, void* scales, i64 b0, i64 count,
                      float rr, const typename T::word* next) {
  const Cast& c = j.c;
  bool plain = c.scale == E8M0 && j.simple && !j.n.fake;
  plain = plain && prepare_plain(j, s, s.amax + b0, count, rr, (u8*)scales + b0);
  bool all = plain || prepare(j, s, s.amax + b0, count, rr);
  if (plain) {
  } else if (c.scales && c.scale == FP32) {
    memcpy((u32*)scales + b0, s.stored, 4 * count);
  } else if (c.scales) {
    for (i64 b = 0; b < count; b++) ((u8*)scales)[b0 + b] = (u8)s.stored[b];
  }
  i64 full = most<i64>(0, least(count, c.n / c.cols - b0)), run;
  bool halves = c.cols == 16;
  for (i64 b = 0; b < count; b += run) {
    i64 at = (b0 + b) * c.cols, n = least(c.n - at, c.cols);
    run = all && b < full ? full - b : 0;
    if (!all)
      while (b + run < full && s.ok[b + run]) run++;
    run -= halves & run;  // an even number
    bool wide = run > 0;
    run = most<i64>(run, 1);
    if (j.n.fake) {
      typename U::word* y = (typename U::word*)out + at;
      if (!wide) long_values<T, U>(j, s, x + at, y, n, rr, s.r[b], s.d[b]);
      else if (c.cols == 32) short_values<T, U, 32>(j, x + at, y, run, rr, s.r + b, s.d + b, next + at);
      else if (halves) short_values<T, U, 16>(j, x + at, y, run, rr, s.r + b, s.d + b, next + at);
      else short_values<T, U, 0>(j, x + at, y, run, rr, s.r + b, s.d + b, next + at);
    } else {
      u8* y = (u8*)out + at;
      if (!wide) long_codes<T>(j, s, x + at, y, n, rr, s.r[b]);
      else if (c.cols == 32) short_codes<T, 32>(j, x + at, y, run, rr, s.f + b, next + at);
      else if (halves) short_codes<T, 16>(j, x + at, y, run, rr, s.f + b, next + at);
      else short_codes<T, 0>(j, x + at, y, run, rr, s.f + b, next + at);
    }
  }
}

// Maxima of the statistic's blocks, several to a block of the scales, and those of the latter from them.
template <class T> static void fine_tops(const NormJob& j, NormRoom& s, const typename T::word* x, i64 n, i64 b0) {
  i64 each = j.c.cols / j.n.stat, parts = (n + j.n.stat - 1) / j.n.stat, p = 0;
  u32* fine = s.fine + b0 * each;
  if (j.n.stat == 8) tops<T, 8>(x, p = n / 8, fine);
  for (; p < parts; p++) fine[p] = amax_line<T>(x + p * j.n.stat, least<i64>(n - p * j.n.stat, j.n.stat));
  for (i64 b = 0; b * each < parts; b++) {
    u32 top = 0;
    for (i64 p = b * each, end = least(parts, p + each); p < end; p++) top = most(top, fine[p]);
    s.amax[b0 + b] = top;
  }
}

template <class T, class U> static void norm_row(const NormJob& j, NormRoom& s, i64 row, bool more) {
  typedef typename T::word word;
  const Cast& c = j.c;
  const word* x = (const word*)c.x + row * c.n;
  const word* other = j.n.residual ? (const word*)j.n.residual + row * c.n : 0;
  word* h = j.n.residual ? (word*)j.n.summed + row * c.n : 0;
  const word* in = h ? h : x;
  // Where float32 is written, stores keep memory busy, and fetching ahead only gets in their way.
  const word* next = more && !(j.n.fake && sizeof(typename U::word) == 4) ? x + c.n : x;
  u8* out = (u8*)c.out + row * (j.n.fake ? c.n * (i64)sizeof(typename U::word) : j.row_bytes);
  u8* to = j.n.fake || c.bits == 8 ? out : s.codes;
  void* scales = c.scale == FP32 ? (void*)((float*)c.scales + row * j.K) : (void*)((u8*)c.scales + row * j.K);
  float sums[SUMS] = {0};
  for (i64 b0 = 0; b0 < j.K; b0 += j.span) {
    i64 count = least(j.span, j.K - b0), b = 0, at = b0 * c.cols, n = least(c.n - at, count * c.cols);
    i64 full = most<i64>(0, least(count, c.n / c.cols - b0));
    if (h) add_line<T>(x + at, other + at, h + at, n);
    if (j.n.kind == RMS) square_line<T>(in + at, n, sums);
    if (j.n.stat) fine_tops<T>(j, s, in + at, n, b0), b = count;
    else if (c.cols == 32) tops<T, 32>(in + at, b = full, s.amax + b0);
    else if (c.cols == 16) tops<T, 16>(in + at, b = full, s.amax + b0);
    for (; b < count; b++) s.amax[b0 + b] = amax_line<T>(in + at + b * c.cols, least(n - b * c.cols, c.cols));
    if (j.n.ride) cast_part<T, U>(j, s, in, to, scales, b0, count, 1.f, more ? x + j.span * c.cols : x);
  }
  const u32* maxima = j.n.stat ? s.fine : s.amax;
  i64 parts = j.n.stat ? (c.n + j.n.stat - 1) / j.n.stat : j.K;
  float r = j.n.kind == RMS   ? plain_rms<T>(j.n, sums, in, c.n)
            : j.n.kind == MX1 ? mx_rms<false>(j.n, maxima, parts)
                              : mx_rms<true>(j.n, maxima, parts);
  bool bad = (bits_of(r) & 0x7fffffffu) >= INF;
  j.n.rms[row] = bad ? number(NAN_BITS) : r;
  if (!j.n.ride) {
    float rr = bad ? number(NAN_BITS) : r == 0.f ? 0.f : least(1.f / r, 0x1.fffffep127f);
    if (bad)
      for (i64 k = 0; k < j.K; k++) s.amax[k] = NAN_BITS;
    cast_part<T, U>(j, s, in, to, scales, 0, j.K, rr, next);
  }
  if (j.n.fake) return;
  memset(to + c.n, 0, c.row_codes - c.n);
  if (c.bits != 8) pack(s.codes, c.row_codes, c.bits, out);
}

template <class T, class U> static void norm_work(void* what, i64 from, i64 to, int) {
  NormJob& j = *(NormJob*)what;
  NormRoom s(j.K, j.c.row_codes, j.n.stat ? (j.c.n + j.n.stat - 1) / j.n.stat : 0);
  if (!s.all) { j.failed = 1; return; }
  for (i64 row = from; row < to; row++) norm_row<T, U>(j, s, row, row + 1 < to);
}

extern "C" int isoscale_norm_size() { return (int)sizeof(Norm); }
extern "C" int isoscale_norm(const Cast* c, const Norm* n) {  // 0, or 1 when memory ran out
  NormJob j(*c, *n);
  if (c->tensor_scale) *c->tensor_scale = j.s_dec;
  bool wide = !n->fake || n->out_dtype == 0;
  void (*run)(void*, i64, i64, int) = c->dtype == 0 ? (wide ? norm_work<F32, F32> : norm_work<F32, BF16>)
                                                    : (wide ? norm_work<BF16, F32> : norm_work<BF16, BF16>);
  parallel(c->R, c->R * c->n, c->threads, run, &j);
  return j.failed;
}
