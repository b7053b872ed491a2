// Backward pass of the gated activation g * silu(h1) * h2, one pass over memory: see swiglu.py. Plain C that compilers
// vectorize; bf16 is read and written by its bits, arithmetic is in fp32.
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float read_bf16(uint16_t value) { return of_bits((uint32_t)value << 16); }

// Rounds to nearest, ties to even. A NaN stays one: adding to its bits could carry into the sign.
static inline uint16_t write_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value != value ? 0x7fc0u : (uint16_t)rounded;
}

static inline float read_fp32(float value) { return value; }
static inline float write_fp32(float value) { return value; }

// 1 / (1 + exp(-x)). exp is 2^n * exp(r) with |r| <= ln(2) / 2: ln(2) in two parts, Taylor polynomial of degree 7, whose
// relative error is below 1e-8. Below -87 the result is 0: exp(87) times a large x would not vanish.
static inline float sigmoid(float x) {
    float y = -x;
    y = y < 87.0f ? y : 87.0f;  // also for NaN: whoever multiplies by x gets it back
    y = y > -87.0f ? y : -87.0f;
    float n = rintf(y * 1.44269504f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float result = 1.0f / (1.0f + p * of_bits((uint32_t)((int32_t)n + 127) << 23));
    return x < -87.0f ? 0.0f : result;
}

// For each of `rows` rows of width F: h = [h1, h2] becomes the gradient of h, grad becomes the recomputed activation, and
// grad_gates gets <grad, silu(h1) * h2>.
#define DEFINE(TYPE, ELEMENT)                                                                                          \
    void swiglu_backward_##TYPE(ELEMENT *restrict h, const float *restrict gates, ELEMENT *restrict grad,              \
                                float *restrict grad_gates, int64_t rows, int64_t width) {                             \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            ELEMENT *restrict h1 = h + row * 2 * width;                                                                \
            ELEMENT *restrict h2 = h1 + width;                                                                         \
            ELEMENT *restrict g = grad + row * width;                                                                  \
            const float gate = gates[row];                                                                             \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < width; i++) {                               \
                const float a = read_##TYPE(h1[i]), b = read_##TYPE(h2[i]), d = read_##TYPE(g[i]);                     \
                const float s = sigmoid(a);                                                                            \
                const float silu = a * s;                                                                              \
                const float gated = d * gate;                                                                          \
                sum += d * (silu * b);                                                                                 \
                h1[i] = write_##TYPE(gated * b * (s * (1.0f + a * (1.0f - s))));                                       \
                h2[i] = write_##TYPE(gated * silu);                                                                    \
                g[i] = write_##TYPE(silu * b * gate);                                                                  \
            }                                                                                                          \
            grad_gates[row] = sum;                                                                                     \
        }                                                                                                              \
    }

DEFINE(bf16, uint16_t)
DEFINE(fp32, float)
