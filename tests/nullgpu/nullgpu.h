/* A stand-in for a GPU: what the C files of this folder share. docs/cuda_check.md says what it is.
 *
 * Three libraries in one: CUDA's runtime (runtime.c, memory.c, launch.c), its driver (driver.c) and
 * cuBLAS (cublas.c). Loaded before the real ones it answers every call, allocates memory up to the
 * card's size, writes down what it is asked to do, and computes nothing. What the six files don't
 * define does nothing either: build.py makes those functions from what torch's libraries ask for.
 */
#ifndef NULLGPU_H
#define NULLGPU_H

#include <stddef.h>

struct card {
    const char *key;           /* as NULLGPU_CARD and kernels/cards.py call it */
    const char *name;          /* as the card calls itself */
    int major, minor;          /* compute capability */
    int sms;                   /* streaming multiprocessors */
    size_t memory;             /* bytes */
    int shared_per_sm;         /* bytes */
    int shared_per_cta;        /* bytes, the most that a kernel can opt into */
    int threads_per_sm;
    int l2;                    /* bytes */
    int clock, memory_clock;   /* kHz */
    int bus;                   /* bits */
};

/* The card that the environment's NULLGPU_CARD names; ends the process where it names none. */
const struct card *card(void);

/* How many of it a process sees. */
int device_count(void);

/* What cudaDeviceGetAttribute and cuDeviceGetAttribute, which share their numbers, answer. */
int attribute(int number);

/* Adds a line to the file that NULLGPU_LOG names. Work between the beginning and the end of a graph
 * capture is written down with "captured " before it. */
void record(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Device memory: addresses that nobody can read. NULL where the card is full. */
void *device_alloc(size_t bytes);
void device_free(void *pointer);
int is_device(const void *pointer);
size_t device_bytes_free(void);

/* What was copied to the card is gone: it may have computed something else in its place. */
void forget_copies(void);

/* A line of the log for work that the card would do. */
#define record_launch(...) (forget_copies(), record(__VA_ARGS__))

/* Handles of streams, events and modules: numbers that differ. */
void *new_handle(void);

/* Keeps a compiled kernel (an ELF file in memory) in the folder that NULLGPU_CUBINS names. */
void keep_cubin(const void *elf);

#endif
