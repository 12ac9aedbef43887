/* The arithmetic of the noise contract (surgery/noise.py), the sums of inspect and diff, and masks, on raw storage.
 *
 * plain.py says the same in NumPy, with the meaning of every argument. There is no Python in here: ctypes calls the
 * exported functions at the end, without the GIL. Each is written once, as a body that is compiled again for every
 * instruction set; loops are short and plain, so that compilers vectorize them.
 *
 * To be compiled with -ffp-contract=off and never with -ffast-math: a fused or reordered operation changes the bits.
 */

#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_LEVELS 1
#endif

#if defined(_MSC_VER)
#define BODY static __forceinline
#define EXPORT __declspec(dllexport)
#else
#define BODY static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#endif

enum { F64, F32, F16, BF16 };
enum { BASE, AVX2, AVX512 };
enum { BLOCK = 4096, LANES = 1024, QUARTER = LANES / 4, SAMPLED_BLOCKS = 16 };
enum { NOISE_STREAM, SECOND_STREAM, ROUNDING_STREAM };

static const double UNIT_STD = 0.28867513459481287; /* 12^-0.5 */

/* -- bits and values: memcpy, since storage need not be aligned ------------------------------------------------- */

#define READER(name, type)                      \
    BODY type name(const char *w, int64_t i)    \
    {                                           \
        type value;                             \
        memcpy(&value, w + i * sizeof value, sizeof value); \
        return value;                           \
    }

BODY void write_u16(char *w, int64_t i, uint16_t value)
{
    memcpy(w + i * 2, &value, sizeof value);
}

READER(read_f64, double)
READER(read_f32, float)
READER(read_u16, uint16_t)

BODY uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

BODY float value_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Exact. */
BODY float widen(uint16_t half, int dtype)
{
    if (dtype == BF16)
        return value_of((uint32_t)half << 16);
    uint32_t magnitude = half & 0x7FFFu, sign = (half & 0x8000u) << 16;
    uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7F800000u;
    uint32_t bits = magnitude < 0x7C00u ? normal : special;
    return value_of((magnitude < 0x400u ? subnormal : bits) | sign);
}

BODY float read_float(const char *w, int64_t i, int dtype)
{
    return dtype == F32 ? read_f32(w, i) : widen(read_u16(w, i), dtype);
}

/* Of a value that is a subnormal float16, in units of 2^-24; 0 for the others, which are rounded as bits are. */
BODY float subnormal_units(uint32_t magnitude)
{
    uint32_t units = bits_of(value_of(magnitude) * 0x1p24f);
    return value_of(magnitude < 0x38800000u ? units : 0u);
}

/* To nearest, ties to even. */
BODY uint16_t narrow(float value, int dtype)
{
    uint32_t bits = bits_of(value);
    if (dtype == BF16)
        return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    /* adding 2^23 rounds to an integer, which is then the low bits */
    uint32_t subnormal = bits_of(subnormal_units(magnitude) + 0x1p23f) & 0x7FFFFFu;
    uint32_t rounded = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    rounded = magnitude < 0x38800000u ? subnormal : rounded;
    rounded = magnitude >= 0x47800000u ? 0x7C00u : rounded;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000u));
}

/* Up or down with probability in proportion, by a word of the rounding stream. */
BODY uint16_t narrow_stochastic(float value, uint32_t word, int dtype)
{
    uint32_t bits = bits_of(value);
    if (dtype == BF16)
        return (uint16_t)((bits + (word >> 16)) >> 16);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    double units = (double)subnormal_units(magnitude) + (double)word * 0x1p-32;
    uint32_t subnormal = (uint32_t)(int32_t)units;
    uint32_t rounded = (magnitude - (112u << 23) + (word >> 19)) >> 13;
    rounded = magnitude < 0x38800000u ? subnormal : rounded;
    rounded = magnitude >= 0x47800000u ? 0x7C00u : rounded;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000u));
}

/* -- Philox4x32-10 ---------------------------------------------------------------------------------------------- */

#define M0 0xD2511F53u
#define M1 0xCD9E8D57u
#define W0 0x9E3779B9u
#define W1 0xBB67AE85u

#ifdef HAS_LEVELS

/* Write the words of counters first ... first + 1023: words[j][i] is word j of counter i.
 *
 * N counters in 64-bit lanes, the even ones in one vector and the odd ones in another: one instruction multiplies the
 * low halves of the lanes, so that what is left in the high halves does no harm. Rounds 0 and 1 hold much that is the
 * same for all counters, since only the low 32 bits of a counter differ in a run.
 */
#define DRAW(name, features, V, N, MULTIPLY)                                                                          \
    __attribute__((target(features))) static void name(uint64_t first, uint32_t stream, uint32_t k0, uint32_t k1,     \
                                                       uint32_t words[4][LANES])                                        \
    {                                                                                                                 \
        typedef uint64_t V __attribute__((vector_size(8 * N)));                                                       \
        const V none = {0}, m0 = none + M0, m1 = none + M1, low = none + 0xFFFFFFFFu;                                 \
        V lane = none;                                                                                                \
        for (int j = 0; j < N; j++)                                                                                   \
            lane[j] = 2 * (uint64_t)j;                                                                                \
        const V same1 = (V)MULTIPLY(none + stream, m1), same0 = (V)MULTIPLY((same1 >> 32) ^ (first >> 32) ^ k0, m0);  \
        for (int i = 0; i < LANES; i += 2 * N) {                                                                        \
            V c0[2], c1[2], c2[2], c3[2];                                                                             \
            _Pragma("GCC unroll 2")                                                                                   \
            for (int odd = 0; odd < 2; odd++) {                                                                       \
                V p0 = (V)MULTIPLY(lane + (uint32_t)(first + (uint64_t)(i + odd)), m0);                               \
                V p1 = (V)MULTIPLY((p0 >> 32) ^ k1, m1);                                                              \
                c0[odd] = (p1 >> 32) ^ same1 ^ (uint32_t)(k0 + W0);                                                   \
                c1[odd] = p1;                                                                                         \
                c2[odd] = (same0 >> 32) ^ p0 ^ (uint32_t)(k1 + W1);                                                   \
                c3[odd] = same0;                                                                                      \
            }                                                                                                         \
            _Pragma("GCC unroll 8")                                                                                   \
            for (uint32_t round = 2; round < 10; round++)                                                             \
                _Pragma("GCC unroll 2")                                                                               \
                for (int odd = 0; odd < 2; odd++) {                                                                   \
                    V p0 = (V)MULTIPLY(c0[odd], m0), p1 = (V)MULTIPLY(c2[odd], m1);                                   \
                    c0[odd] = (p1 >> 32) ^ (c1[odd] ^ (uint32_t)(k0 + round * W0));                                   \
                    c1[odd] = p1;                                                                                     \
                    c2[odd] = (p0 >> 32) ^ (c3[odd] ^ (uint32_t)(k1 + round * W1));                                   \
                    c3[odd] = p0;                                                                                     \
                }                                                                                                     \
            const V *c[4] = {c0, c1, c2, c3};                                                                         \
            _Pragma("GCC unroll 4")                                                                                   \
            for (int j = 0; j < 4; j++) {                                                                             \
                V both = (c[j][0] & low) | (c[j][1] << 32);                                                           \
                memcpy(&words[j][i], &both, sizeof both);                                                             \
            }                                                                                                         \
        }                                                                                                             \
    }

#define MULTIPLY_SSE2(a, b) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#define MULTIPLY_AVX2(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define MULTIPLY_AVX512(a, b) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
DRAW(draw_sse2, "sse2", Two, 2, MULTIPLY_SSE2)
DRAW(draw_avx2, "avx2", Four, 4, MULTIPLY_AVX2)
DRAW(draw_avx512, "avx512f", Eight, 8, MULTIPLY_AVX512)

#endif

BODY void draw(int level, uint64_t first, uint32_t stream, uint32_t k0, uint32_t k1, uint32_t words[4][LANES])
{
#ifdef HAS_LEVELS
    if (level == AVX512)
        draw_avx512(first, stream, k0, k1, words);
    else if (level == AVX2)
        draw_avx2(first, stream, k0, k1, words);
    else
        draw_sse2(first, stream, k0, k1, words);
#else
    (void)level;
    for (int i = 0; i < LANES; i++) {
        uint32_t c0 = (uint32_t)first + (uint32_t)i, c1 = (uint32_t)(first >> 32), c2 = stream, c3 = 0;
        for (uint32_t round = 0; round < 10; round++) {
            uint64_t p0 = (uint64_t)c0 * M0, p1 = (uint64_t)c2 * M1;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ (k0 + round * W0);
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ (k1 + round * W1);
            c3 = (uint32_t)p0;
        }
        words[0][i] = c0;
        words[1][i] = c1;
        words[2][i] = c2;
        words[3][i] = c3;
    }
#endif
}

/* -- u of an element, from its words ---------------------------------------------------------------------------- */

BODY float to_uniform(uint32_t word)
{
    return (float)(int32_t)(word >> 8) * 0x1p-24f - 0.5f;
}

/* Natural logarithm of a normal number in (0, 1), as fdlibm's e_log.c: only + - * /, so that there is one result. */
static double natural_log(double x)
{
    uint64_t bits, mantissa;
    memcpy(&bits, &x, sizeof bits);
    uint64_t fraction = bits & 0xFFFFFFFFFFFFFu;
    /* the mantissa is taken in [sqrt(1/2), sqrt(2)), so that f is small */
    uint64_t upper = fraction >= 0x6A09E667F3BCDu;
    mantissa = fraction | ((1023u - upper) << 52);
    double k = (double)((int32_t)(bits >> 52) - 1023 + (int32_t)upper), m;
    memcpy(&m, &mantissa, sizeof m);
    double f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
    double even = w * (0.3999999999940941908 + w * (0.2222219843214978396 + w * 0.1531383769920937332));
    double odd = z * (0.6666666666666735130 +
                      w * (0.2857142874366239149 + w * (0.1818357216161805012 + w * 0.1479819860511658591)));
    double half = 0.5 * f * f;
    double tail = s * (half + (even + odd)) + k * 1.90821492927058770002e-10;
    return k * 6.93147180369123816490e-01 - ((half - tail) - f);
}

BODY double polynomial(double r, const double c[8])
{
    double a = c[0] * r + c[1];
    for (int i = 2; i < 8; i++)
        a = a * r + c[i];
    return a;
}

/* Quantile of the standard normal at p in (0, 1): AS 241, PPND16 (Wichura 1988), relative error about 1e-16. */
static double inverse_normal(double p)
{
    static const double central[2][8] = {
        {2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
         13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608},
        {5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
         5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0}};
    static const double middle[2][8] = {
        {7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
         3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734},
        {1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
         0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0}};
    static const double far[2][8] = {
        {2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
         0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772},
        {2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
         0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0}};
    double q = p - 0.5;
    if (fabs(q) <= 0.425) {
        double r = 0.180625 - q * q;
        return q * polynomial(r, central[0]) / polynomial(r, central[1]);
    }
    double r = sqrt(-natural_log(q < 0.0 ? p : 1.0 - p));
    double z = r <= 5.0 ? polynomial(r - 1.6, middle[0]) / polynomial(r - 1.6, middle[1])
                        : polynomial(r - 5.0, far[0]) / polynomial(r - 5.0, far[1]);
    return q < 0.0 ? -z : z;
}

/* One element takes longer than a call. */
static double to_normal(uint32_t word, uint32_t second)
{
    uint64_t bits = ((uint64_t)word << 20) + (second >> 12);
    return inverse_normal(((double)(int64_t)bits + 0.5) * 0x1p-52) * UNIT_STD;
}

/* -- adding the noise ------------------------------------------------------------------------------------------- */

/* What a run of elements is given: their words of each stream, or NULL for those that are not drawn. */
typedef struct {
    const uint32_t *noise, *second, *rounding;
} Words;

/* Add noise to a run of at most LANES elements; return whether one overflowed. */
BODY int add_to_floats(int dtype, char *w, int64_t n, float scale, Words words)
{
    const uint32_t infinite = dtype == F16 ? 0x7C00u : dtype == BF16 ? 0x7F80u : 0x7F800000u;
    uint32_t largest = 0;
    float u[LANES];
    if (words.second)
        for (int64_t i = 0; i < n; i++)
            u[i] = (float)to_normal(words.noise[i], words.second[i]);
    else
        for (int64_t i = 0; i < n; i++)
            u[i] = to_uniform(words.noise[i]);
    for (int64_t i = 0; i < n; i++)
        u[i] = read_float(w, i, dtype) + u[i] * scale;
    if (dtype == F32) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t exponent = bits_of(u[i]) & infinite;
            largest = largest > exponent ? largest : exponent;
        }
        memcpy(w, u, (size_t)n * sizeof *u);
    } else if (words.rounding)
        for (int64_t i = 0; i < n; i++) {
            uint16_t half = narrow_stochastic(u[i], words.rounding[i], dtype);
            write_u16(w, i, half);
            largest = largest > (half & infinite) ? largest : (half & infinite);
        }
    else
        for (int64_t i = 0; i < n; i++) {
            uint16_t half = narrow(u[i], dtype);
            write_u16(w, i, half);
            largest = largest > (half & infinite) ? largest : (half & infinite);
        }
    return largest == infinite;
}

BODY int add_to_doubles(char *w, int64_t n, double scale, Words words)
{
    int is_infinite = 0;
    for (int64_t i = 0; i < n; i++) {
        double u = words.second ? to_normal(words.noise[i], words.second[i]) : (double)to_uniform(words.noise[i]);
        double new = read_f64(w, i) + u * scale;
        memcpy(w + 8 * i, &new, sizeof new);
        is_infinite |= !(fabs(new) <= 1.7976931348623157e308);
    }
    return is_infinite;
}

/* Sum 2 * h lanes by halves, in place: a fixed order that vectorizes. */
BODY double fold(double *t, int h)
{
    for (; h > 0; h /= 2)
        for (int i = 0; i < h; i++)
            t[i] += t[h + i];
    return t[0];
}

/* Sum what became of the first LANES elements of a block: change * drawn, drawn^2 and change^2. */
BODY void sum_effect(int dtype, const char *old, const char *w, int64_t n, double scale, Words words, double *out)
{
    double t[3][LANES] = {{0}};
    for (int64_t i = 0; i < n && i < LANES; i++) {
        double u = words.second ? to_normal(words.noise[i], words.second[i]) : (double)to_uniform(words.noise[i]);
        double change, drawn;
        if (dtype == F64) {
            change = read_f64(w, i) - read_f64(old, i);
            drawn = u * scale;
        } else {
            change = (double)(read_float(w, i, dtype) - read_float(old, i, dtype));
            drawn = (double)((float)u * (float)scale);
        }
        t[0][i] = change * drawn;
        t[1][i] = drawn * drawn;
        t[2][i] = change * change;
    }
    for (int j = 0; j < 3; j++)
        out[j] = fold(t[j], LANES / 2);
}

BODY void add_noise_to(int level, int dtype, char *w, int64_t n, uint64_t first_block, uint32_t k0, uint32_t k1,
                       double scale, int is_normal, int is_stochastic, double *out)
{
    const int width = dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
    uint32_t noise[4][LANES], second[4][LANES], rounding[4][LANES];
    char old[LANES * 8];
    for (uint64_t block = first_block; n > 0; block++, n -= BLOCK, w += BLOCK * width, out += 4) {
        int is_sampled = block % SAMPLED_BLOCKS == 0, is_infinite = 0;
        if (is_sampled)
            memcpy(old, w, (size_t)(n < LANES ? n : LANES) * width);
        draw(level, block * LANES, NOISE_STREAM, k0, k1, noise);
        if (is_normal)
            draw(level, block * LANES, SECOND_STREAM, k0, k1, second);
        if (is_stochastic)
            draw(level, block * LANES, ROUNDING_STREAM, k0, k1, rounding);
        for (int row = 0; row < 4 && n > row * LANES; row++) {
            Words words = {noise[row], is_normal ? second[row] : NULL, is_stochastic ? rounding[row] : NULL};
            char *run = w + row * LANES * width;
            int64_t count = n - row * LANES < LANES ? n - row * LANES : LANES;
            if (dtype == F64)
                is_infinite |= add_to_doubles(run, count, scale, words);
            else
                is_infinite |= add_to_floats(dtype, run, count, (float)scale, words);
        }
        memset(out, 0, 3 * sizeof *out);
        if (is_sampled) {
            Words words = {noise[0], is_normal ? second[0] : NULL, NULL};
            sum_effect(dtype, old, w, n, scale, words, out);
        }
        out[3] = is_infinite;
    }
}

/* -- sums over blocks ------------------------------------------------------------------------------------------- */

BODY double larger(double a, double b)
{
    return a > b ? a : b; /* unlike fmax it vectorizes, since it says nothing of NaN */
}

/* Of some pairs of elements: the sums of the squares of their changes, of x and of y, and the largest change. */
typedef struct {
    double change2, x2, y2, most;
} Pair;

/* What follows is written for the two types that values are computed in, VALUE, and the three integer types, INT, whose
 * order is that of the bits of the floats that they hold. A lane of a block is its four rows' elements i + k * LANES. */

#define FOR_VALUES(suffix, VALUE)                                                                                     \
    BODY double sum_lane_##suffix(const VALUE *x, double shift)                                                       \
    {                                                                                                                 \
        double d0 = (double)x[0] - shift, d1 = (double)x[LANES] - shift;                                              \
        double d2 = (double)x[2 * LANES] - shift, d3 = (double)x[3 * LANES] - shift;                                  \
        return (d0 + d1) + (d2 + d3);                                                                                 \
    }                                                                                                                 \
                                                                                                                      \
    BODY double square_lane_##suffix(const VALUE *x, double shift)                                                    \
    {                                                                                                                 \
        double d0 = (double)x[0] - shift, d1 = (double)x[LANES] - shift;                                              \
        double d2 = (double)x[2 * LANES] - shift, d3 = (double)x[3 * LANES] - shift;                                  \
        return (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);                                                             \
    }                                                                                                                 \
                                                                                                                      \
    /* Sum d = x - shift and d * d over a block in the contract's order: the rows, then the lanes by halves. */       \
    BODY void block_moments_##suffix(const VALUE *x, double shift, double *out)                                       \
    {                                                                                                                 \
        double t1[QUARTER], t2[QUARTER];                                                                              \
        for (int i = 0; i < QUARTER; i++) {                                                                           \
            const VALUE *a = x + i, *b = a + QUARTER, *c = b + QUARTER, *d = c + QUARTER;                             \
            t1[i] = (sum_lane_##suffix(a, shift) + sum_lane_##suffix(c, shift)) +                                     \
                    (sum_lane_##suffix(b, shift) + sum_lane_##suffix(d, shift));                                      \
            t2[i] = (square_lane_##suffix(a, shift) + square_lane_##suffix(c, shift)) +                               \
                    (square_lane_##suffix(b, shift) + square_lane_##suffix(d, shift));                                \
        }                                                                                                             \
        out[0] = fold(t1, QUARTER / 2);                                                                               \
        out[1] = fold(t2, QUARTER / 2);                                                                               \
    }                                                                                                                 \
                                                                                                                      \
    BODY Pair pair_lane_##suffix(const VALUE *x, const VALUE *y)                                                      \
    {                                                                                                                 \
        double x0 = (double)x[0], x1 = (double)x[LANES], x2 = (double)x[2 * LANES], x3 = (double)x[3 * LANES];        \
        double y0 = (double)y[0], y1 = (double)y[LANES], y2 = (double)y[2 * LANES], y3 = (double)y[3 * LANES];        \
        double d0 = y0 - x0, d1 = y1 - x1, d2 = y2 - x2, d3 = y3 - x3;                                                \
        Pair sums = {(d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3), (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3),            \
                     (y0 * y0 + y1 * y1) + (y2 * y2 + y3 * y3),                                                       \
                     larger(larger(fabs(d0), fabs(d1)), larger(fabs(d2), fabs(d3)))};                                 \
        return sums;                                                                                                  \
    }                                                                                                                 \
                                                                                                                      \
    /* Sum d * d, x * x and y * y of d = y - x over a block in the same order, and take the largest |d|. */           \
    BODY void block_changes_##suffix(const VALUE *x, const VALUE *y, double *out)                                     \
    {                                                                                                                 \
        double t[4][QUARTER], most = 0.0;                                                                             \
        for (int i = 0; i < QUARTER; i++) {                                                                           \
            Pair a = pair_lane_##suffix(x + i, y + i);                                                                \
            Pair b = pair_lane_##suffix(x + i + QUARTER, y + i + QUARTER);                                            \
            Pair c = pair_lane_##suffix(x + i + 2 * QUARTER, y + i + 2 * QUARTER);                                    \
            Pair d = pair_lane_##suffix(x + i + 3 * QUARTER, y + i + 3 * QUARTER);                                    \
            t[0][i] = (a.change2 + c.change2) + (b.change2 + d.change2);                                              \
            t[1][i] = (a.x2 + c.x2) + (b.x2 + d.x2);                                                                  \
            t[2][i] = (a.y2 + c.y2) + (b.y2 + d.y2);                                                                  \
            t[3][i] = larger(larger(a.most, c.most), larger(b.most, d.most));                                         \
        }                                                                                                             \
        for (int j = 0; j < 3; j++)                                                                                   \
            out[j] = fold(t[j], QUARTER / 2);                                                                         \
        for (int i = 0; i < QUARTER; i++)                                                                             \
            most = larger(most, t[3][i]);                                                                             \
        out[3] = most;                                                                                                \
    }

FOR_VALUES(f32, float)
FOR_VALUES(f64, double)

#define FOR_BITS(bits, suffix, INT, VALUE)                                                                            \
    BODY void load_##bits(int dtype, const char *w, int64_t n, VALUE padding, VALUE *x)                               \
    {                                                                                                                 \
        for (int64_t i = 0; i < n; i++)                                                                               \
            x[i] = dtype == F64 ? (VALUE)read_f64(w, i) : (VALUE)read_float(w, i, dtype);                             \
        for (int64_t i = n; i < BLOCK; i++)                                                                           \
            x[i] = padding;                                                                                           \
    }                                                                                                                 \
                                                                                                                      \
    BODY void moments_##bits(int dtype, const char *w, int64_t n, double shift, double *out)                          \
    {                                                                                                                 \
        for (VALUE x[BLOCK]; n > 0; n -= BLOCK, w += BLOCK * sizeof(INT), out += 2) {                                 \
            load_##bits(dtype, w, n < BLOCK ? n : BLOCK, (VALUE)shift, x);                                            \
            block_moments_##suffix(x, shift, out);                                                                    \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    BODY void summarize_##bits(int dtype, const char *w, int64_t n, double shift, int64_t inf64, double *out,         \
                               int64_t *keys, int64_t *counts)                                                        \
    {                                                                                                                 \
        const INT inf = (INT)inf64, mask = (INT)(((uint64_t)1 << (bits - 1)) - 1);                                    \
        for (VALUE x[BLOCK]; n > 0; n -= BLOCK, w += BLOCK * sizeof(INT), out += 2) {                                 \
            const int64_t count = n < BLOCK ? n : BLOCK;                                                              \
            INT low = mask, high = (INT)~mask;                                                                        \
            load_##bits(dtype, w, count, (VALUE)shift, x);                                                            \
            for (int64_t i = 0; i < count; i++) {                                                                     \
                INT v = read_##bits(w, i), key = v < 0 ? (INT)(v ^ mask) : v;                                         \
                low = key < low ? key : low;                                                                          \
                high = key > high ? key : high;                                                                       \
            }                                                                                                         \
            if (high >= inf || low < -inf) {                                                                          \
                low = mask, high = (INT)~mask;                                                                        \
                for (int64_t i = 0; i < count; i++) {                                                                 \
                    INT v = read_##bits(w, i), magnitude = v & mask, key = v < 0 ? (INT)(v ^ mask) : v;               \
                    if (magnitude >= inf) {                                                                           \
                        counts[magnitude == inf] += 1;                                                                \
                        x[i] = (VALUE)shift;                                                                          \
                    } else {                                                                                          \
                        low = key < low ? key : low;                                                                  \
                        high = key > high ? key : high;                                                               \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
            keys[0] = low < keys[0] ? low : keys[0];                                                                  \
            keys[1] = high > keys[1] ? high : keys[1];                                                                \
            block_moments_##suffix(x, shift, out);                                                                    \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    BODY void compare_##bits(int dtype, const char *a, const char *b, int64_t n, int64_t inf64, double *out,          \
                             int64_t *counts)                                                                         \
    {                                                                                                                 \
        const INT inf = (INT)inf64, mask = (INT)(((uint64_t)1 << (bits - 1)) - 1);                                    \
        VALUE x[BLOCK], y[BLOCK];                                                                                     \
        for (; n > 0; n -= BLOCK, a += BLOCK * sizeof(INT), b += BLOCK * sizeof(INT), out += 4) {                     \
            const int64_t count = n < BLOCK ? n : BLOCK;                                                              \
            INT largest = 0, changed = 0;                                                                             \
            load_##bits(dtype, a, count, 0, x);                                                                       \
            load_##bits(dtype, b, count, 0, y);                                                                       \
            for (int64_t i = 0; i < count; i++) {                                                                     \
                INT one = read_##bits(a, i), other = read_##bits(b, i);                                               \
                INT most = (one & mask) > (other & mask) ? (one & mask) : (other & mask);                             \
                changed += one != other;                                                                              \
                largest = most > largest ? most : largest;                                                            \
            }                                                                                                         \
            for (int64_t i = 0; largest >= inf && i < count; i++) {                                                   \
                INT one = read_##bits(a, i), other = read_##bits(b, i);                                               \
                if ((one & mask) >= inf || (other & mask) >= inf) {                                                   \
                    x[i] = y[i] = 0;                                                                                  \
                    counts[1] += one != other;                                                                        \
                    counts[2] += 1;                                                                                   \
                }                                                                                                     \
            }                                                                                                         \
            counts[0] += changed;                                                                                     \
            if (changed)                                                                                              \
                block_changes_##suffix(x, y, out);                                                                    \
            else {                                                                                                    \
                double sums[2];                                                                                       \
                block_moments_##suffix(x, 0.0, sums);                                                                 \
                out[0] = out[3] = 0.0;                                                                                \
                out[1] = out[2] = sums[1];                                                                            \
            }                                                                                                         \
        }                                                                                                             \
    }

READER(read_16, int16_t)
READER(read_32, int32_t)
READER(read_64, int64_t)
FOR_BITS(16, f32, int16_t, float)
FOR_BITS(32, f32, int32_t, float)
FOR_BITS(64, f64, int64_t, double)

BODY void moments_of(int level, int dtype, const char *w, int64_t n, double shift, double *out)
{
    (void)level;
    if (dtype == F64)
        moments_64(F64, w, n, shift, out);
    else if (dtype == F32)
        moments_32(F32, w, n, shift, out);
    else if (dtype == F16)
        moments_16(F16, w, n, shift, out);
    else
        moments_16(BF16, w, n, shift, out);
}

BODY void summarize_of(int level, int dtype, const char *w, int64_t n, double shift, double *out, int64_t *keys, int64_t *counts)
{
    (void)level;
    if (dtype == F64)
        summarize_64(F64, w, n, shift, 0x7FF0000000000000, out, keys, counts);
    else if (dtype == F32)
        summarize_32(F32, w, n, shift, 0x7F800000, out, keys, counts);
    else if (dtype == F16)
        summarize_16(F16, w, n, shift, 0x7C00, out, keys, counts);
    else
        summarize_16(BF16, w, n, shift, 0x7F80, out, keys, counts);
}

BODY void compare_of(int level, int dtype, const char *a, const char *b, int64_t n, double *out, int64_t *counts)
{
    (void)level;
    if (dtype == F64)
        compare_64(F64, a, b, n, 0x7FF0000000000000, out, counts);
    else if (dtype == F32)
        compare_32(F32, a, b, n, 0x7F800000, out, counts);
    else if (dtype == F16)
        compare_16(F16, a, b, n, 0x7C00, out, counts);
    else
        compare_16(BF16, a, b, n, 0x7F80, out, counts);
}

BODY void add_noise_of(int level, int dtype, char *w, int64_t n, uint64_t first_block, uint32_t k0, uint32_t k1,
                       double scale, int is_normal, int is_stochastic, double *out)
{
    if (dtype == F64)
        add_noise_to(level, F64, w, n, first_block, k0, k1, scale, is_normal, 0, out);
    else if (dtype == F32)
        add_noise_to(level, F32, w, n, first_block, k0, k1, scale, is_normal, 0, out);
    else if (dtype == F16)
        add_noise_to(level, F16, w, n, first_block, k0, k1, scale, is_normal, is_stochastic, out);
    else
        add_noise_to(level, BF16, w, n, first_block, k0, k1, scale, is_normal, is_stochastic, out);
}

/* -- Mixout's masks: m of element i is whether its word is below a threshold ------------------------------------- */

enum { STREAMS = 8, WARM_UP = 18 };

/* Write a block's words by eight generators SFC64 (Doty-Humphrey, PractRand) side by side, the low half of each number
 * first; V is N of the eight. */
#define DRAW_PAIRS(name, features, V, N)                                                                              \
    features static void name(uint64_t seed, uint64_t block, uint32_t words[BLOCK])                                   \
    {                                                                                                                 \
        V a[STREAMS / N], b[STREAMS / N], c[STREAMS / N];                                                             \
        for (int j = 0; j < STREAMS; j++) {                                                                           \
            const uint64_t start[3] = {seed, block * STREAMS + (uint64_t)j, 0x9E3779B97F4A7C15u};                     \
            memcpy((uint64_t *)a + j, &start[0], sizeof *start);                                                      \
            memcpy((uint64_t *)b + j, &start[1], sizeof *start);                                                      \
            memcpy((uint64_t *)c + j, &start[2], sizeof *start);                                                      \
        }                                                                                                             \
        for (int round = 0; round < WARM_UP + BLOCK / (2 * STREAMS); round++)                                         \
            for (int j = 0; j < STREAMS / N; j++) {                                                                   \
                const V drawn = a[j] + b[j] + (uint64_t)(round + 1);                                                  \
                a[j] = b[j] ^ (b[j] >> 11);                                                                           \
                b[j] = c[j] + (c[j] << 3);                                                                            \
                c[j] = ((c[j] << 24) | (c[j] >> 40)) + drawn;                                                         \
                if (round >= WARM_UP)                                                                                 \
                    memcpy(words + 2 * ((round - WARM_UP) * STREAMS + j * N), &drawn, sizeof drawn);                  \
            }                                                                                                         \
    }

#ifdef HAS_LEVELS
typedef uint64_t Two64 __attribute__((vector_size(16)));
typedef uint64_t Four64 __attribute__((vector_size(32)));
typedef uint64_t Eight64 __attribute__((vector_size(64)));
DRAW_PAIRS(draw_pairs_sse2, __attribute__((target("sse2"))), Two64, 2)
DRAW_PAIRS(draw_pairs_avx2, __attribute__((target("avx2"))), Four64, 4)
DRAW_PAIRS(draw_pairs_avx512, __attribute__((target("avx512f"))), Eight64, 8)
#else
DRAW_PAIRS(draw_pairs_one, , uint64_t, 1)
#endif

BODY void draw_pairs(int level, uint64_t seed, uint64_t block, uint32_t words[BLOCK])
{
#ifdef HAS_LEVELS
    if (level == AVX512)
        draw_pairs_avx512(seed, block, words);
    else if (level == AVX2)
        draw_pairs_avx2(seed, block, words);
    else
        draw_pairs_sse2(seed, block, words);
#else
    (void)level;
    draw_pairs_one(seed, block, words);
#endif
}

BODY void draw_mask_of(int level, uint64_t seed, uint32_t threshold, int64_t n, char *out)
{
    uint32_t words[BLOCK];
    for (uint64_t block = 0; n > 0; block++, n -= BLOCK, out += BLOCK) {
        char mask[BLOCK];
        draw_pairs(level, seed, block, words);
        for (int i = 0; i < BLOCK; i++)
            mask[i] = words[i] < threshold;
        memcpy(out, mask, (size_t)(n < BLOCK ? n : BLOCK));
    }
}

#define FOR_MASKED(suffix, VALUE)                                                                                     \
    /* of a run of a block; compilers vectorize it where they know how long it is */                                  \
    BODY void mix_run_##suffix(const char *w, const char *w_pre, const uint32_t *words, uint32_t threshold,           \
                               VALUE scale, int n, char *out)                                                         \
    {                                                                                                                 \
        for (int i = 0; i < n; i++) {                                                                                 \
            VALUE own = read_##suffix(w, i), pre = read_##suffix(w_pre, i);                                           \
            VALUE other = own + (own - pre) * (scale - 1);                                                            \
            VALUE mixed = words[i] < threshold ? other : pre;                                                         \
            memcpy(out + i * (int64_t)sizeof mixed, &mixed, sizeof mixed);                                            \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    BODY void gate_run_##suffix(const char *grad, const uint32_t *words, uint32_t threshold, VALUE scale, int n,      \
                                char *out)                                                                            \
    {                                                                                                                 \
        for (int i = 0; i < n; i++) {                                                                                 \
            VALUE passed = read_##suffix(grad, i) * scale;                                                            \
            VALUE gated = words[i] < threshold ? passed : 0;                                                          \
            memcpy(out + i * (int64_t)sizeof gated, &gated, sizeof gated);                                            \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    BODY void mix_##suffix(int level, const char *w, const char *w_pre, uint64_t seed, uint32_t threshold,            \
                           VALUE scale, int64_t n, char *out)                                                         \
    {                                                                                                                 \
        const int64_t step = BLOCK * (int64_t)sizeof(VALUE);                                                          \
        uint32_t words[BLOCK];                                                                                        \
        for (uint64_t block = 0; n > 0; block++, n -= BLOCK, w += step, w_pre += step, out += step) {                 \
            draw_pairs(level, seed, block, words);                                                                    \
            if (n >= BLOCK)                                                                                           \
                mix_run_##suffix(w, w_pre, words, threshold, scale, BLOCK, out);                                      \
            else                                                                                                      \
                mix_run_##suffix(w, w_pre, words, threshold, scale, (int)n, out);                                     \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    BODY void gate_##suffix(int level, const char *grad, uint64_t seed, uint32_t threshold, VALUE scale, int64_t n,   \
                            char *out)                                                                                \
    {                                                                                                                 \
        const int64_t step = BLOCK * (int64_t)sizeof(VALUE);                                                          \
        uint32_t words[BLOCK];                                                                                        \
        for (uint64_t block = 0; n > 0; block++, n -= BLOCK, grad += step, out += step) {                             \
            draw_pairs(level, seed, block, words);                                                                    \
            if (n >= BLOCK)                                                                                           \
                gate_run_##suffix(grad, words, threshold, scale, BLOCK, out);                                         \
            else                                                                                                      \
                gate_run_##suffix(grad, words, threshold, scale, (int)n, out);                                        \
        }                                                                                                             \
    }

FOR_MASKED(f32, float)
FOR_MASKED(f64, double)

BODY void mix_of(int level, int dtype, const char *w, const char *w_pre, uint64_t seed, uint32_t threshold, double scale,
                 int64_t n, char *out)
{
    if (dtype == F64)
        mix_f64(level, w, w_pre, seed, threshold, scale, n, out);
    else
        mix_f32(level, w, w_pre, seed, threshold, (float)scale, n, out);
}

BODY void gate_of(int level, int dtype, const char *grad, uint64_t seed, uint32_t threshold, double scale, int64_t n,
                  char *out)
{
    if (dtype == F64)
        gate_f64(level, grad, seed, threshold, scale, n, out);
    else
        gate_f32(level, grad, seed, threshold, (float)scale, n, out);
}

/* -- what is exported: `level` is at most surgery_level() ------------------------------------------------------- */

#ifdef HAS_LEVELS

EXPORT int surgery_level(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return __builtin_cpu_supports("avx2") ? AVX2 : BASE;
}

#define EXPORTED(name, parameters, arguments)                                                                         \
    static void name##_base parameters { name##_of arguments; }                                                       \
    __attribute__((target("avx2"))) static void name##_avx2 parameters { name##_of arguments; }                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) static void name##_avx512 parameters                \
    {                                                                                                                 \
        name##_of arguments;                                                                                          \
    }                                                                                                                 \
    EXPORT void surgery_##name parameters                                                                             \
    {                                                                                                                 \
        if (level == AVX512)                                                                                          \
            name##_avx512 arguments;                                                                                  \
        else if (level == AVX2)                                                                                       \
            name##_avx2 arguments;                                                                                    \
        else                                                                                                          \
            name##_base arguments;                                                                                    \
    }

#else

EXPORT int surgery_level(void)
{
    return BASE;
}

#define EXPORTED(name, parameters, arguments) \
    EXPORT void surgery_##name parameters { name##_of arguments; }

#endif

EXPORTED(moments, (int level, int dtype, const char *w, int64_t n, double shift, double *out),
         (level, dtype, w, n, shift, out))
EXPORTED(summarize,
         (int level, int dtype, const char *w, int64_t n, double shift, double *out, int64_t *keys, int64_t *counts),
         (level, dtype, w, n, shift, out, keys, counts))
EXPORTED(compare,
         (int level, int dtype, const char *a, const char *b, int64_t n, double *out, int64_t *counts),
         (level, dtype, a, b, n, out, counts))
EXPORTED(add_noise,
         (int level, int dtype, char *w, int64_t n, uint64_t first_block, uint32_t k0, uint32_t k1, double scale,
          int is_normal, int is_stochastic, double *out),
         (level, dtype, w, n, first_block, k0, k1, scale, is_normal, is_stochastic, out))
EXPORTED(draw_mask, (int level, uint64_t seed, uint32_t threshold, int64_t n, char *out), (level, seed, threshold, n, out))
EXPORTED(mix,
         (int level, int dtype, const char *w, const char *w_pre, uint64_t seed, uint32_t threshold, double scale,
          int64_t n, char *out),
         (level, dtype, w, w_pre, seed, threshold, scale, n, out))
EXPORTED(gate,
         (int level, int dtype, const char *grad, uint64_t seed, uint32_t threshold, double scale, int64_t n, char *out),
         (level, dtype, grad, seed, threshold, scale, n, out))

/* -- the sums of tensors in files, read as much at a time as stays in a core's cache ------------------------------ */

enum { CHUNK = 16 * BLOCK };

/* Fill `to` from a file. Returns 0 where that cannot be had, as on Windows, where threads share a file's position. */
static int read_at(int fd, char *to, int64_t nbytes, int64_t at)
{
#ifdef _WIN32
    (void)fd, (void)to, (void)at;
    return nbytes == 0;
#else
    while (nbytes > 0) {
        ssize_t got = pread(fd, to, (size_t)nbytes, (off_t)at);
        if (got == 0 || (got < 0 && errno != EINTR))
            return 0;
        if (got > 0)
            to += got, at += got, nbytes -= got;
    }
    return 1;
#endif
}

/* summarize the n elements at `at` in a file. Returns whether they could be read. */
EXPORT int surgery_summarize_file(int level, int dtype, int fd, int64_t at, int64_t n, double shift, double *out,
                                  int64_t *keys, int64_t *counts)
{
    const int width = dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
    char *chunk = malloc((size_t)CHUNK * width);
    int is_read = chunk != NULL;
    for (int64_t start = 0; is_read && start < n; start += CHUNK) {
        const int64_t count = n - start < CHUNK ? n - start : CHUNK;
        is_read = read_at(fd, chunk, count * width, at + start * width);
        if (is_read)
            surgery_summarize(level, dtype, chunk, count, shift, out + start / BLOCK * 2, keys, counts);
    }
    free(chunk);
    return is_read;
}

/* summarize the n elements at `at` in a file, and compare them with as many in another. Returns as above. */
EXPORT int surgery_compare_files(int level, int dtype, int fd, int64_t at, int other, int64_t other_at, int64_t n,
                                 double shift, double *out, int64_t *keys, int64_t *counts, double *pair_out,
                                 int64_t *pair_counts)
{
    const int width = dtype == F64 ? 8 : dtype == F32 ? 4 : 2;
    char *chunks = malloc((size_t)CHUNK * width * 2), *mine = chunks, *theirs = chunks + (size_t)CHUNK * width;
    int is_read = chunks != NULL;
    for (int64_t start = 0; is_read && start < n; start += CHUNK) {
        const int64_t count = n - start < CHUNK ? n - start : CHUNK;
        is_read = read_at(fd, mine, count * width, at + start * width) &&
                  read_at(other, theirs, count * width, other_at + start * width);
        if (is_read) {
            surgery_summarize(level, dtype, mine, count, shift, out + start / BLOCK * 2, keys, counts);
            surgery_compare(level, dtype, mine, theirs, count, pair_out + start / BLOCK * 4, pair_counts);
        }
    }
    free(chunks);
    return is_read;
}
