// The parts of a small model's training step that are not matrix products with weights, each in one pass: rotary
// attention, SwiGLU, RMSNorm. float32, on a CPU.
//
// Why: in a model of width 64 these take as long as its products. Torch's attention works through general tiles and
// wants q, k and v turned and copied before; here a head's rows are turned and laid out once, in memory that stays in
// the cache, and blocks of queries meet the keys that they may see. Only the logarithm of each softmax's sum is kept;
// the backward makes the probabilities again.
// What is lost: generality (head sizes 16, 32, 48, 64; no dropout, no mask but the causal one).

#include "lmd_lanes.h"
#include "threads.h"

static const int ROWS = 32;  // queries of a block
static const float LOG2E = 0x1.715476p0f, LN2 = 0x1.62e43p-1f;

#if WIDTH == 16
static INLINE F exp2_of(F y) { return power(larger(all(-200.f), y)); }  // so written, a NaN stays one
#else
static INLINE F exp2_of(F y) { return pick(y < all(-126.f), F{}, pick(y == y, power(y), y)); }
#endif
static INLINE float sum_of(F x) {
  float total = 0;
  for (int l = 0; l < WIDTH; l++) total += x[l];
  return total;
}
static INLINE float top_of(F x) {
  float top = x[0];
  for (int l = 1; l < WIDTH; l++) top = x[l] > top ? x[l] : top;
  return top;
}

// ---- C[M, N] = (C +) A[M, K] B[K, N]; A may be strided either way, rows of B and C lie side by side in F

template <int MR, int NV>
static INLINE void tile(const float* A, i64 ar, i64 ak, const float* B, i64 b, float* C, i64 c, i64 K, bool add) {
  F sum[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) sum[r][v] = add ? load<F>(C + r * c + v * WIDTH) : F{};
  for (i64 k = 0; k < K; k++) {
    F row[NV];
    for (int v = 0; v < NV; v++) row[v] = load<F>(B + k * b + v * WIDTH);
    for (int r = 0; r < MR; r++) {
      F one = all(A[r * ar + k * ak]);
      for (int v = 0; v < NV; v++) sum[r][v] = fma(one, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) store(C + r * c + v * WIDTH, sum[r][v]);
}
template <int MR, int NV>
static void columns(const float* A, i64 ar, i64 ak, const float* B, i64 b, float* C, i64 c, i64 N, i64 K, bool add) {
  i64 n = 0;
  for (; n + NV * WIDTH <= N; n += NV * WIDTH) tile<MR, NV>(A, ar, ak, B + n, b, C + n, c, K, add);
  for (; n < N; n += WIDTH) tile<MR, 1>(A, ar, ak, B + n, b, C + n, c, K, add);
}
// N is a multiple of WIDTH.
static void product(const float* A, i64 ar, i64 ak, const float* B, i64 b, float* C, i64 c, i64 M, i64 N, i64 K,
                    bool add) {
  i64 m = 0;
  if (N >= 2 * WIDTH)
    for (; m + 6 <= M; m += 6) columns<6, 2>(A + m * ar, ar, ak, B, b, C + m * c, c, N, K, add);
  else
    for (; m + 8 <= M; m += 8) columns<8, 1>(A + m * ar, ar, ak, B, b, C + m * c, c, N, K, add);
  for (; m + 2 <= M; m += 2) columns<2, 2>(A + m * ar, ar, ak, B, b, C + m * c, c, N, K, add);
  for (; m < M; m++) columns<1, 2>(A + m * ar, ar, ak, B, b, C + m * c, c, N, K, add);
}

// ---- attention

extern "C" struct Attend {  // mirrored field by field in cpu_step.py
  const float *qkv, *cos, *sin, *grad;  // [B, L, (H + 2 G) D], [L, D / 2] twice, [B, L, H D]
  float *out, *log, *dqkv;              // [B, L, H D], [B, H, L] (to base 2), as qkv
  i64 B, L, H, G, D;
  float scale;
  i32 causal, threads, failed;  // failed: no memory
};

typedef float Eight __attribute__((vector_size(32)));

// Turns row t of a head by its angles and multiplies it; `way` -1 turns back, which is the gradient's way.
static INLINE void turn(const Attend& a, const float* x, i64 t, float* y, float way, float by) {
  i64 half = a.D / 2;
  const float *c = a.cos + t * half, *s = a.sin + t * half;
  for (i64 i = 0; i < half; i += 8) {
    Eight low = load<Eight>(x + i), high = load<Eight>(x + i + half);
    Eight u = by * load<Eight>(c + i), w = by * way * load<Eight>(s + i);
    store(y + i, low * u - high * w), store(y + i + half, high * u + low * w);
  }
}

struct Lines {  // of one thread: rows of one head [L, D], their transposes [D, P], blocks of scores [ROWS, P]
  float *all, *q, *k, *v, *kt, *vt, *dq, *dk, *dv, *dout, *p, *ds;
  i64 P;
  Lines(const Attend& a) {
    P = (a.L + WIDTH - 1) / WIDTH * WIDTH;
    i64 rows = P * a.D;
    all = (float*)calloc(9 * rows + 2 * ROWS * P + 64, 4);
    if (!all) return;
    float* at = (float*)(((uintptr_t)all + 63) / 64 * 64);
    float** parts[] = {&q, &k, &v, &kt, &vt, &dq, &dk, &dv, &dout};
    for (float** part : parts) *part = at, at += rows;
    p = at, ds = at + ROWS * P;
  }
  ~Lines() { free(all); }
};

static void transpose(const float* x, i64 L, i64 D, float* y, i64 P) {
  for (i64 t = 0; t < L; t++)
    for (i64 d = 0; d < D; d++) y[d * P + t] = x[t * D + d];
}

// Keys (turned, and transposed) and values of group g, whose sequence starts at base.
static void take_keys(const Attend& a, const Lines& m, const float* base, i64 row, i64 g) {
  for (i64 t = 0; t < a.L; t++) {
    turn(a, base + t * row + (a.H + g) * a.D, t, m.k + t * a.D, 1.f, 1.f);
    memcpy(m.v + t * a.D, base + t * row + (a.H + a.G + g) * a.D, 4 * a.D);
  }
  transpose(m.k, a.L, a.D, m.kt, m.P);
}

// q.k of queries i0 .. i0 + n, keys 0 .. K (a multiple of WIDTH); what may not be seen is -inf.
static void scores(const Attend& a, const Lines& m, i64 i0, i64 n, i64 K) {
  product(m.q + i0 * a.D, a.D, 1, m.kt, m.P, m.p, m.P, n, K, a.D, false);
  for (i64 r = 0; r < n; r++) {
    i64 seen = a.causal ? i0 + r + 1 : a.L;
    for (i64 j = seen; j < K; j++) m.p[r * m.P + j] = -__builtin_inff();
  }
}
static INLINE i64 keys(const Attend& a, i64 i0, i64 n) {
  i64 seen = a.causal ? i0 + n : a.L;
  return (seen + WIDTH - 1) / WIDTH * WIDTH;
}

// Group g of sequence b.
static void forward_unit(const Attend& a, const Lines& m, i64 b, i64 g) {
  i64 each = a.H / a.G, row = (a.H + 2 * a.G) * a.D;
  const float* base = a.qkv + b * a.L * row;
  take_keys(a, m, base, row, g);
  for (i64 h = g * each; h < (g + 1) * each; h++) {
    for (i64 t = 0; t < a.L; t++) turn(a, base + t * row + h * a.D, t, m.q + t * a.D, 1.f, a.scale * LOG2E);  // logits to base 2
    for (i64 i0 = 0; i0 < a.L; i0 += ROWS) {
      i64 n = least<i64>(ROWS, a.L - i0), K = keys(a, i0, n);
      float part[ROWS];
      scores(a, m, i0, n, K);
      for (i64 r = 0; r < n; r++) {
        float* p = m.p + r * m.P;
        F high = all(-__builtin_inff()), total = {};
        for (i64 j = 0; j < K; j += WIDTH) high = larger(high, load<F>(p + j));
        float top = top_of(high);
        for (i64 j = 0; j < K; j += WIDTH) {
          F e = exp2_of(load<F>(p + j) - all(top));
          store(p + j, e), total = total + e;
        }
        float sum = sum_of(total);
        part[r] = 1.f / sum;
        a.log[(b * a.H + h) * a.L + i0 + r] = top + __builtin_log2f(sum);
      }
      float* out = a.out + ((b * a.L + i0) * a.H + h) * a.D;
      product(m.p, m.P, 1, m.v, a.D, out, a.H * a.D, n, a.D, a.causal ? i0 + n : a.L, false);
      for (i64 r = 0; r < n; r++)
        for (i64 d = 0; d < a.D; d += WIDTH) {
          float* at = out + r * a.H * a.D + d;
          store(at, load<F>(at) * all(part[r]));
        }
    }
  }
}

static void backward_unit(const Attend& a, const Lines& m, i64 b, i64 g) {
  i64 each = a.H / a.G, row = (a.H + 2 * a.G) * a.D;
  const float* base = a.qkv + b * a.L * row;
  float* into = a.dqkv + b * a.L * row;
  take_keys(a, m, base, row, g);
  transpose(m.v, a.L, a.D, m.vt, m.P);
  memset(m.dk, 0, 4 * a.L * a.D), memset(m.dv, 0, 4 * a.L * a.D);
  for (i64 h = g * each; h < (g + 1) * each; h++) {
    for (i64 t = 0; t < a.L; t++) {
      turn(a, base + t * row + h * a.D, t, m.q + t * a.D, 1.f, a.scale * LOG2E);  // logits to base 2
      memcpy(m.dout + t * a.D, a.grad + ((b * a.L + t) * a.H + h) * a.D, 4 * a.D);
    }
    for (i64 i0 = 0; i0 < a.L; i0 += ROWS) {
      i64 n = least<i64>(ROWS, a.L - i0), K = keys(a, i0, n), seen = a.causal ? i0 + n : a.L;
      scores(a, m, i0, n, K);
      product(m.dout + i0 * a.D, a.D, 1, m.vt, m.P, m.ds, m.P, n, K, a.D, false);
      for (i64 r = 0; r < n; r++) {
        float *p = m.p + r * m.P, *d = m.ds + r * m.P;
        F log = all(a.log[(b * a.H + h) * a.L + i0 + r]), total = {};
        for (i64 j = 0; j < K; j += WIDTH) {
          F e = exp2_of(load<F>(p + j) - log);
          store(p + j, e), total = fma(e, load<F>(d + j), total);
        }
        F mean = all(sum_of(total));
        for (i64 j = 0; j < K; j += WIDTH) store(d + j, (load<F>(d + j) - mean) * load<F>(p + j));
      }
      product(m.ds, m.P, 1, m.k, a.D, m.dq + i0 * a.D, a.D, n, a.D, seen, false);
      product(m.ds, 1, m.P, m.q + i0 * a.D, a.D, m.dk, a.D, seen, a.D, n, true);
      product(m.p, 1, m.P, m.dout + i0 * a.D, a.D, m.dv, a.D, seen, a.D, n, true);
    }
    for (i64 t = 0; t < a.L; t++) turn(a, m.dq + t * a.D, t, into + t * row + h * a.D, -1.f, a.scale);
  }
  for (i64 t = 0; t < a.L; t++) {
    turn(a, m.dk + t * a.D, t, into + t * row + (a.H + g) * a.D, -1.f, LN2);  // of q's factor
    memcpy(into + t * row + (a.H + a.G + g) * a.D, m.dv + t * a.D, 4 * a.D);
  }
}

template <void (*UNIT)(const Attend&, const Lines&, i64, i64)>
static void units(void* what, i64 from, i64 to, int) {
  Attend& a = *(Attend*)what;
  Lines m(a);
  if (m.all)
    for (i64 unit = from; unit < to; unit++) UNIT(a, m, unit / a.G, unit % a.G);
  else
    a.failed = 1;
}

extern "C" void isoscale_attend(const Attend* a) {
  parallel(a->B * a->G, a->B * a->L * (a->H + 2 * a->G) * a->D, a->threads, units<forward_unit>, (void*)a);
}
extern "C" void isoscale_attend_back(const Attend* a) {
  parallel(a->B * a->G, a->B * a->L * (a->H + 2 * a->G) * a->D, a->threads, units<backward_unit>, (void*)a);
}

// ---- SwiGLU: act = silu(mult gate) up, of rows [gate | up]

extern "C" struct Glu {  // mirrored in cpu_step.py
  const float *both, *grad;  // [n, 2 h], [n, h]
  float* out;                // [n, h] forward, [n, 2 h] backward
  i64 n, h;
  float mult;
  i32 threads;
};

static INLINE F sigmoid(F z) { return all(1.f) / (all(1.f) + exp2_of(lesser(all(126.f), z * all(-LOG2E)))); }
static void glu_rows(void* what, i64 from, i64 to, int) {
  const Glu& g = *(const Glu*)what;
  for (i64 r = from; r < to; r++) {
    const float *gate = g.both + r * 2 * g.h, *up = gate + g.h;
    for (i64 j = 0; j < g.h; j += WIDTH) {
      F z = load<F>(gate + j) * all(g.mult);
      store(g.out + r * g.h + j, z * sigmoid(z) * load<F>(up + j));
    }
  }
}
static void glu_back_rows(void* what, i64 from, i64 to, int) {
  const Glu& g = *(const Glu*)what;
  for (i64 r = from; r < to; r++) {
    const float *gate = g.both + r * 2 * g.h, *up = gate + g.h, *grad = g.grad + r * g.h;
    float *dgate = g.out + r * 2 * g.h, *dup = dgate + g.h;
    for (i64 j = 0; j < g.h; j += WIDTH) {
      F z = load<F>(gate + j) * all(g.mult), s = sigmoid(z), d = load<F>(grad + j);
      store(dup + j, d * z * s);
      store(dgate + j, d * load<F>(up + j) * all(g.mult) * s * fma(z, all(1.f) - s, all(1.f)));
    }
  }
}
extern "C" void isoscale_glu(const Glu* g) { parallel(g->n, g->n * g->h, g->threads, glu_rows, (void*)g); }
extern "C" void isoscale_glu_back(const Glu* g) { parallel(g->n, g->n * g->h, g->threads, glu_back_rows, (void*)g); }

// ---- RMSNorm without a gain, and the skip beside it: dx = a (grad - normed mean(grad normed)) / rms + b skip

extern "C" struct Rms {  // mirrored in cpu_step.py
  const float *x, *grad, *skip;  // [n, w]; forward: x; backward: x is the normed one, skip may be 0
  float *out, *reciprocal;       // [n, w], [n]
  i64 n, w;
  float eps, a, b;
  i32 threads;
};

static void rms_rows(void* what, i64 from, i64 to, int) {
  const Rms& m = *(const Rms*)what;
  for (i64 r = from; r < to; r++) {
    const float* x = m.x + r * m.w;
    F total = {};
    for (i64 j = 0; j < m.w; j += WIDTH) total = fma(load<F>(x + j), load<F>(x + j), total);
    float by = 1.f / __builtin_sqrtf(sum_of(total) / m.w + m.eps);
    for (i64 j = 0; j < m.w; j += WIDTH) store(m.out + r * m.w + j, load<F>(x + j) * all(by));
    m.reciprocal[r] = by;
  }
}
static void rms_back_rows(void* what, i64 from, i64 to, int) {
  const Rms& m = *(const Rms*)what;
  for (i64 r = from; r < to; r++) {
    const float *y = m.x + r * m.w, *g = m.grad + r * m.w, *skip = m.skip ? m.skip + r * m.w : 0;
    F total = {};
    for (i64 j = 0; j < m.w; j += WIDTH) total = fma(load<F>(g + j), load<F>(y + j), total);
    F mean = all(-sum_of(total) / m.w), by = all(m.reciprocal[r] * m.a);
    for (i64 j = 0; j < m.w; j += WIDTH) {
      F d = fma(load<F>(y + j), mean, load<F>(g + j)) * by;
      store(m.out + r * m.w + j, skip ? fma(load<F>(skip + j), all(m.b), d) : d);
    }
  }
}
extern "C" void isoscale_rms(const Rms* m) { parallel(m->n, m->n * m->w, m->threads, rms_rows, (void*)m); }
extern "C" void isoscale_rms_back(const Rms* m) { parallel(m->n, m->n * m->w, m->threads, rms_back_rows, (void*)m); }

extern "C" void isoscale_step_sizes(i64* out) { out[0] = sizeof(Attend), out[1] = sizeof(Glu), out[2] = sizeof(Rms); }
