/* cblas_{s,d,c}gemm, the three BLAS functions that MLX's CPU backend calls, forwarded to a library
 * that mlx_sora/runtime/blas.py found. That library counts in 64-bit integers (numpy's OpenBLAS), MLX
 * in 32-bit ones, so the sizes are widened on the way. Loaded with RTLD_GLOBAL before mlx.core, these
 * names come first in the dynamic linker's search and MLX's own reference BLAS is never called.
 *
 * Deliberately free of Python.h: it is opened by ctypes, and builds where only a C compiler exists. */

#include <stdint.h>

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

typedef void (*sgemm64)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t,
                        const float *, int64_t, float, float *, int64_t);
typedef void (*dgemm64)(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t,
                        const double *, int64_t, double, double *, int64_t);
typedef void (*cgemm64)(int, int, int, int64_t, int64_t, int64_t, const void *, const void *, int64_t,
                        const void *, int64_t, const void *, void *, int64_t);

static sgemm64 forward_s;
static dgemm64 forward_d;
static cgemm64 forward_c;
static uint64_t calls;

/* Addresses of the 64-bit functions; to be called once, before MLX is loaded. */
EXPORT void mlx_sora_blas_bind(void *s, void *d, void *c) {
    forward_s = (sgemm64)s;
    forward_d = (dgemm64)d;
    forward_c = (cgemm64)c;
}

/* How many products went through here: the proof that MLX uses this library. */
EXPORT uint64_t mlx_sora_blas_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }

static void count(void) { __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED); }

#if defined(__linux__)
EXPORT void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                        int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    count();
    forward_s(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha,
                        const double *a, int lda, const double *b, int ldb, double beta, double *c,
                        int ldc) {
    count();
    forward_d(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void *alpha,
                        const void *a, int lda, const void *b, int ldb, const void *beta, void *c,
                        int ldc) {
    count();
    forward_c(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
#endif
