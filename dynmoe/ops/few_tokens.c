// SwiGLU experts for few tokens, fp32, forward only: see few_tokens.py. Time goes into reading weights, each once, whatever
// the number of tokens; the vectors are those of GCC and clang, 512 bits on any machine.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST 8  // tokens at a time, whose sums stay in registers
typedef float lanes __attribute__((vector_size(4 * LANES)));

static inline lanes load(const float *p) {
    lanes value;
    memcpy(&value, p, sizeof value);
    return value;
}

static inline float total(lanes a) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += a[i];
    return sum;
}

// Products of two rows of weights with `count` rows of x, a constant wherever this is inlined.
static inline __attribute__((always_inline)) void products(int count, const float *w0, const float *w1, const float *const *x,
                                                           int64_t depth, float *out0, float *out1) {
    lanes sum0[MOST], sum1[MOST];
    memset(sum0, 0, sizeof sum0);
    memset(sum1, 0, sizeof sum1);
    int64_t i = 0;
    for (; i + LANES <= depth; i += LANES) {
        const lanes a = load(w0 + i), b = load(w1 + i);
        for (int m = 0; m < count; m++) {
            const lanes v = load(x[m] + i);
            sum0[m] += a * v;
            sum1[m] += b * v;
        }
    }
    for (int m = 0; m < count; m++) {
        float rest0 = total(sum0[m]), rest1 = total(sum1[m]);
        for (int64_t j = i; j < depth; j++) {
            rest0 += w0[j] * x[m][j];
            rest1 += w1[j] * x[m][j];
        }
        out0[m] = rest0;
        out1[m] = rest1;
    }
}

static inline void two_rows(int count, const float *w0, const float *w1, const float *const *x, int64_t depth, float *out0,
                            float *out1) {
    switch (count) {
        case 1: products(1, w0, w1, x, depth, out0, out1); break;
        case 2: products(2, w0, w1, x, depth, out0, out1); break;
        case 3: products(3, w0, w1, x, depth, out0, out1); break;
        case 4: products(4, w0, w1, x, depth, out0, out1); break;
        default: // rows beyond `count` repeat the last one
            products(MOST, w0, w1, x, depth, out0, out1);
    }
}

// Rows `row` and after of one expert, which ends at `end`: at most MOST of them, the last one repeated.
static inline int some(const float *base, const int64_t *index, int64_t row, int64_t end, int64_t stride, const float **x) {
    const int count = end - row < MOST ? (int)(end - row) : MOST;
    for (int m = 0; m < MOST; m++) {
        const int64_t own = row + (m < count ? m : count - 1);
        x[m] = base + (index ? index[own] : own) * stride;
    }
    return count;
}

// a = gate * silu(h1) * h2 for columns `first` to `last` of the experts' width: x [T, D], up [E, 2F, D], a [N, F].
void few_tokens_up(const float *x, const float *gates, const int64_t *token, const int32_t *ends, const float *up, float *a,
                   int64_t experts, int64_t depth, int64_t width, int64_t first, int64_t last) {
    const float *rows[MOST];
    float h1[MOST], h2[MOST];
    for (int64_t e = 0, row = 0; e < experts; e++) {
        for (int count; row < ends[e]; row += count) {
            count = some(x, token, row, ends[e], depth, rows);
            const float *w = up + e * 2 * width * depth;
            for (int64_t f = first; f < last; f++) {
                two_rows(count, w + f * depth, w + (width + f) * depth, rows, depth, h1, h2);
                for (int m = 0; m < count; m++)
                    a[(row + m) * width + f] = gates[row + m] * (h1[m] / (1.0f + expf(-h1[m])) * h2[m]);
            }
        }
    }
}

// Adds to y [T, D] the outputs of the experts in columns `first` to `last`: a [N, F], down [E, D, F].
void few_tokens_down(const float *a, const int64_t *token, const int32_t *ends, const float *down, float *y, int64_t experts,
                     int64_t depth, int64_t width, int64_t first, int64_t last) {
    const float *rows[MOST];
    float out0[MOST], out1[MOST];
    for (int64_t e = 0, row = 0; e < experts; e++) {
        for (int count; row < ends[e]; row += count) {
            count = some(a, 0, row, ends[e], width, rows);
            const float *w = down + e * depth * width;
            // Two rows far apart: of neighbors, a width of 1024 would put both at the same place of their page.
            const int64_t half = (last - first + 1) / 2;
            for (int64_t d = first; d < first + half; d++) {
                const int64_t next = d + half < last ? d + half : d;
                two_rows(count, w + d * width, w + next * width, rows, width, out0, out1);
                for (int m = 0; m < count; m++) {
                    float *own = y + token[row + m] * depth;
                    own[d] += out0[m];
                    if (next > d) own[next] += out1[m];
                }
            }
        }
    }
}
