/* The cards, and what they say of themselves.
 *
 * Memory is what cudaGetDeviceProperties reports on such a machine, a little less than what the
 * data sheet says; the rest is kernels/cards.py's, which names its sources
 * (tests/test_nullgpu.py holds the two together).
 */
#include "nullgpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIB 1024
#define MIB (1024 * 1024)

static const struct card CARDS[] = {
    /* key      name                     capability SMs  memory          shared: SM    CTA        threads L2        clock    memory   bus */
    {"a100-40", "NVIDIA A100-SXM4-40GB",    8, 0,   108, 42405855232,    164 * KIB, 163 * KIB,  2048,  40 * MIB, 1410000, 1215000, 5120},
    {"a100",    "NVIDIA A100-SXM4-80GB",    8, 0,   108, 85097971712,    164 * KIB, 163 * KIB,  2048,  40 * MIB, 1410000, 1593000, 5120},
    {"h100",    "NVIDIA H100 80GB HBM3",    9, 0,   132, 85520809984,    228 * KIB, 227 * KIB,  2048,  50 * MIB, 1980000, 2619000, 5120},
    {"h200",    "NVIDIA H200",              9, 0,   132, 150754820096,   228 * KIB, 227 * KIB,  2048,  50 * MIB, 1980000, 3201000, 6144},
    {"b200",    "NVIDIA B200",             10, 0,   148, 191503138816,   228 * KIB, 227 * KIB,  2048, 126 * MIB, 1965000, 3996000, 8192},
    {"4090",    "NVIDIA GeForce RTX 4090",  8, 9,   128, 25393692672,    100 * KIB,  99 * KIB,  1536,  72 * MIB, 2520000, 10501000, 384},
};

const struct card *card(void)
{
    static const struct card *chosen;
    if (chosen)
        return chosen;
    const char *key = getenv("NULLGPU_CARD");
    for (size_t i = 0; i < sizeof CARDS / sizeof *CARDS; i++)
        if (key && !strcmp(key, CARDS[i].key))
            return chosen = &CARDS[i];
    fprintf(stderr, "NULLGPU_CARD=%s: the cards are", key ? key : "");
    for (size_t i = 0; i < sizeof CARDS / sizeof *CARDS; i++)
        fprintf(stderr, " %s", CARDS[i].key);
    fprintf(stderr, "\n");
    exit(2);
}

int device_count(void)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *count = getenv("NULLGPU_COUNT");
    if (visible && !*visible) /* hidden from a run on the CPU */
        return 0;
    return count ? atoi(count) : 1;
}

int attribute(int number)
{
    switch (number) { /* enum cudaDeviceAttr, and CUdevice_attribute */
    case 1: return 1024; /* threads per block, and its sides */
    case 2: case 3: return 1024;
    case 4: return 64;
    case 5: return 0x7fffffff; /* sides of a grid */
    case 6: case 7: return 65535;
    case 8: return 48 * KIB; /* shared memory per block without opting in */
    case 10: return 32; /* threads per warp */
    case 12: case 82: return 65536; /* registers per block, per multiprocessor */
    case 13: return card()->clock;
    case 16: return card()->sms;
    case 36: return card()->memory_clock;
    case 37: return card()->bus;
    case 38: return card()->l2;
    case 39: return card()->threads_per_sm;
    case 41: case 83: case 95: return 1; /* unified addresses, managed memory, cooperative launch */
    case 75: return card()->major;
    case 76: return card()->minor;
    case 81: return card()->shared_per_sm;
    case 97: return card()->shared_per_cta;
    case 106: return 32; /* blocks per multiprocessor */
    }
    return 0;
}
