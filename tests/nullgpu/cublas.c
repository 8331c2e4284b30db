/* cuBLAS and cuBLASLt: matrix products, written down with their sizes.
 *
 * Of each function's parameters those are named that are read; C passes the rest unread.
 */
#include "nullgpu.h"

#include <stdlib.h>
#include <string.h>

static long handle;

int cublasCreate_v2(void **created)
{
    *created = &handle;
    return 0;
}

int cublasGetMathMode(void *h, int *mode)
{
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *h, int *mode)
{
    *mode = 0;
    return 0;
}

int cublasGemmEx(void *h, int transpose_a, int transpose_b, int m, int n, int k)
{
    record_launch("gemm %d %d %d", m, n, k);
    return 0;
}

int cublasSgemm_v2(void *h, int transpose_a, int transpose_b, int m, int n, int k)
{
    record_launch("gemm %d %d %d", m, n, k);
    return 0;
}

int cublasDgemm_v2(void *h, int transpose_a, int transpose_b, int m, int n, int k)
{
    record_launch("gemm %d %d %d", m, n, k);
    return 0;
}

int cublasGemmStridedBatchedEx(void *h, int transpose_a, int transpose_b, int m, int n, int k)
{
    record_launch("gemm %d %d %d", m, n, k);
    return 0;
}

/* ---- cuBLASLt: a matrix is described by a layout ---- */

struct layout {
    unsigned long rows, columns;
};

int cublasLtMatmulDescCreate(void **created, int compute, int scale)
{
    *created = &handle;
    return 0;
}

int cublasLtMatmulPreferenceCreate(void **created)
{
    *created = &handle;
    return 0;
}

int cublasLtMatrixLayoutCreate(void **created, int type, unsigned long rows, unsigned long columns)
{
    struct layout *layout = malloc(sizeof *layout);
    *layout = (struct layout){rows, columns};
    *created = layout;
    return 0;
}

int cublasLtMatrixLayoutDestroy(void *layout)
{
    free(layout);
    return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *h, void *what, void *a, void *b, void *c, void *d, void *e,
                                   int wanted, void *results, int *found)
{
    memset(results, 0, 64); /* one cublasLtMatmulHeuristicResult_t: it works, and needs no memory */
    *found = 1;
    return 0;
}

int cublasLtMatmul(void *h, void *what, void *alpha, void *a, struct layout *of_a, void *b,
                   struct layout *of_b, void *beta, void *c, struct layout *of_c)
{
    record_launch("gemm %lu %lu %lu x %lu", of_c->rows, of_c->columns, of_a->rows, of_a->columns);
    return 0;
}

unsigned long cublasLtGetVersion(void)
{
    return 130000;
}
