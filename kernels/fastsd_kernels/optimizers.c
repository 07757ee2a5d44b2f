/* Lion, D-Lion, AdamW and the gradient norm on a CPU, each in one pass over memory.

   The mathematics is in lion.py, dlion.py, adamw.py and gradient_norm.py, the options and the roundings in arena.py.
   A step is one call for a whole list of tensors.  It is cut into spans of 16384 elements, which the threads share, and a
   span into tiles of 512.  A tile is converted to fp32 if necessary, updated by the optimizer's loop, which has no branch,
   and converted back.

   Bytes moved, per element, as on a GPU: Lion 20, D-Lion and AdamW 28, the norm 4; with bf16 halves and gradients 18, 26,
   26, 2.  Memory bounds the speed: PyTorch reads and writes it once per operation, about a dozen times a step.

   Roundings: fmaf where the references round once, and -ffp-contract=off, so that nothing else is fused.  Roots and
   quotients are IEEE's.  Sums have a fixed order that depends on neither vectors nor threads: element i is added to lane
   i mod 16, in fp32 (the norm in fp64), a tile's lanes are added in fp64 as a tree, then tiles and spans one after another.
   The sums are the same for any number of threads, CPU and compiler, and closer to fp64 than the references'.

   Lost: tiles of 2048 (with halves, a tile's streams and copies exceed 32 KB, and a step took up to twice as long); the
   2048 lanes of the Triton kernel (the same bits as on a GPU, but D-Lion at two thirds of its speed).

   Read next: cpu_optimizers.py, which compiles this file and calls it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 512, SPAN = 16384, LANES = 16 };

/* One tensor with its gradient and states, as cpu_optimizers.py writes it: twelve words of 64 bits. */
typedef struct {
    void *p;              /* float, or master_hi (bf16) if there is a `master_lo` */
    void *g;              /* float, or bf16 if `g16` is set */
    float *m, *s;         /* states; Lion has no s */
    int16_t *master_lo;   /* NULL if p is fp32 */
    float *ema;           /* averages of p; NULL without any */
    int64_t ema_stride;   /* elements from one average to the next */
    int64_t emas;         /* number of averages */
    const float *factors; /* factors of this step, such as the learning rate */
    int64_t g16;        /* nonzero if g is bf16 */
    int64_t n;          /* elements, at least one */
    int64_t first_span; /* number of its first span among those of all tensors */
} Row;

_Static_assert(sizeof(Row) == 96, "cpu_optimizers.py writes twelve words of 64 bits");

typedef struct {
    const float *scale, *ema_gains; /* each may be NULL; one gain for each average */
    const uint8_t *found_inf;       /* if nonzero, no byte of p, m, s, master_lo and ema changes; may be NULL */
    uint8_t *overflow;              /* set to 1 if an element kept its weight and state, see `finite`; may be NULL */
    int32_t threads;
} Options;

/* Update n elements, all in fp32, and add their parts to two sums. Return nonzero if one kept its weight and state. */
typedef int Update(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict s, double *sums,
                    const float *factors, const float *constants);

static inline float sign(float x) { return (x > 0 ? 1.0f : 0.0f) - (x < 0 ? 1.0f : 0.0f); }

/* Return 0 for NaN, infinity and what the high half of a master would round to infinity: arena.py's LARGEST. */
static inline int finite(float x) { return fabsf(x) <= 0x1.fep127f; }

static int lion(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict s, double *sums,
                const float *factors, const float *constants) {
    int overflow = 0;
    const float decay = factors[0], step = factors[1];
    const float beta1 = constants[0], one_minus_beta1 = constants[1], beta2 = constants[2], one_minus_beta2 = constants[3];
    (void)s, (void)sums;
    for (int i = 0; i < n; i++) {
        const float update = sign(fmaf(g[i], one_minus_beta1, m[i] * beta1));
        const float new_m = fmaf(g[i], one_minus_beta2, m[i] * beta2), new_p = p[i] * decay + update * step;
        const int is_finite = finite(new_p) & finite(new_m);
        m[i] = is_finite ? new_m : m[i];
        p[i] = is_finite ? new_p : p[i];
        overflow |= !is_finite;
    }
    return overflow;
}

/* Return the sum of the lanes, and overwrite them. */
static inline double sum_lanes(double *sums) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) sums[i] += sums[i + n];
    return sums[0];
}

static inline double sum_lanes32(const float *lanes) {
    double sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = lanes[i];
    return sum_lanes(sums);
}

static inline void squares_lanes(int n, const float *restrict g, double *restrict sums) {
    for (int i = 0; i < n; i++) sums[i] += (double)g[i] * (double)g[i];
}

/* Update at most LANES elements, each of which has its own lane. */
static inline int dlion_lanes(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict s,
                              float *restrict dots, float *restrict l1, const float *factors, const float *constants) {
    int overflow = 0;
    const float decay = factors[0], step = factors[1], m_gain = factors[2], s_gain = factors[3];
    const float beta1 = constants[0], one_minus_beta1 = constants[1], beta2 = constants[2], sb = constants[3];
    for (int i = 0; i < n; i++) {
        const float update = sign(fmaf(g[i], one_minus_beta1, m[i] * beta1));
        const float new_m = fmaf(g[i], m_gain, m[i] * beta2), new_s = s[i] * sb + update * s_gain;
        const float new_p = p[i] * decay + update * step;
        const int is_finite = finite(new_p) & finite(new_m) & finite(new_s);
        dots[i] += update * s[i];
        s[i] = is_finite ? new_s : s[i];
        m[i] = is_finite ? new_m : m[i];
        p[i] = is_finite ? new_p : p[i];
        l1[i] += fabsf(s[i]);
        overflow |= !is_finite;
    }
    return overflow;
}

static int dlion(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict s, double *sums,
                 const float *factors, const float *constants) {
    float dots[LANES] = {0}, l1[LANES] = {0};
    int i = 0, overflow = 0;
    for (; i + LANES <= n; i += LANES)
        overflow |= dlion_lanes(LANES, p + i, g + i, m + i, s + i, dots, l1, factors, constants);
    overflow |= dlion_lanes(n - i, p + i, g + i, m + i, s + i, dots, l1, factors, constants);
    sums[0] += sum_lanes32(dots);
    sums[1] += sum_lanes32(l1);
    return overflow;
}

static int adamw(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict v, double *sums,
                 const float *factors, const float *constants) {
    int overflow = 0;
    const float decay = factors[0], step_size = factors[1], correction2 = factors[2];
    const float one_minus_beta1 = constants[0], beta2 = constants[1], one_minus_beta2 = constants[2], eps = constants[3];
    (void)sums;
    for (int i = 0; i < n; i++) {
        const float new_m = fmaf(g[i] - m[i], one_minus_beta1, m[i]);
        const float new_v = fmaf(g[i] * one_minus_beta2, g[i], v[i] * beta2);
        const float new_p = p[i] * decay + new_m * step_size / (sqrtf(new_v) / correction2 + eps);
        const int is_finite = finite(new_p) & finite(new_m) & finite(new_v);
        m[i] = is_finite ? new_m : m[i];
        v[i] = is_finite ? new_v : v[i];
        p[i] = is_finite ? new_p : p[i];
        overflow |= !is_finite;
    }
    return overflow;
}

static int gradient_norm(int n, float *restrict p, const float *restrict g, float *restrict m, float *restrict s, double *sums,
                         const float *factors, const float *constants) {
    double squares[LANES] = {0};
    (void)p, (void)m, (void)s, (void)factors, (void)constants;
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares_lanes(LANES, g + i, squares);
    squares_lanes(n - i, g + i, squares);
    sums[0] += sum_lanes(squares);
    return 0;
}

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static void join(int n, float *restrict p, const uint16_t *restrict master_hi, const int16_t *restrict master_lo) {
    for (int i = 0; i < n; i++) p[i] = from_bits(((uint32_t)master_hi[i] << 16) + (uint32_t)(int32_t)master_lo[i]);
}

static void split(int n, const float *restrict p, uint16_t *restrict master_hi, int16_t *restrict master_lo) {
    for (int i = 0; i < n; i++) {
        const uint32_t bits = p[i] == p[i] ? to_bits(p[i]) : 0x7FC00000;
        master_hi[i] = (uint16_t)((bits + 0x8000) >> 16);
        master_lo[i] = (int16_t)bits;
    }
}

static void widen(int n, float *restrict wide, const uint16_t *restrict g, float scale) {
    for (int i = 0; i < n; i++) wide[i] = from_bits((uint32_t)g[i] << 16) * scale;
}

static void multiply(int n, float *restrict scaled, const float *restrict g, float scale) {
    for (int i = 0; i < n; i++) scaled[i] = g[i] * scale;
}

static void update_ema(int n, float *restrict ema, const float *restrict p, float gain) {
    for (int i = 0; i < n; i++) {
        const float new_ema = ema[i] + gain * (p[i] - ema[i]);
        ema[i] = finite(new_ema) ? new_ema : ema[i];
    }
}

static int64_t spans_of(const Row *row) { return (row->n + SPAN - 1) / SPAN; }

/* Return the tensor that span k belongs to. */
static const Row *row_of_span(const Row *rows, int64_t count, int64_t k) {
    while (count > 1) {
        const int64_t half = count / 2;
        if (rows[half].first_span <= k) rows += half, count -= half;
        else count = half;
    }
    return rows;
}

static inline float *offset32(float *base, int64_t at) { return base ? base + at : NULL; }

static inline uint16_t *offset16(void *base, int64_t at) { return base ? (uint16_t *)base + at : NULL; }

/* Update elements at .. at + n of one tensor and apply the step's options. Return nonzero if one kept its weight and state. */
static int update_tile(Update *update, const Row *row, const Options *o, const float *constants, int64_t at, int n,
                       int step, double *sums) {
    int overflow = 0;
    const float scale = o->scale ? *o->scale : 1.0f;
    float p_tile[TILE], g_tile[TILE], *p = p_tile, *const ema = offset32(row->ema, at);
    uint16_t *const master_hi = offset16(row->master_lo ? row->p : NULL, at);
    int16_t *const master_lo = row->master_lo ? row->master_lo + at : NULL;
    uint16_t *const g16 = offset16(row->g16 ? row->g : NULL, at);
    float *const g32 = offset32(row->g16 ? NULL : row->g, at), *g = g_tile;
    if (step) {
        if (master_lo) join(n, p, master_hi, master_lo);
        else p = offset32(row->p, at);
        if (g16) widen(n, g, g16, scale);
        else if (scale != 1.0f) multiply(n, g, g32, scale);
        else g = g32;
        overflow = update(n, p, g, offset32(row->m, at), offset32(row->s, at), sums, row->factors, constants);
        if (master_lo) split(n, p, master_hi, master_lo);
        for (int64_t k = 0; k < row->emas; k++) update_ema(n, ema + k * row->ema_stride, p, o->ema_gains[k]);
    }
    return overflow;
}

/* Update all tensors; sums_2P gets two sums per tensor. scratch_2K: two numbers per span. */
static void update_all(Update *update, const Row *rows, int64_t count, const Options *o, const float *constants,
                       double *scratch_2K, double *sums_2P) {
    const int64_t spans = rows[count - 1].first_span + spans_of(rows + count - 1);
    const int step = !(o->found_inf && *o->found_inf);
    int overflow = 0;
#pragma omp parallel for schedule(static) num_threads(o->threads) if (spans > 1) reduction(| : overflow)
    for (int64_t k = 0; k < spans; k++) {
        const Row *row = row_of_span(rows, count, k);
        const int64_t start = (k - row->first_span) * SPAN, stop = row->n - start < SPAN ? row->n : start + SPAN;
        double sums[2] = {0, 0};
        for (int64_t at = start; at < stop; at += TILE)
            overflow |= update_tile(update, row, o, constants, at, stop - at < TILE ? (int)(stop - at) : TILE, step, sums);
        scratch_2K[k] = sums[0], scratch_2K[spans + k] = sums[1];
    }
    if (overflow && o->overflow) *o->overflow = 1;
    for (int64_t i = 0; i < 2 * count; i++) {
        const Row *row = rows + i % count;
        const double *partial = scratch_2K + i / count * spans + row->first_span;
        sums_2P[i] = 0;
        for (int64_t k = 0; k < spans_of(row); k++) sums_2P[i] += partial[k];
    }
}

#define EXPORT(NAME)                                                                                                           \
    void fastsd_##NAME(const Row *rows, int64_t count, const Options *options, const float *constants, double *scratch_2K,     \
                       double *sums_2P) {                                                                                      \
        update_all(NAME, rows, count, options, constants, scratch_2K, sums_2P);                                                \
    }

EXPORT(lion)
EXPORT(dlion)
EXPORT(adamw)
EXPORT(gradient_norm)
