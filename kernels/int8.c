/* Products of few rows by a matrix of 8-bit whole numbers: kernels/int8.py compiles and calls it.

       y[n][o] = scale[o] * sum_c x[n][c] w[o][c] + bias[o]        in fp32, the sums too

   N rows x of C numbers, O outputs. To read w is what takes the time, so it is read once, row by row
   as it lies, and asked for a page ahead, into the L2 cache: the memory's own prefetch ends with each
   page, and what is asked for into L1 takes the few places of what is loaded. (The blocks of 1558M
   on two Zen 4 cores: 22 GB/s without, 21 into L1, 32 into L2, which is all that a sum reads.) */

#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 lanes;
static inline lanes zeros(void) { return _mm512_setzero_ps(); }
static inline lanes reals(const int8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}
static inline lanes add_product(lanes sums, const float *x, lanes w) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(x), w, sums);
}
static inline float total(lanes sums) { return _mm512_reduce_add_ps(sums); }
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
typedef __m256 lanes;
static inline lanes zeros(void) { return _mm256_setzero_ps(); }
static inline lanes reals(const int8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}
static inline lanes add_product(lanes sums, const float *x, lanes w) {
    return _mm256_fmadd_ps(_mm256_loadu_ps(x), w, sums);
}
static inline float total(lanes sums) {
    float part[LANES];
    _mm256_storeu_ps(part, sums);
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}
#else
#error it is written for x86 CPUs with AVX2 or AVX-512, and this one has neither
#endif

#define CHAINS 4      /* sums side by side, as an addition waits for the one before it: no fewer */
#define AHEAD 4096    /* bytes: 2,048 gave 27 GB/s there, 16,384 no more */

void int8_product(const int8_t *w, const float *scale, const float *bias, const float *x, float *y,
                  long N, long C, long O, int threads)
{
    const long at_once = CHAINS * LANES, whole = C / at_once * at_once;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < O; o++) {
        const int8_t *row = w + o * C;
        for (long n = 0; n < N; n++) {
            const float *xn = x + n * C;
            lanes sums[CHAINS];
            for (int i = 0; i < CHAINS; i++)
                sums[i] = zeros();
            for (long c = 0; c < whole; c += at_once) { /* a cache line, or half of one */
                if (n == 0)
                    __builtin_prefetch(row + c + AHEAD, 0, 2);
                for (int i = 0; i < CHAINS; i++)
                    sums[i] = add_product(sums[i], xn + c + i * LANES, reals(row + c + i * LANES));
            }
            float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
            for (long c = whole; c < C; c++)
                sum += xn[c] * row[c];
            y[n * O + o] = sum * scale[o] + (bias ? bias[o] : 0);
        }
    }
}
