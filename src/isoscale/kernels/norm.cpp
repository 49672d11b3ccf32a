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

extern "C" struct Norm {  // mirrored field by field in cpu_norm.py
  const void* residual;
  void* summed;
  float* rms;
  float eps, w_full, w_last, clamp;
  i32 kind, ride, out_dtype, fake;
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
    simple = !mend && (c.twos ? power : c.m > 0);
    s_enc = s_dec = 1.f;
    if (c.scale == E4M3) {
      s_enc = c.tensor_amax == 0.f ? 1.f : least((c.max * 448.f) / c.tensor_amax, 0x1.fffffep127f);
      s_dec = 1.f / s_enc;
    }
  }
};

struct NormRoom {  // of one thread
  void* all;
  u32 *amax, *top, *stored, *y, *value;
  float *r, *d, *f;
  u8 *codes, *ok;
  NormRoom(i64 K, i64 row) {
    i64 floats = K + 16;
    all = malloc(4 * (6 * floats + 2 * PIECE) + row + floats + 128);
    amax = (u32*)all, top = amax + floats, stored = top + floats, r = (float*)(stored + floats), d = r + floats;
    f = d + floats, y = (u32*)(f + floats), value = y + PIECE, codes = (u8*)(value + PIECE), ok = codes + row + 64;
  }
  ~NormRoom() { free(all); }
};

// ---- the divisor

static float power_of_two(i32 e) { return number((u32)(e + 127) << 23); }  // normal numbers only

static float mx_rms(const Norm& n, const u32* amax, i64 K) {
  u32 top = 0;
  for (i64 k = 0; k < K; k++) top = most(top, amax[k]);
  if (top >= INF) return number(NAN_BITS);
  bool tiny = top < 0x00800000u;
  i32 e = top == 0 ? 0 : (i32)(bits_of(tiny ? (float)(i32)top : number(top)) >> 23) - (tiny ? 276 : 127);
  i32 half = e >> 1;  // 2^-e may be no number; in two steps it is one
  float first = power_of_two(-half), second = power_of_two(half - e);
  float whole = 0.f, last = 0.f;
  i64 sum = 0;
  for (i64 k0 = 0; k0 < K - 1; k0 += 4096) {
    double s[16] = {0};  // of whole numbers below 2^38: exact
    i64 end = least<i64>(K - 1, k0 + 4096), k = k0;
    for (; k + 16 <= end; k += 16)
      for (int j = 0; j < 16; j++) {
        float v = number(amax[k + j]) * first * second, t = n.kind == MX1 ? v : v * v;
        s[j] += __builtin_trunc((double)t * 0x1p36);
      }
    for (; k < end; k++) {
      float v = number(amax[k]) * first * second, t = n.kind == MX1 ? v : v * v;
      s[0] += __builtin_trunc((double)t * 0x1p36);
    }
    for (int j = 0; j < 16; j++) sum += (i64)s[j];
  }
  whole = (float)sum;
  float v = number(amax[K - 1]) * first * second, t = n.kind == MX1 ? v : v * v;
  last = (float)__builtin_trunc((double)t * 0x1p36);
  float g = (n.w_full * whole + n.w_last * last) * 0x1p-36f;
  if (n.kind == MX2) g = __builtin_sqrtf(g);
  return g * power_of_two(half) * power_of_two(e - half) + n.eps;
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

// Scales of `count` blocks from amax, those of y; and which of them may go the short way.
static bool prepare(const NormJob& j, NormRoom& s, const u32* amax, i64 count, float rr) {
  const u32* top = amax;
  u32 clamp = bits_of(j.n.clamp);
  if (!j.n.ride) {
    for (i64 b = 0; b < count; b++) {
      u32 u = bits_of(number(amax[b]) * rr) & 0x7fffffffu;
      s.top[b] = u > clamp && u <= INF ? clamp : u;
    }
    top = s.top;
  }
  bool special = scale_blocks(j.c, j.s_enc, j.s_dec, top, count, s.r, s.d, s.stored), all = j.simple && !special;
  if (!all) {
    memset(s.ok, 0, count);
    for (i64 b = 0; j.simple && b < count; b++) s.ok[b] = top[b] < INF;
  } else {
    memset(s.ok, 1, count);
  }
  if (j.n.ride) {
    for (i64 b = 0; b < count; b++) s.f[b] = s.r[b];
    return all;
  }
  u32 bad = 0;
  for (i64 b = 0; b < count; b++) {
    u32 clamped = clamp < INF && top[b] >= clamp, out;
    if (j.n.fake) {
      i32 field = (i32)(bits_of(s.d[b]) >> 23);
      out = field < j.g.low || field > j.g.high;
    } else if (j.power) {
      s.f[b] = rr * s.r[b];  // exact if it is normal; y below 2^-126 counts for nothing beside a top of 2^-60
      out = bits_of(s.f[b]) - 0x00800000u >= 0x7f000000u || top[b] < 67u << 23;
    } else {
      s.f[b] = s.r[b], out = 0;
    }
    out |= clamped;
    s.ok[b] &= !out, bad |= out;
  }
  return all && !bad;
}

template <class T, int N>
static void short_codes(const NormJob& j, const typename T::word* x, u8* out, i64 blocks, float rr, const float* f,
                        const typename T::word* next) {
  if (j.c.twos) norm_codes_twos<T, N>(j.g, x, out, blocks, j.c.cols, f, next);
  else if (j.power || j.n.ride) norm_codes<T, N, false>(j.fast, x, out, blocks, j.c.cols, rr, f, next);
  else norm_codes<T, N, true>(j.fast, x, out, blocks, j.c.cols, rr, f, next);
}
template <class T, class U, int N>
static void short_values(const NormJob& j, const typename T::word* x, typename U::word* out, i64 blocks, float rr,
                         const float* d, const typename T::word* next) {
  if (j.n.ride) norm_values<T, U, N, false>(j.g, x, out, blocks, j.c.cols, rr, d, next);
  else norm_values<T, U, N, true>(j.g, x, out, blocks, j.c.cols, rr, d, next);
}

// Blocks [b0, b0 + count) of a row; amax: theirs. `next` - x: how far ahead memory is fetched.
template <class T, class U>
static void cast_part(const NormJob& j, NormRoom& s, const typename T::word* x, void* out, void* scales, i64 b0, i64 count,
                      float rr, const typename T::word* next) {
  const Cast& c = j.c;
  bool all = prepare(j, s, s.amax + b0, count, rr);
  if (c.scales && c.scale == FP32) memcpy((u32*)scales + b0, s.stored, 4 * count);
  else if (c.scales)
    for (i64 b = 0; b < count; b++) ((u8*)scales)[b0 + b] = (u8)s.stored[b];
  i64 full = most<i64>(0, least(count, c.n / c.cols - b0));
  for (i64 b = 0, run; b < count; b += run) {
    i64 at = (b0 + b) * c.cols, n = least(c.n - at, c.cols);
    bool ok = b < full && s.ok[b];
    run = 1;
    if (ok && all) run = full - b;
    else
      while (ok && b + run < full && s.ok[b + run]) run++;
    if (j.n.fake) {
      typename U::word* y = (typename U::word*)out + at;
      if (!ok || !j.power) long_values<T, U>(j, s, x + at, y, n, rr, s.r[b], s.d[b]), run = 1;
      else if (c.cols == 32) short_values<T, U, 32>(j, x + at, y, run, rr, s.d + b, next + at);
      else short_values<T, U, 0>(j, x + at, y, run, rr, s.d + b, next + at);
    } else {
      u8* y = (u8*)out + at;
      if (!ok) long_codes<T>(j, s, x + at, y, n, rr, s.r[b]);
      else if (c.cols == 32) short_codes<T, 32>(j, x + at, y, run, rr, s.f + b, next + at);
      else if (c.cols == 16) short_codes<T, 16>(j, x + at, y, run, rr, s.f + b, next + at);
      else short_codes<T, 0>(j, x + at, y, run, rr, s.f + b, next + at);
    }
  }
}

template <class T, class U> static void norm_row(const NormJob& j, NormRoom& s, i64 row, bool more) {
  typedef typename T::word word;
  const Cast& c = j.c;
  const word* x = (const word*)c.x + row * c.n;
  const word* other = j.n.residual ? (const word*)j.n.residual + row * c.n : 0;
  word* h = j.n.residual ? (word*)j.n.summed + row * c.n : 0;
  const word* in = h ? h : x;
  const word* next = more && !h ? in + c.n : in;
  u8* out = (u8*)c.out + row * (j.n.fake ? c.n * (i64)sizeof(typename U::word) : j.row_bytes);
  u8* to = j.n.fake || c.bits == 8 ? out : s.codes;
  void* scales = c.scale == FP32 ? (void*)((float*)c.scales + row * j.K) : (void*)((u8*)c.scales + row * j.K);
  float sums[SUMS] = {0};
  memset(s.amax, 0, 4 * j.K);
  for (i64 b0 = 0; b0 < j.K; b0 += j.span) {
    i64 count = least(j.span, j.K - b0), b = 0, at = b0 * c.cols, n = least(c.n - at, count * c.cols);
    i64 full = most<i64>(0, least(count, c.n / c.cols - b0));
    if (h) add_line<T>(x + at, other + at, h + at, n);
    if (j.n.kind == RMS) square_line<T>(in + at, n, sums);
    if (c.cols == 32) amax_blocks<T, 32>(in + at, b = full, s.amax + b0);
    else if (c.cols == 16) amax_blocks<T, 16>(in + at, b = full, s.amax + b0);
    for (; b < count; b++) s.amax[b0 + b] = amax_line<T>(in + at + b * c.cols, least(n - b * c.cols, c.cols));
    if (j.n.ride) cast_part<T, U>(j, s, in, to, scales, b0, count, 1.f, in);
  }
  float r = j.n.kind == RMS ? plain_rms<T>(j.n, sums, in, c.n) : mx_rms(j.n, s.amax, j.K);
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
  NormRoom s(j.K, j.c.row_codes);
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
