/* CUDA's runtime: memory and copies.
 *
 * torch's own caching allocator runs on top of this and does its own sums; what it asks for is
 * given as addresses alone, so 19 GB cost nothing. What was copied to the card comes back from it as
 * long as nothing was launched since, for so ranks exchange numbers; after a launch it is zero.
 */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* What the driver and the libraries keep for themselves on a card: an estimate. */
#define CONTEXT ((size_t)600 << 20)

struct block {
    char *start;
    size_t size;
};
static struct block *blocks;
static int count, room;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *reserve(size_t bytes, int protection)
{
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *start = mmap(0, bytes, protection, kind, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

void *device_alloc(size_t bytes)
{
    if (!bytes)
        bytes = 1;
    pthread_mutex_lock(&lock);
    void *start = NULL;
    if (used + bytes <= card()->memory - CONTEXT)
        start = reserve(bytes, PROT_NONE);
    if (start) {
        if (count == room) {
            room = room ? 2 * room : 1024;
            blocks = realloc(blocks, room * sizeof *blocks);
        }
        blocks[count++] = (struct block){start, bytes};
        used += bytes;
    }
    pthread_mutex_unlock(&lock);
    record(start ? "malloc %zu" : "full %zu", bytes);
    return start;
}

void device_free(void *pointer)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        if (blocks[i].start == pointer) {
            munmap(pointer, blocks[i].size);
            used -= blocks[i].size;
            blocks[i] = blocks[--count];
            break;
        }
    pthread_mutex_unlock(&lock);
}

int is_device(const void *pointer)
{
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count && !found; i++) {
        const char *start = blocks[i].start;
        found = (const char *)pointer >= start && (const char *)pointer < start + blocks[i].size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

size_t device_bytes_free(void)
{
    return card()->memory - CONTEXT - used;
}

cudaError_t CUDARTAPI cudaMalloc(void **pointer, size_t bytes)
{
    *pointer = device_alloc(bytes);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t CUDARTAPI cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream)
{
    return cudaMalloc(pointer, bytes);
}

cudaError_t CUDARTAPI cudaFree(void *pointer)
{
    device_free(pointer);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaHostAlloc(void **pointer, size_t bytes, unsigned flags)
{
    *pointer = reserve(bytes ? bytes : 1, PROT_READ | PROT_WRITE);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t CUDARTAPI cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *free_bytes = device_bytes_free();
    *total = card()->memory;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer)
{
    memset(found, 0, sizeof *found);
    if (is_device(pointer)) {
        found->type = cudaMemoryTypeDevice;
        found->devicePointer = (void *)pointer;
    }
    return cudaSuccess;
}

/* ---- copies ---- */

#define KEPT 64
#define LARGEST 65536 /* bytes */

static struct {
    const char *start;
    size_t size;
    char *bytes;
} kept[KEPT];
static int kept_count;

void forget_copies(void)
{
    pthread_mutex_lock(&lock);
    while (kept_count)
        free(kept[--kept_count].bytes);
    pthread_mutex_unlock(&lock);
}

/* The bytes that were copied to this place of the card, or NULL. Newer copies come first. */
static const char *kept_bytes(const void *place, size_t bytes)
{
    for (int i = kept_count - 1; i >= 0; i--) {
        size_t offset = (const char *)place - kept[i].start;
        if ((const char *)place >= kept[i].start && offset + bytes <= kept[i].size)
            return kept[i].bytes + offset;
    }
    return NULL;
}

static void keep(const void *place, const void *content, size_t bytes)
{
    if (!content || bytes > LARGEST || kept_count == KEPT)
        return;
    kept[kept_count].start = place;
    kept[kept_count].size = bytes;
    kept[kept_count].bytes = malloc(bytes);
    memcpy(kept[kept_count++].bytes, content, bytes);
}

static void copy(void *to, const void *from, size_t bytes)
{
    int to_device = is_device(to), from_device = is_device(from);
    record("copy %s%s %zu", from_device ? "d2" : "h2", to_device ? "d" : "h", bytes);
    pthread_mutex_lock(&lock);
    const char *content = from_device ? kept_bytes(from, bytes) : from;
    if (to_device)
        keep(to, content, bytes);
    else if (content)
        memmove(to, content, bytes);
    else
        memset(to, 0, bytes);
    pthread_mutex_unlock(&lock);
}

cudaError_t CUDARTAPI cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    copy(to, from, bytes);
    record("wait copy");
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemcpyAsync(
    void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    copy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemset(void *start, int value, size_t bytes)
{
    record_launch("memset %zu", bytes);
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream)
{
    record_launch("memset %zu", bytes);
    return cudaSuccess;
}
