"""Decoding steps in C, as text: float32, one thread, for any compiler of C99.

Loops along memory are written for a compiler to make vectors of them; sums are the ones that are marked (`simd
reduction`). The window is laid out tap by tap, (b, k, c); everything else lies as torch has it, and rows of what is
projected may be apart (`*_row`).
"""

SOURCE = r"""
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* exp with an error below 2 units in the last place, which compilers make vectors of: 2^n times a polynomial. A NaN
   stays one. */
static inline float exp_of(float x) {
    float in = x > 88.0f ? 88.0f : x;
    in = in < -87.0f ? -87.0f : in;
    float n = in * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f;
    float r = in - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int i; float f; } scale;
    scale.i = ((int)n + 127) << 23;
    float result = p * scale.f;
    return x < -87.0f ? 0.0f : (x > 88.0f ? INFINITY : result);
}

static inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

static inline float softplus_of(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

static void convolve(float *restrict y, float *restrict window, const float *restrict in, const float *restrict weight,
                     const float *restrict bias, long channels, long taps, int silu) {
    for (long c = 0; c < channels; c++) y[c] = bias ? bias[c] : 0.0f;
    for (long j = 0; j < taps; j++) {
        float *restrict here = window + j * channels;
        const float *from = j + 1 < taps ? here + channels : in;
        for (long c = 0; c < channels; c++) {
            float value = from[c];
            here[c] = value;
            y[c] += value * weight[c * taps + j];
        }
    }
    if (silu)
        for (long c = 0; c < channels; c++) y[c] *= sigmoid_of(y[c]);
}

static float one_by_root_of_mean_square(const float *x, long n, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

int ssd_step(float *window, float *state, const float *in, const float *gate, const float *raw, const float *weight,
             const float *bias, const float *A_log, const float *dt_bias, const float *D, const float *gate_bias,
             const float *norm_weight, const unsigned char *real, float *out, long batch, long channels, long taps,
             long heads, long dim, long size, long groups, long in_row, long gate_row, long raw_row, int silu,
             float eps) {
    long inner = heads * dim;
    float *y = malloc(channels * sizeof(float));
    if (!y) return 1;
    for (long b = 0; b < batch; b++, window += taps * channels, state += inner * size, out += inner) {
        if (real && !real[b]) {
            memset(out, 0, inner * sizeof(float));
            continue;
        }
        convolve(y, window, in + b * in_row, weight, bias, channels, taps, silu);
        for (long h = 0; h < heads; h++) {
            const float *restrict B = y + inner + h / (heads / groups) * size;
            const float *restrict C = B + groups * size;
            float a = raw[b * raw_row + h], dt = 1.0f, decay;
            if (A_log) {
                dt = softplus_of(dt_bias ? a + dt_bias[h] : a);
                decay = expf(-dt * expf(A_log[h]));
            } else {
                decay = expf(-softplus_of(a));
            }
            for (long i = h * dim; i < (h + 1) * dim; i++) {
                float *restrict S = state + i * size;
                float x = y[i], scaled = x * dt, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (long n = 0; n < size; n++) {
                    float s = S[n] * decay + scaled * B[n];
                    S[n] = s;
                    sum += s * C[n];
                }
                out[i] = D ? sum + D[h] * x : sum;
            }
        }
        const float *restrict z = gate + b * gate_row;
        for (long i = 0; i < inner; i++) {
            float g = gate_bias ? z[i] + gate_bias[i] : z[i];
            out[i] *= g * sigmoid_of(g);
        }
        if (norm_weight)
            for (long g = 0, width = inner / groups; g < groups; g++) {
                float scale = one_by_root_of_mean_square(out + g * width, width, eps);
                for (long i = g * width; i < (g + 1) * width; i++) out[i] *= scale * norm_weight[i];
            }
    }
    free(y);
    return 0;
}

int delta_step(float *window, float *state, const float *in, const float *gate, const float *beta, const float *raw,
               const float *weight, const float *bias, const float *A_log, const float *dt_bias,
               const float *norm_weight, const unsigned char *real, float *out, long batch, long channels, long taps,
               long heads, long key, long dim, long groups, long in_row, long gate_row, long beta_row, long raw_row,
               int by_channel, int sigmoid, float eps) {
    long inner = heads * dim;
    float *y = malloc((channels + dim) * sizeof(float));
    if (!y) return 1;
    float *restrict held = y + channels;
    for (long b = 0; b < batch; b++, window += taps * channels, state += inner * key, out += inner) {
        if (real && !real[b]) {
            memset(out, 0, inner * sizeof(float));
            continue;
        }
        convolve(y, window, in + b * in_row, weight, bias, channels, taps, 1);
        for (long g = 0; g < 2 * groups; g++) {
            float *x = y + g * key, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long n = 0; n < key; n++) sum += x[n] * x[n];
            float scale = 1.0f / sqrtf(sum + 1e-6f);
            if (g < groups) scale /= sqrtf((float)key);
            for (long n = 0; n < key; n++) x[n] *= scale;
        }
        for (long h = 0; h < heads; h++) {
            const float *q = y + h / (heads / groups) * key, *k = q + groups * key;
            const float *restrict v = y + 2 * groups * key + h * dim, *restrict z = gate + b * gate_row + h * dim;
            float *restrict o = out + h * dim;
            float decay = 1.0f, share = sigmoid_of(beta[b * beta_row + h]);
            if (A_log) {
                float a = raw[b * raw_row + h];
                decay = expf(-expf(A_log[h]) * softplus_of(dt_bias ? a + dt_bias[h] : a));
            } else if (!by_channel) {
                decay = expf(raw[b * raw_row + h]);
            }
            memset(held, 0, dim * sizeof(float));
            memset(o, 0, dim * sizeof(float));
            for (long n = 0; n < key; n++) {
                float *restrict S = state + (h * key + n) * dim;
                float d = by_channel ? expf(raw[b * raw_row + h * key + n]) : decay, by = k[n];
                for (long i = 0; i < dim; i++) {
                    S[i] *= d;
                    held[i] += S[i] * by;
                }
            }
            for (long i = 0; i < dim; i++) held[i] = share * (v[i] - held[i]);
            for (long n = 0; n < key; n++) {
                float *restrict S = state + (h * key + n) * dim;
                float by = k[n], read = q[n];
                for (long i = 0; i < dim; i++) {
                    S[i] += by * held[i];
                    o[i] += S[i] * read;
                }
            }
            float scale = one_by_root_of_mean_square(o, dim, eps);
            for (long i = 0; i < dim; i++) {
                float s = sigmoid_of(z[i]);
                o[i] *= scale * norm_weight[i] * (sigmoid ? s : z[i] * s);
            }
        }
    }
    free(y);
    return 0;
}
"""
