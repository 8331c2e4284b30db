/* The log: a line for each thing that the card was asked to do, in the order of the calls. */
#include "nullgpu.h"

#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int capturing; /* launch.c: whether a graph is being captured */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void record(const char *format, ...)
{
    static FILE *log;
    va_list arguments;

    pthread_mutex_lock(&lock);
    const char *path = getenv("NULLGPU_LOG");
    if (!log && path)
        log = fopen(path, "a");
    if (log) {
        if (capturing)
            fputs("captured ", log);
        va_start(arguments, format);
        vfprintf(log, format, arguments);
        va_end(arguments);
        fputc('\n', log);
        fflush(log); /* the process may end in any way */
    }
    pthread_mutex_unlock(&lock);
}

/* A line from Python: ctypes.CDLL(None).nullgpu_mark(b"step"). */
void nullgpu_mark(const char *text)
{
    record("mark %s", text);
}

static size_t elf_size(const Elf64_Ehdr *header)
{
    size_t end = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
    return programs > end ? programs : end;
}

void keep_cubin(const void *elf)
{
    const char *folder = getenv("NULLGPU_CUBINS");
    const unsigned char *bytes = elf;
    if (!folder || memcmp(bytes, ELFMAG, SELFMAG))
        return;
    size_t size = elf_size(elf);
    unsigned long hash = 14695981039346656037ul; /* FNV-1a: one file for each distinct kernel */
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 1099511628211ul;
    char path[4096];
    snprintf(path, sizeof path, "%s/%016lx.cubin", folder, hash);
    if (!access(path, F_OK))
        return;
    FILE *file = fopen(path, "wb");
    if (!file)
        return;
    fwrite(bytes, 1, size, file);
    fclose(file);
}
