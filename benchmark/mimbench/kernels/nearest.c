/* Exact nearest neighbours: a product in low precision, a running threshold per query, float64 where it matters.

   Scores are made 32 queries by 32 bank vectors at a time and compared with each query's threshold while they are
   in the first-level cache; no matrix of scores ever reaches memory. Every score comes with a bound on its error,
   so a pair is dropped only when it provably is no neighbour. What is left, some tens of pairs per query, is
   computed in float64. Larger scores are nearer; neighbours.py says what a score is. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__) || AMX
#include <immintrin.h>
#endif

#define SIDE 32 /* queries and bank vectors of a block; packed as two groups of 16 */
#define LANES 16
#define UNIT 0x1p-24 /* rounding of one float32 operation */

/* 1 where the matrix unit for bfloat16 can be used, once the kernel of the system has allowed it. */
int has_bfloat16(void) {
#if AMX
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

/* ---- Packing ---- */

static uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static uint32_t round_bfloat16(float x) {
    uint32_t bits = as_bits(x);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
}

static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Rounds a row less the centre; parts and about as below. Inlined, so that parts is a constant and loops are vectors. */
static inline __attribute__((always_inline)) void round_row(int parts, const float *restrict row,
                                                            const float *restrict centre, double scale, long width,
                                                            uint32_t *restrict high, uint32_t *restrict low,
                                                            double *restrict about) {
    double sums[5][LANES] = {{0}};
    for (long i = 0; i < width; i += LANES)
        for (long j = 0; j < LANES; j++) {
            double off = (double)row[i + j] - centre[i + j], value = off * scale;
            float first = parts ? as_float(round_bfloat16((float)value)) : (float)value;
            float second = parts == 2 ? as_float(round_bfloat16((float)(value - first))) : 0;
            double lost = value - first - second;
            high[i + j] = as_bits(first);
            low[i + j] = as_bits(second);
            sums[0][j] += value * value;
            sums[1][j] += lost * lost;
            sums[2][j] += (double)second * second;
            sums[3][j] += (double)row[i + j] * centre[i + j];
            sums[4][j] += off * centre[i + j];
        }
    for (int s = 0; s < 5; s++) {
        double total = 0;
        for (int j = 0; j < LANES; j++) total += sums[s][j];
        about[s * SIDE] = s < 3 ? sqrt(total) : total;
    }
}

/* Packs n <= 32 rows of x (n, d): a block of the bank or of the queries.

   A row is divided by its norm (if given) and rounded to float32 into unit (n, d); less the centre and times
   scale it becomes one part of float32 (parts = 0), one of bfloat16 (1), or a bfloat16 and its remainder (2).
   words: [2 groups of 16][parts][d in steps of 16 words][16 rows][16 words], where a word is a float32 or two
   bfloat16; for the bank the last two are swapped. about (5, 32) gets for each row the lengths of the exact row, of
   what rounding lost and of the second part, and the products of the centre with the row and with row - centre.
   centre (width) and the scratch row (4, width) are as long as the words have room for. */
static void pack_block(const float *x, const double *norm, const float *centre, double scale, long n, long d, long width, long parts,
          long bank, float *unit, uint32_t *words, double *about, float *row) {
    long steps = width / (parts ? 32 : 16), pieces = parts ? parts : 1;
    uint32_t *high = (uint32_t *)(row + width), *low = high + width, *packed = low + width;
    memset(row, 0, 4 * width * sizeof *row);
    memset(about, 0, 5 * SIDE * sizeof *about);
    for (long r = 0; r < SIDE; r++) {
        if (r < n) {
            double divisor = norm ? fmax(norm[r], 1e-300) : 1;
            for (long i = 0; i < d; i++) row[i] = (float)(x[r * d + i] / divisor);
            memcpy(unit + r * d, row, d * sizeof *row);
            double *lengths = about + r;
            if (parts == 0) round_row(0, row, centre, scale, width, high, low, lengths);
            else if (parts == 1) round_row(1, row, centre, scale, width, high, low, lengths);
            else round_row(2, row, centre, scale, width, high, low, lengths);
        } else if (r == n) {
            memset(high, 0, 2 * width * sizeof *high);
        }
        for (long p = 0; p < pieces; p++) {
            const uint32_t *part = p ? low : high;
            uint32_t *to = words + (r / LANES * pieces + p) * steps * 256;
            if (parts) {
                for (long i = 0; i < width / 2; i++) packed[i] = part[2 * i] >> 16 | part[2 * i + 1];
                part = packed;
            }
            for (long t = 0; t < steps; t++)
                if (bank)
                    for (long j = 0; j < LANES; j++) to[t * 256 + j * LANES + r % LANES] = part[t * LANES + j];
                else
                    memcpy(to + t * 256 + r % LANES * LANES, part + t * LANES, 64);
        }
    }
}

/* Packs n rows of x (n, d), block by block: about (blocks, 5, 32). */
void pack(const float *x, const double *norm, const float *centre, double scale, long n, long d, long width, long parts,
          long bank, float *unit, uint32_t *words, double *about, float *row) {
    for (long r = 0; r < n; r += SIDE) {
        pack_block(x + r * d, norm ? norm + r : norm, centre, scale, n - r < SIDE ? n - r : SIDE, d, width, parts, bank,
                   unit + r * d, words, about + r * 5, row);
        words += SIDE * width / (parts ? 2 : 1) * (parts ? parts : 1);
    }
}

/* ---- Scores of a block: bias plus the product of packed queries and bank vectors ---- */

#if AMX
static void configure(void) {
    struct { uint8_t palette, start, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
}

static void bfloat16_product(const uint32_t *left, const uint32_t *right, const float *bias, long steps, long parts,
                             float *scores) {
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + LANES, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + LANES, 0);
    long part = steps * 256, group = parts * part;
    for (long p = 0; p < 2 * parts - 1; p++) { /* high x high, low x high, high x low; low x low counts as lost */
        const uint32_t *a = left + (p == 1) * part, *b = right + (p == 2) * part;
        for (long t = 0; t < steps; t++, a += 256, b += 256) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + group, 64);
            _tile_loadd(5, a + group, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, SIDE * 4);
    _tile_stored(1, scores + LANES, SIDE * 4);
    _tile_stored(2, scores + LANES * SIDE, SIDE * 4);
    _tile_stored(3, scores + LANES * SIDE + LANES, SIDE * 4);
}
#endif

#if defined(__AVX512F__)
#define VECTOR 16
#define ROWS 8 /* rows at once, so that their sums fit the registers */
#elif defined(__AVX__)
#define VECTOR 8
#define ROWS 2
#else
#define VECTOR 4
#define ROWS 2
#endif
typedef float vector __attribute__((vector_size(4 * VECTOR), aligned(4)));
#define ACROSS (SIDE / VECTOR)

static void float32_product(const float *left, const float *right, const float *bias, long steps, float *scores) {
    long group = steps * 256;
    for (long r = 0; r < SIDE; r += ROWS) {
        const float *a = left + r / LANES * group + r % LANES * LANES;
        vector sums[ROWS][ACROSS];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < ACROSS; v++) sums[i][v] = *(const vector *)(bias + v * VECTOR);
        for (long t = 0; t < steps; t++)
            for (long j = 0; j < LANES; j++)
                for (int v = 0; v < ACROSS; v++) {
                    long lane = v * VECTOR;
                    vector b = *(const vector *)(right + lane / LANES * group + t * 256 + j * LANES + lane % LANES);
                    for (int i = 0; i < ROWS; i++) sums[i][v] += a[t * 256 + i * LANES + j] * b;
                }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < ACROSS; v++) *(vector *)(scores + (r + i) * SIDE + v * VECTOR) = sums[i][v];
    }
}

static inline void product(const uint32_t *left, const uint32_t *right, const float *bias, long steps, long parts,
                           float *scores) {
#if AMX
    if (parts) {
        bfloat16_product(left, right, bias, steps, parts, scores);
        return;
    }
#endif
    (void)parts;
    float32_product((const float *)left, (const float *)right, bias, steps, scores);
}

/* Bits of the 32 scores that reach the limit. */
static inline uint32_t reaching(const float *scores, float limit) {
#if defined(__AVX512F__)
    __m512 all = _mm512_set1_ps(limit);
    uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), all, _CMP_GE_OQ);
    return low | (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + LANES), all, _CMP_GE_OQ) << LANES;
#else
    int any = 0;
    uint32_t bits = 0;
    for (int j = 0; j < SIDE; j++) any |= scores[j] >= limit;
    if (any)
        for (int j = 0; j < SIDE; j++) bits |= (uint32_t)(scores[j] >= limit) << j;
    return bits;
#endif
}

/* ---- Exact values and their order ---- */

static float exact(const float *q, const float *b, long d, long euclidean) {
    double sums[LANES] = {0}, total = 0;
    long i = 0;
    if (euclidean) {
        for (; i + LANES <= d; i += LANES)
            for (int j = 0; j < LANES; j++) {
                double off = (double)q[i + j] - b[i + j];
                sums[j] += off * off;
            }
        for (; i < d; i++) total += ((double)q[i] - b[i]) * ((double)q[i] - b[i]);
    } else {
        for (; i + LANES <= d; i += LANES)
            for (int j = 0; j < LANES; j++) sums[j] += (double)q[i + j] * b[i + j];
        for (; i < d; i++) total += (double)q[i] * b[i];
    }
    for (int j = 0; j < LANES; j++) total += sums[j];
    return (float)(euclidean ? sqrt(total) : total) + 0.0f; /* there is one zero */
}

/* Integers that sort as floats do, and back. */
static int32_t rank_of(float x) {
    int32_t bits = (int32_t)as_bits(x);
    return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

static float of_rank(int32_t rank) { return as_float(rank < 0 ? rank ^ 0x7FFFFFFF : rank); }

/* Shell's sort, descending: lists are short, and its worst case is still far from quadratic. */
static void sort(int64_t *keys, long n) {
    for (long gap = n; gap > 1;) {
        gap = gap * 5 / 11 > 1 ? gap * 5 / 11 : 1;
        for (long i = gap; i < n; i++) {
            int64_t key = keys[i];
            long j = i;
            for (; j >= gap && keys[j - gap] < key; j -= gap) keys[j] = keys[j - gap];
            keys[j] = key;
        }
    }
}

/* ---- The search ---- */

typedef struct {
    long k, d, euclidean;
    double scale;                /* score = scale x similarity - base, or base - scale x squared distance */
    const double *base;          /* of each query */
    const float *queries, *bank; /* what exact values are computed from */
    const int64_t *exclude;      /* for each query a position that is no neighbour, or NULL */
    const float *bounds;         /* (3, stride): how wrong each query's scores can be, see search */
    long stride, first, room, last;
    int64_t *keys;
} Task;

/* The pairs of one query that may be neighbours, in the order of the bank, with bounds of their scores. */
typedef struct {
    float *low, *high;
    int32_t *where;
    long count, full; /* shortened when full */
    float least;      /* score below which a pair is no neighbour */
    float exact;      /* the same, from float64 values: what comes later in the bank loses ties */
    int32_t state;    /* 0: bounds were enough, 1: needed float64 values on the way, 2: given up */
} Pairs;

/* The k-th largest of n numbers. */
static float kth(const float *numbers, long n, long k) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (long i = 0; i < n; i++) {
        int32_t rank = rank_of(numbers[i]);
        least = rank < least ? rank : least;
        most = rank > most ? rank : most;
    }
    while (least < most) { /* at least k reach `least`, fewer exceed `most` */
        int32_t middle = (int32_t)(((int64_t)least + most + 1) >> 1), count = 0;
        float value = of_rank(middle);
        for (long i = 0; i < n; i++) count += numbers[i] >= value;
        if (count == k) return value;
        if (count > k) least = middle;
        else most = middle - 1;
    }
    return of_rank(least);
}

/* Computes the pairs of a query in float64: keys (value, lower position), best first. */
static void refine(const Task *task, long query, const Pairs *pairs) {
    int64_t *keys = task->keys;
    const float *q = task->queries + query * task->d;
    for (long i = 0; i < pairs->count; i++) {
        if (i + 4 < pairs->count)
            for (long at = 0; at < task->d; at += LANES)
                __builtin_prefetch(task->bank + pairs->where[i + 4] * task->d + at);
        float value = exact(q, task->bank + pairs->where[i] * task->d, task->d, task->euclidean);
        keys[i] = rank_of(task->euclidean ? 0.0f - value : value) * 0x100000000 + (INT32_MAX - pairs->where[i]);
    }
    sort(keys, pairs->count);
}

static int32_t where_of(int64_t key) { return INT32_MAX - (int32_t)(key & INT32_MAX); }

static float nearness_of(int64_t key) { return of_rank((int32_t)(key >> 32)); }

/* Drops the pairs that the bounds rule out. */
static void shorten(const Task *task, long query, Pairs *pairs) {
    if (pairs->count < task->k) return;
    double bound = kth(pairs->low, pairs->count, task->k);
    /* Values that differ by less than this may be equal in float32. */
    double tie = task->euclidean ? 0x1p-20 * fmax(0, task->base[query] - bound) : 0x1p-22 * task->scale;
    float least = nextafterf((float)(bound - tie), -FLT_MAX);
    long kept = 0;
    for (long i = 0; i < pairs->count; i++) {
        pairs->low[kept] = pairs->low[i];
        pairs->high[kept] = pairs->high[i];
        pairs->where[kept] = pairs->where[i];
        kept += pairs->high[i] >= least;
    }
    pairs->count = kept;
    pairs->least = fmaxf(least, pairs->exact);
}

/* A score that a pair of this (exact) value reaches, in spite of the rounding of float64. */
static float score_of(const Task *task, long query, double value) {
    double base = task->base[query];
    double part = task->scale * (task->euclidean ? value * value : value);
    double score = task->euclidean ? base - part : part - base;
    return nextafterf((float)(score - (task->d + 16) * 0x1p-51 * (fabs(part) + fabs(base))), -FLT_MAX);
}

/* Keeps the k nearest so far by float64 values, and asks of later ones that they beat the last of these. */
static void select_exactly(const Task *task, long query, Pairs *pairs) {
    const int64_t *keys = task->keys;
    float farthest = task->euclidean ? FLT_MAX : -FLT_MAX, value = 0;
    refine(task, query, pairs);
    for (long i = 0; i < task->k; i++) {
        value = nearness_of(keys[i]) * (task->euclidean ? -1 : 1);
        pairs->low[i] = score_of(task, query, nextafterf(value, farthest));
        pairs->high[i] = FLT_MAX;
        pairs->where[i] = where_of(keys[i]);
    }
    pairs->count = task->k;
    pairs->state = 1;
    /* Halfway to the next float32: what does not get there is rounded to `value` or worse. */
    double halfway = (value + (double)nextafterf(value, -farthest)) / 2;
    pairs->exact = task->euclidean && value == 0 ? FLT_MAX : score_of(task, query, halfway);
    pairs->least = fmaxf(pairs->least, pairs->exact);
}

/* Collects from the scores of a block (32 queries from `query` on, 32 vectors from `at` on) what may be neighbours.
   least: the thresholds; e: (lengths, losses, second parts, biases), the largest in the block. */
static inline void collect(const Task *task, Pairs *some, long query, long at, const float *scores, const float *e,
                           float *least) {
    const float *lost = task->bounds + query, *reach = lost + task->stride, *second = reach + task->stride;
    float errors[SIDE], limits[SIDE];
    for (long i = 0; i < SIDE; i++) {
        errors[i] = lost[i] * e[0] + reach[i] * e[1] + second[i] * e[2] + e[3];
        limits[i] = least[i] - errors[i];
    }
    for (long i = 0; i < SIDE; i++) {
        uint32_t hits = reaching(scores + i * SIDE, limits[i]);
        if (!hits) continue;
        Pairs *pairs = some + i;
        for (; hits; hits &= hits - 1) {
            long j = __builtin_ctz(hits), n = pairs->count;
            if (task->exclude && task->exclude[query + i] == at + j) continue;
            pairs->low[n] = scores[i * SIDE + j] - errors[i];
            pairs->high[n] = scores[i * SIDE + j] + errors[i];
            pairs->where[n] = (int32_t)(at + j);
            pairs->count++;
        }
        if (pairs->count < pairs->full) continue;
        shorten(task, query + i, pairs);
        if (2 * pairs->count > task->room && task->last) {
            select_exactly(task, query + i, pairs);
        } else if (2 * pairs->count > task->room) {
            pairs->state = 2;
            pairs->least = FLT_MAX;
            pairs->count = 0;
        }
        long full = 2 * pairs->count > task->first ? 2 * pairs->count : task->first;
        pairs->full = full < task->room ? full : task->room;
        least[i] = pairs->least;
    }
}

/* Finds the k nearest of n packed bank vectors for each of `rows` packed queries.

   bounds (3, rows in whole blocks): by what the bank's (blocks, 4) largest lengths, losses, second parts and biases
   are multiplied (the last by 1) for the most that a score can be wrong. A query of which more than room / 2 pairs
   stay in doubt is given up, or, in the last attempt, pursued in float64. tile: bank vectors that stay in
   the cache while the queries pass. scratch: see scratch_bytes. Writes values and positions (rows, k) and states. */
void search(const uint32_t *left, const uint32_t *right, const float *bias, const float *bounds, const float *largest,
            const double *base, long steps, long parts, long rows, long n, long tile, long room, long last, long k,
            long d, long euclidean, double scale, const float *queries, const float *bank, const int64_t *exclude,
            char *scratch, float *values, int64_t *positions, int32_t *states) {
    long padded = (rows + SIDE - 1) / SIDE * SIDE, blocks = (n + SIDE - 1) / SIDE, space = room + SIDE;
    long block_words = SIDE * LANES * steps * (parts ? parts : 1), first = 4 * k + SIDE < room ? 4 * k + SIDE : room;
    Task task = {k, d, euclidean, scale, base, queries, bank, exclude, bounds, padded, first, room, last, NULL};
    task.keys = (int64_t *)scratch;
    Pairs *all = (Pairs *)(task.keys + space);
    float *floats = (float *)(all + padded);
    float scores[SIDE * SIDE] __attribute__((aligned(64))), least[SIDE];

    for (long q = 0; q < padded; q++) {
        float *own = floats + q * 3 * space;
        float start = q < rows ? -FLT_MAX / 2 : FLT_MAX; /* padding of the bank scores less */
        all[q] = (Pairs){own, own + space, (int32_t *)(own + 2 * space), 0, first, start, start, q < rows ? 0 : 2};
    }
#if AMX
    if (parts && has_bfloat16()) configure();
#endif
    for (long from = 0; from < blocks; from += tile / SIDE) {
        long to = from + tile / SIDE < blocks ? from + tile / SIDE : blocks;
        for (long q = 0; q < padded; q += SIDE) {
            const uint32_t *packed = left + q / SIDE * block_words;
            int searching = 0;
            for (long i = 0; i < SIDE; i++) {
                least[i] = all[q + i].least;
                searching |= all[q + i].state != 2;
            }
            for (long b = from; b < to && searching; b++) {
                product(packed, right + b * block_words, bias + b * SIDE, steps, parts, scores);
                collect(&task, all + q, q, b * SIDE, scores, largest + 4 * b, least);
            }
        }
    }
#if AMX
    if (parts) _tile_release();
#endif
    for (long q = 0; q < rows; q++) {
        states[q] = all[q].state;
        if (states[q] == 2) continue;
        shorten(&task, q, all + q);
        refine(&task, q, all + q);
        for (long i = 0; i < k; i++) {
            float nearness = nearness_of(task.keys[i]);
            values[q * k + i] = euclidean ? 0.0f - nearness : nearness;
            positions[q * k + i] = where_of(task.keys[i]);
        }
    }
}

long scratch_bytes(long rows, long room) {
    long padded = (rows + SIDE - 1) / SIDE * SIDE, space = room + SIDE;
    return space * sizeof(int64_t) + padded * (sizeof(Pairs) + 3 * space * sizeof(float));
}
