// Casts of rows and columns in blocks: fake cast, encode, decode. The same bits as the torch reference.
//
// How: a block's largest magnitude and its scale are integer work on the bits of fp32. Elements are rounded by adding
// and subtracting a power of two (nearest-even) or by comparing the fraction with a threshold (all other modes). Plain
// loops with known trip counts, no intrinsics: the compiler vectorises them for the machine it runs on.
// What is lost: nothing in bits (no fma: -ffp-contract=off; threads only share out whole blocks); little-endian only.
//
// Layouts: rows [L, R, n] with blocks of `rows` x `cols`; strided [L, n, C] with blocks of `cols` along the middle.

#include "threads.h"

// ---- the work on whole tensors

enum Op { FAKE, ENCODE, DECODE, TOP };  // TOP: only the largest amax

struct Job {
  Cast c;
  Op op;
  Grid g;
  i64 K, Rb, span, parts, row_bytes;  // span: blocks of a part of a row
  bool fixed;                         // one r and d for all
  bool mend;                          // codes of NaN, or of -0, may need a second look
  float r, d, s_enc, s_dec;
  u32 tops[MOST_THREADS];
  int failed;
  explicit Job(const Cast& cast, Op what) : c(cast), op(what), g(cast) {
    fixed = c.scale == NONE, r = d = 1.f, s_enc = s_dec = 1.f, failed = 0;
    mend = c.scale == NONE || c.nan_code == 1 << (c.bits - 1);
    memset(tops, 0, sizeof tops);
    row_bytes = c.row_codes * c.bits / 8;
  }
  void count_blocks() {
    if (fixed) c.rows = 1, c.cols = PIECE;
    K = (c.n + c.cols - 1) / c.cols, Rb = (c.R + c.rows - 1) / c.rows;
    i64 elements = c.rows == 1 ? PIECE : 16 * PIECE;
    span = most<i64>(1, elements / (c.cols * c.rows));
    if (c.rows > 1) span = most<i64>(span, (256 + c.cols - 1) / c.cols);
    if (c.cols % group_of(c.bits)) span = K;  // a part must begin at a whole byte
    span = most<i64>(1, least(span, K)), parts = (K + span - 1) / span;
  }
  void top_of(u32 amax, int who, bool special_too) {
    if (special_too || amax < INF) tops[who] = most(tops[who], amax);
  }
  u32 top() const {
    u32 all = 0;
    for (int i = 0; i < MOST_THREADS; i++) all = most(all, tops[i]);
    return all;
  }
};

struct Room {  // of one thread
  void* all;
  u32 *amax, *stored;
  float *r, *d, *threshold;
  u8 *codes, *turned;
  explicit Room(i64 blocks) {
    i64 floats = most<i64>(blocks, TILE) + 16;
    all = malloc(4 * (4 * floats + PIECE) + 2 * PIECE + 64 + 2 * DEPTH * TILE);
    amax = (u32*)all, stored = amax + floats, r = (float*)(stored + floats), d = r + floats, threshold = d + floats;
    codes = (u8*)(threshold + PIECE), turned = codes + 2 * PIECE + 64;
  }
  ~Room() { free(all); }
};

template <class T> static void mend_fake(const Job& j, const typename T::word* x, typename T::word* y, i64 n) {
  if (j.c.scale != NONE) return;
  for (i64 i = 0; i < n; i++) y[i] = (x[i] & T::rest) > T::inf ? (typename T::word)T::nan : y[i];
}
// Codes of NaN, and of zeros in a format without -0.
template <class T> static void mend_codes(const Job& j, const typename T::word* x, u8* y, i64 n, const float* r, i64 each) {
  u8 nan = (u8)most(j.c.nan_code, 0);
  if (j.c.nan_code == 1 << (j.c.bits - 1))  // the code of -0 is NaN
    for (i64 i = 0; i < n; i++) y[i] = y[i] == nan ? 0 : y[i];
  for (i64 i = 0; i < n; i++) {
    u32 a = T::wide(x[i] & T::rest);
    y[i] = a > INF || (a == INF && r[i * each] == 0.f) ? nan : y[i];
  }
}

static i64 flush(const Job& j, Room& s, i64 held, u8*& out) {  // packs whole groups; moves the rest to the front
  i64 whole = held / group_of(j.c.bits) * group_of(j.c.bits);
  pack(s.codes, whole, j.c.bits, out);
  out += whole * j.c.bits / 8;
  memmove(s.codes, s.codes + whole, held - whole);
  return held - whole;
}

// Blocks [b0, b0 + count) of one row: x and out are the row's.
template <class T, bool FREE>
static void row_part(const Job& j, Room& s, const typename T::word* x, void* out, i64 b0, i64 count, u64 index,
                     bool special) {
  typedef typename T::word word;
  const Cast& c = j.c;
  word* y = (word*)out;
  u8* to = (u8*)out + b0 * c.cols * c.bits / 8;
  i64 cols = c.cols, held = 0, b = 0;
  if (!FREE && (cols == 32 || cols == 16)) {
    b = most<i64>(0, least(count, c.n / cols - b0));
    const word* from = x + b0 * cols;
    if (j.op == FAKE) {
      bool power = c.scale == E8M0 && c.m < 8;
      if (cols == 32 && power) fake_blocks<T, 32, true>(j.g, from, y + b0 * cols, b, s.r, s.d);
      else if (cols == 32) fake_blocks<T, 32, false>(j.g, from, y + b0 * cols, b, s.r, s.d);
      else if (power) fake_blocks<T, 16, true>(j.g, from, y + b0 * cols, b, s.r, s.d);
      else fake_blocks<T, 16, false>(j.g, from, y + b0 * cols, b, s.r, s.d);
    } else {
      if (cols == 32) code_blocks<T, 32>(j.g, from, s.codes, b, s.r);
      else code_blocks<T, 16>(j.g, from, s.codes, b, s.r);
      held = b * cols;
      for (i64 k = 0; special && k < b; k++) mend_codes<T>(j, from + k * cols, s.codes + k * cols, cols, s.r + k, 0);
    }
  }
  for (; b < count; b++) {
    i64 end = least((b0 + b + 1) * cols, c.n), at = j.fixed ? 0 : b;
    for (i64 p = (b0 + b) * cols; p < end; p += PIECE) {
      i64 n = least<i64>(PIECE, end - p);
      if (FREE) thresholds<T>(c, x + p, n, index + (u64)p * (u64)c.step_c, c.step_c, s.threshold);
      if (j.op == FAKE) {
        fake_line<T, FREE, false>(j.g, x + p, y + p, n, s.r + at, s.d + at, s.threshold);
        mend_fake<T>(j, x + p, y + p, n);
        continue;
      }
      if (held + n > 2 * PIECE) held = flush(j, s, held, to);
      code_line<T, FREE, false>(j.g, x + p, s.codes + held, n, s.r + at, s.threshold);
      if (special) mend_codes<T>(j, x + p, s.codes + held, n, s.r + at, 0);
      held += n;
    }
  }
  if (j.op != ENCODE) return;
  i64 left = b0 + count == j.K ? c.row_codes - least(c.n, j.K * cols) : 0;  // the row's padding
  for (i64 n; left > 0; left -= n) {
    if (held >= PIECE) held = flush(j, s, held, to);
    n = least<i64>(PIECE, left);
    memset(s.codes + held, 0, n);
    held += n;
  }
  flush(j, s, held, to);
}

template <class T, bool FREE> static void rows_work(void* what, i64 from, i64 to, int who) {
  typedef typename T::word word;
  Job& j = *(Job*)what;
  const Cast& c = j.c;
  Room s(j.span);
  if (!s.all) { j.failed = 1; return; }
  s.r[0] = j.r, s.d[0] = j.d;
  for (i64 unit = from; unit < to; unit++) {
    i64 band = unit / j.parts, b0 = unit % j.parts * j.span, l = band / j.Rb, rb = band % j.Rb;
    i64 count = least(j.span, j.K - b0), r0 = rb * c.rows, r1 = least(c.R, r0 + c.rows);
    bool special = j.mend;
    if (!j.fixed || j.op == TOP) {
      memset(s.amax, 0, 4 * count);
      for (i64 r = r0; r < r1; r++) {
        const word* x = (const word*)c.x + (l * c.R + r) * c.n;
        i64 b = c.cols == 32 || c.cols == 16 ? most<i64>(0, least(count, c.n / c.cols - b0)) : 0;
        if (c.cols == 32) amax_blocks<T, 32>(x + b0 * 32, b, s.amax);
        else if (c.cols == 16) amax_blocks<T, 16>(x + b0 * 16, b, s.amax);
        for (; b < count; b++) {
          i64 at = (b0 + b) * c.cols;
          s.amax[b] = most(s.amax[b], amax_line<T>(x + at, least(c.n - at, c.cols)));
        }
      }
      if (j.op == TOP) {
        for (i64 b = 0; b < count; b++) j.top_of(s.amax[b], who, j.fixed);
        continue;
      }
      special |= scale_blocks(c, j.s_enc, j.s_dec, s.amax, count, s.r, s.d, s.stored);
      i64 at = band * j.K + b0;
      if (c.scales && c.scale == FP32) memcpy((u32*)c.scales + at, s.stored, 4 * count);
      else if (c.scales)
        for (i64 b = 0; b < count; b++) ((u8*)c.scales)[at + b] = (u8)s.stored[b];
    }
    for (i64 r = r0; r < r1; r++) {
      i64 row = l * c.R + r;
      const word* x = (const word*)c.x + row * c.n;
      void* out = j.op == FAKE ? (void*)((word*)c.out + row * c.n) : (void*)((u8*)c.out + row * j.row_bytes);
      u64 index = (u64)c.offset + (u64)l * (u64)c.step_l + (u64)r * (u64)c.step_r;
      row_part<T, FREE>(j, s, x, out, b0, count, index, special);
    }
  }
}

// ---- blocks along the middle: tiles of columns

static void turn(const u8* FAST rows, u8* FAST out) {  // [DEPTH][TILE] to [TILE][DEPTH], 8 x 8 at a time
  for (int c = 0; c < TILE; c += 8)
    for (int p = 0; p < DEPTH; p += 8) {
      u64 w[8], t;
      for (int i = 0; i < 8; i++) memcpy(&w[i], rows + (p + i) * TILE + c, 8);
      for (int i = 0; i < 4; i++)
        t = ((w[i] >> 32) ^ w[i + 4]) & 0x00000000ffffffffull, w[i] ^= t << 32, w[i + 4] ^= t;
      for (int i = 0; i < 6; i += i == 1 ? 3 : 1)
        t = ((w[i] >> 16) ^ w[i + 2]) & 0x0000ffff0000ffffull, w[i] ^= t << 16, w[i + 2] ^= t;
      for (int i = 0; i < 8; i += 2)
        t = ((w[i] >> 8) ^ w[i + 1]) & 0x00ff00ff00ff00ffull, w[i] ^= t << 8, w[i + 1] ^= t;
      for (int i = 0; i < 8; i++) memcpy(out + (c + i) * DEPTH + p, &w[i], 8);
    }
}

template <class T, bool FREE> static void strided_work(void* what, i64 from, i64 to, int who) {
  typedef typename T::word word;
  Job& j = *(Job*)what;
  const Cast& c = j.c;
  i64 tiles = (c.R + TILE - 1) / TILE, C = c.R;
  Room s(TILE);
  if (!s.all) { j.failed = 1; return; }
  for (i64 unit = from; unit < to; unit++) {
    // a fake cast walks along memory; an encoding fills the same rows of codes block after block
    i64 k = j.op == ENCODE ? unit % j.K : unit / tiles % j.K, l = unit / (j.K * tiles);
    i64 tile = j.op == ENCODE ? unit / j.K % tiles : unit % tiles;
    i64 c0 = tile * TILE, w = least<i64>(TILE, C - c0), r0 = k * c.cols, r1 = least(c.n, r0 + c.cols);
    const word* x = (const word*)c.x + l * c.n * C + c0;
    bool special = j.mend;
    if (j.fixed) {
      for (i64 i = 0; i < w; i++) s.r[i] = s.d[i] = 1.f;
    } else {
      word top[TILE];
      for (i64 i = 0; i < w; i++) top[i] = 0;
      for (i64 r = r0; r < r1; r++) {
        const word* FAST row = x + r * C;
        for (i64 i = 0; i < w; i++) {
          word a = row[i] & T::rest;
          top[i] = a > top[i] ? a : top[i];
        }
      }
      for (i64 i = 0; i < w; i++) s.amax[i] = T::wide(top[i]);
      if (j.op == TOP) {
        for (i64 i = 0; i < w; i++) j.top_of(s.amax[i], who, false);
        continue;
      }
      special |= scale_blocks(c, j.s_enc, j.s_dec, s.amax, w, s.r, s.d, s.stored);
      for (i64 i = 0; c.scales && i < w; i++) {
        i64 at = (l * C + c0 + i) * j.K + k;
        if (c.scale == FP32) ((u32*)c.scales)[at] = s.stored[i];
        else ((u8*)c.scales)[at] = (u8)s.stored[i];
      }
    }
    u64 index = (u64)c.offset + (u64)(l * c.n * C + c0);
    if (j.op == FAKE) {
      for (i64 r = r0; r < r1; r++) {
        if (FREE) thresholds<T>(c, x + r * C, w, index + (u64)(r * C), 1, s.threshold);
        word* y = (word*)c.out + (l * c.n + r) * C + c0;
        fake_line<T, FREE, true>(j.g, x + r * C, y, w, s.r, s.d, s.threshold);
      }
      continue;
    }
    i64 last = k + 1 == j.K ? c.row_codes : r0 + c.cols;
    for (i64 p = r0; p < last; p += DEPTH) {
      i64 depth = least<i64>(DEPTH, last - p), real = most<i64>(0, least(depth, r1 - p));
      u8 codes[DEPTH * TILE];
      memset(codes + real * TILE, 0, (depth - real) * TILE);
      for (i64 i = 0; i < real; i++) {
        const word* row = x + (p + i) * C;
        u8* to = codes + i * TILE;
        if (FREE) thresholds<T>(c, row, w, index + (u64)((p + i) * C), 1, s.threshold);
        code_line<T, FREE, true>(j.g, row, to, w, s.r, s.threshold);
        if (special) mend_codes<T>(j, row, to, w, s.r, 1);
      }
      turn(codes, s.turned);
      for (i64 i = 0; i < w; i++)
        pack(s.turned + i * DEPTH, depth, c.bits, (u8*)c.out + (l * C + c0 + i) * j.row_bytes + p * c.bits / 8);
    }
  }
}

// ---- decode

template <class T> static void decode_work(void* what, i64 from, i64 to, int) {
  Job& j = *(Job*)what;
  const Cast& c = j.c;
  u8 codes[PIECE + 16];
  i64 group = group_of(c.bits);
  i32 half = 1 << (c.bits - 1), shift = 23 - c.m, base = (127 - c.bias) << 23, nan = c.nan_code;
  i32 most_code = c.max_code, inf_code = c.inf_code, hidden = 1 << c.m, top = 32 - c.bits;
  float below = number((u32)(c.emin + 127) << 23), step = number((u32)(127 - c.m) << 23);
  float by = c.tensor_scale ? *c.tensor_scale : 1.f;
  for (i64 row = from; row < to; row++) {
    const u8* in = (const u8*)c.x + row * j.row_bytes;
    typename T::word* out = (typename T::word*)c.out + row * c.n;
    i64 band = row / c.R * j.Rb + row % c.R / c.rows;
    for (i64 p = 0; p < c.n; p += PIECE) {
      i64 n = least<i64>(PIECE, c.n - p), done = 0;
      unpack(in + p * c.bits / 8, (n + group - 1) / group * group, c.bits, codes);
      while (done < n) {
        i64 k = (p + done) / c.cols, run = least(n - done, (k + 1) * c.cols - p - done);
        float d = 1.f;
        if (c.scale == E8M0) {
          u32 e = ((const u8*)c.scales)[band * j.K + k];
          d = number(e == 255 ? NAN_BITS : e == 0 ? 0x00400000u : e << 23);
        } else if (c.scale == FP32) {
          d = ((const float*)c.scales)[band * j.K + k];
        } else if (c.scale == E4M3) {
          u32 e = ((const u8*)c.scales)[band * j.K + k], field = e >> 3 & 15;
          float v = number(((e & 127) << 20) + (120u << 23) + (field ? 0 : 1u << 23)) - (field ? 0.f : 0x1p-6f);
          d = (e & 127) == 127 ? number(NAN_BITS) : (e & 128 ? -v : v) * by;
        }
        const u8* FAST from_codes = codes + done;
        typename T::word* FAST y = out + p + done;
        if (c.twos) {
          for (i64 i = 0; i < run; i++) {
            i32 v = (i32)from_codes[i];
            y[i] = T::narrow(bits_of((float)(v - (v & half ? 2 * half : 0)) * step * d));
          }
        } else {
          for (i64 i = 0; i < run; i++) {
            i32 code = (i32)from_codes[i], a = code & (half - 1);
            bool low = a < hidden;
            u32 v = bits_of(number((u32)((a << shift) + base + (low ? 1 << 23 : 0))) - (low ? below : 0.f));
            v = a > most_code ? (a == inf_code ? INF : NAN_BITS) : v;
            v = code == nan ? NAN_BITS : v | (u32)(code & half) << top;
            y[i] = T::narrow(bits_of(number(v) * d));
          }
        }
        done += run;
      }
    }
  }
}

// ---- entry points: 0, or 1 when memory ran out

typedef void (*Work)(void*, i64, i64, int);
template <class T> static Work work_of(const Job& j) {
  bool free = j.c.rounding != NEAREST_EVEN && j.op != TOP;
  if (j.op == DECODE) return decode_work<T>;
  if (j.c.strided) return free ? strided_work<T, true> : strided_work<T, false>;
  return free ? rows_work<T, true> : rows_work<T, false>;
}
static void go(Job& j, i64 units) {
  const Cast& c = j.c;
  Work run = c.dtype == 0 ? work_of<F32>(j) : work_of<BF16>(j);
  parallel(units, c.L * c.R * c.n, c.threads, run, &j);
}
static i64 units_of(const Job& j) {
  return j.c.strided ? j.c.L * j.K * ((j.c.R + TILE - 1) / TILE) : j.c.L * j.Rb * j.parts;
}

static int cast(const Cast* given, Op op) {
  Job j(*given, op);
  Cast& c = j.c;
  bool flat = c.step_c == 1 && c.step_r == c.n && c.step_l == c.R * c.n;
  if (j.fixed && op == FAKE && (c.strided || flat)) c.n *= c.L * c.R, c.L = c.R = 1, c.strided = 0, c.step_c = 1;
  bool whole = !j.fixed && !c.strided && c.L == 1 && c.rows >= c.R && c.cols >= c.n;
  if (whole) j.fixed = true;
  if (c.strided && j.fixed) {
    c.rows = 1, c.cols = DEPTH, j.K = (c.n + DEPTH - 1) / DEPTH;
  } else {
    j.count_blocks();
  }
  u32 top = 0;
  if (whole || (c.scale == E4M3 && !c.has_amax)) {
    j.op = TOP;
    go(j, units_of(j));
    top = j.top();
    j.op = op;
  }
  if (c.scale == E4M3) {
    float all = c.has_amax ? c.tensor_amax : top < INF ? number(top) : 0.f;
    j.s_enc = all == 0.f ? 1.f : least((c.max * 448.f) / all, 0x1.fffffep127f);
    j.s_dec = 1.f / j.s_enc;
    if (c.tensor_scale) *c.tensor_scale = j.s_dec;
  }
  if (whole) {
    u32 stored;
    j.mend |= scale_blocks(c, j.s_enc, j.s_dec, &top, 1, &j.r, &j.d, &stored);
    if (c.scales && c.scale == FP32) memcpy(c.scales, &stored, 4);
    else if (c.scales) *(u8*)c.scales = (u8)stored;
  }
  go(j, units_of(j));
  return j.failed;
}

extern "C" int isoscale_size() { return (int)sizeof(Cast); }
extern "C" int isoscale_fake(const Cast* c) { return cast(c, FAKE); }
extern "C" int isoscale_encode(const Cast* c) { return cast(c, ENCODE); }
extern "C" int isoscale_decode(const Cast* c) {
  Job j(*c, DECODE);
  j.count_blocks();
  go(j, c->L * c->R);
  return 0;
}
