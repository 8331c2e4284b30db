/* CUDA's runtime: kernels that are compiled into torch, and graphs of launches. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>

/* ---- which function on the host stands for which kernel: registered as the library loads ---- */

struct kernel {
    const void *host;
    const char *name; /* mangled */
};
static struct kernel *kernels;
static int count, room, sorted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void **__cudaRegisterFatBinary(void *binary)
{
    static void *handle;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle)
{
}

void __cudaUnregisterFatBinary(void **handle)
{
}

void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external,
                       size_t size, int constant, int global)
{
}

void __cudaRegisterFunction(void **handle, const char *host, char *function, const char *name,
                            int limit, void *thread, void *block, void *bdim, void *gdim, int *size)
{
    if (count == room) {
        room = room ? 2 * room : 65536;
        kernels = realloc(kernels, room * sizeof *kernels);
    }
    kernels[count++] = (struct kernel){host, name};
}

static int by_host(const void *a, const void *b)
{
    const void *first = ((const struct kernel *)a)->host, *second = ((const struct kernel *)b)->host;
    return first < second ? -1 : first > second;
}

static const char *name_of(const void *host)
{
    pthread_mutex_lock(&lock);
    if (sorted != count) {
        qsort(kernels, count, sizeof *kernels, by_host);
        sorted = count;
    }
    struct kernel wanted = {host, NULL};
    struct kernel *found = bsearch(&wanted, kernels, count, sizeof *kernels, by_host);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unknown";
}

/* ---- launches: <<<grid, block>>> is a push, a pop and a launch ---- */

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream)
{
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}

cudaError_t CUDARTAPI __cudaGetKernel(cudaKernel_t *kernel, const void *host)
{
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}

static cudaError_t launch(const void *host, dim3 grid)
{
    record_launch("aten %s grid %u %u %u", name_of(host), grid.x, grid.y, grid.z);
    return cudaSuccess;
}

cudaError_t CUDARTAPI __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return launch(kernel, grid);
}

cudaError_t CUDARTAPI cudaLaunchKernel(
    const void *host, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    return launch(host, grid);
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(
    const cudaLaunchConfig_t *how, const void *host, void **arguments)
{
    return launch(host, how->gridDim);
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host)
{
    *found = (struct cudaFuncAttributes){0};
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 64;
    /* torch has kernels for 8.6 and none for 8.9, which runs them. */
    int capability = card()->major * 10 + card()->minor;
    found->binaryVersion = found->ptxVersion = capability == 89 ? 86 : capability;
    found->maxDynamicSharedSizeBytes = card()->shared_per_cta;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *host, int threads, size_t shared, unsigned flags)
{
    int fit = card()->threads_per_sm / (threads > 0 ? threads : 1);
    *blocks = fit > 8 ? 8 : fit < 1 ? 1 : fit;
    return cudaSuccess;
}

/* ---- graphs: what is launched while one is captured is written down as captured, and a replay is
   a line ---- */

extern int capturing;

cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    record("capture begins");
    capturing = 1;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    capturing = 0;
    record("capture ends");
    *graph = new_handle();
    return cudaSuccess;
}

static cudaError_t capture_status(enum cudaStreamCaptureStatus *status)
{
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    return capture_status(status);
}

cudaError_t CUDARTAPI cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count)
{
    if (id)
        *id = 1;
    if (count)
        *count = 0;
    return capture_status(status);
}

cudaError_t CUDARTAPI cudaGraphInstantiate(
    cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    record_launch("graph");
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    *count = 1; /* torch warns of an empty one */
    return cudaSuccess;
}
