"""What each GPU can do: rates and limits from its maker's own papers.

    from kernels.cards import CARDS, by_name
    CARDS["h100"].bf16_flops                     # 989.4e12
    by_name(torch.cuda.get_device_name())        # Card, or None for a card not listed

Rates are dense (no sparsity), with fp32 accumulation, at the boost clock: the peak a maker
prints, which no kernel reaches. GB is 10^9 bytes, KiB and MiB are powers of two. Links are per
GPU and per direction (makers print the sum of both directions).

Sources, by the letter used beside the figures:
  [A] NVIDIA A100 data sheet (June 2021) and "A100 Tensor Core GPU Architecture" (2020)
  [H] NVIDIA H100 data sheet and "H100 Tensor Core GPU Architecture" (2022), H200 data sheet (2024)
  [B] NVIDIA HGX and DGX B200 data sheets (2024), eight GPUs divided by eight
  [S] NVIDIA GH200 Grace Hopper Superchip data sheet (2023), which rounds its chip's 989.4 to 990
  [G] NVIDIA "Ampere GA102 GPU Architecture" v2 (2021), RTX A6000 in its appendix; A10 data sheet
  [L] NVIDIA "Ada GPU Architecture" v2 (2023), RTX 6000 in its appendix; L4 and L40S data sheets
  [X] NVIDIA "RTX Blackwell GPU Architecture" v1.1 (2025)
  [W] NVIDIA "RTX Blackwell PRO GPU Architecture" (2025), RTX PRO 6000 Workstation Edition
  [T] NVIDIA "Turing GPU Architecture" (2018), T4 data sheet (2019)
  [M] AMD Instinct MI300X data sheet (2023), AMD CDNA 3 white paper (2023)
  [C] CUDA C++ Programming Guide 13, "Technical Specifications per Compute Capability"
  [P] PCI Express: 16 lanes at 8 GT/s (gen 3) 15.75 GB/s, at 16 (gen 4) 31.5, at 32 (gen 5) 63
      GB/s, 128b/130b
"""

from dataclasses import dataclass, replace

KIB, MIB, GB, TERA = 2**10, 2**20, 10**9, 10**12

PCIE3, PCIE4, PCIE5 = 15.75e9, 31.5e9, 63e9  # bytes/s per direction, 16 lanes [P]

# What a rented node usually carries, per GPU. Every cluster differs: a planner's default.
ETHERNET_10G, INFINIBAND_200G, INFINIBAND_400G = 1.25e9, 25e9, 50e9  # bytes/s


@dataclass(frozen=True)
class Card:
    """One GPU. FLOP/s, bytes and bytes/s, all plain numbers without prefix."""

    key: str  # how people write it: --plan 8xh100
    names: tuple[str, ...]  # torch.cuda.get_device_name(), without the maker
    arch: str  # what Triton compiles for: sm_90, gfx942
    bf16_flops: float  # tensor cores, bf16 or fp16 in (before sm_80 fp16 alone), fp32 accumulation
    tf32_flops: float  # tensor cores, fp32 in, 10 bits of mantissa kept; 0: there is no such mode
    fp32_flops: float  # CUDA cores
    memory_bytes: int  # as printed; the driver reports up to 7 % more and keeps some for itself
    memory_bandwidth: float  # bytes/s
    sms: int  # streaming multiprocessors (AMD: compute units)
    clock_hz: float  # boost clock of the tensor cores, at which bf16_flops holds
    l2_bytes: int
    shared_per_cta: int  # bytes one thread block can ask for
    shared_per_sm: int
    registers_per_sm: int  # of 32 bits
    warps_per_sm: int  # resident at once (of 32 lanes; AMD: of 64)
    ctas_per_sm: int
    link_bandwidth: float  # bytes/s to the other GPUs of the node, per direction
    link: str  # what that link is
    network_bandwidth: float  # bytes/s to other nodes, per GPU and direction: a default

    @property
    def fp16_flops(self) -> float:
        """The same tensor cores at the same rate as bf16, on every card listed."""
        return self.bf16_flops

    @property
    def has_bf16(self) -> bool:
        """Whether its tensor cores take bf16, and the Triton kernels run on it: from sm_80 on."""
        return self.arch != "sm_75"


_AMPERE = dict(  # sm_80 [C]
    shared_per_cta=163 * KIB,
    shared_per_sm=164 * KIB,
    registers_per_sm=65536,
    warps_per_sm=64,
    ctas_per_sm=32,
)
_HOPPER = _AMPERE | dict(shared_per_cta=227 * KIB, shared_per_sm=228 * KIB)  # sm_90, sm_100 [C]
_TURING = dict(  # sm_75 [C]
    shared_per_cta=64 * KIB,
    shared_per_sm=64 * KIB,
    registers_per_sm=65536,
    warps_per_sm=32,
    ctas_per_sm=16,
)
_CONSUMER = dict(  # sm_86, sm_89, sm_120 [C]
    shared_per_cta=99 * KIB,
    shared_per_sm=100 * KIB,
    registers_per_sm=65536,
    warps_per_sm=48,
)

_A100 = Card(
    key="a100",
    names=("A100-SXM4-80GB",),
    arch="sm_80",
    bf16_flops=312 * TERA,  # [A]
    tf32_flops=156 * TERA,  # [A]
    fp32_flops=19.5 * TERA,  # [A]
    memory_bytes=80 * GB,  # [A]
    memory_bandwidth=2039e9,  # [A]
    sms=108,  # [A]
    clock_hz=1.41e9,  # [A]
    l2_bytes=40 * MIB,  # [A]
    link_bandwidth=300e9,  # 600 GB/s both ways [A]
    link="NVLink 3",
    network_bandwidth=INFINIBAND_200G,  # DGX A100: eight 200 Gb/s adapters for eight GPUs
    **_AMPERE,
)
_H100 = Card(
    key="h100",
    names=("H100 80GB HBM3",),
    arch="sm_90",
    bf16_flops=989.4 * TERA,  # SXM5 [H]
    tf32_flops=494.7 * TERA,  # [H]
    fp32_flops=66.9 * TERA,  # [H]
    memory_bytes=80 * GB,  # [H]
    memory_bandwidth=3352e9,  # [H]
    sms=132,  # [H]
    clock_hz=1.83e9,  # of the tensor cores; fp32_flops is at 1.98e9 [H]
    l2_bytes=50 * MIB,  # [H]
    link_bandwidth=450e9,  # 900 GB/s both ways [H]
    link="NVLink 4",
    network_bandwidth=INFINIBAND_400G,  # DGX H100: eight 400 Gb/s adapters for eight GPUs
    **_HOPPER,
)

_ALL = (
    _A100,
    replace(
        _A100,
        key="a100-40gb",
        names=("A100-SXM4-40GB",),
        memory_bytes=40 * GB,  # [A]
        memory_bandwidth=1555e9,  # [A]
    ),
    _H100,
    replace(
        _H100,
        key="h200",
        names=("H200",),
        memory_bytes=141 * GB,  # [H]
        memory_bandwidth=4800e9,  # [H]
    ),
    replace(
        _H100,
        key="gh200",
        names=("GH200 480GB",),  # 480 GB are Grace's; link_bandwidth is NVLink's, where it's wired
        memory_bytes=96 * GB,  # the one with HBM3 [S]
        memory_bandwidth=4000e9,  # [S]
    ),
    Card(
        key="b200",
        names=("B200",),
        arch="sm_100",
        bf16_flops=2250 * TERA,  # 36 PFLOP/s with sparsity for eight, halved [B]
        tf32_flops=1125 * TERA,  # 18 PFLOP/s with sparsity for eight, halved [B]
        fp32_flops=75 * TERA,  # 600 TFLOP/s for eight [B]
        memory_bytes=180 * GB,  # 1,440 GB for eight [B]
        memory_bandwidth=8000e9,  # 64 TB/s for eight [B]
        sms=148,  # cudaDeviceProp.multiProcessorCount
        clock_hz=1.85e9,  # 2250e12 / (148 SMs * 8192 FLOP)
        l2_bytes=126 * MIB,  # cudaDeviceProp.l2CacheSize
        link_bandwidth=900e9,  # 14.4 TB/s both ways for eight [B]
        link="NVLink 5",
        network_bandwidth=INFINIBAND_400G,  # DGX B200: eight 400 Gb/s adapters for eight GPUs
        **_HOPPER,
    ),
    Card(
        key="3090",
        names=("GeForce RTX 3090",),
        arch="sm_86",
        bf16_flops=71 * TERA,  # [G]
        tf32_flops=35.6 * TERA,  # [G]
        fp32_flops=35.6 * TERA,  # [G]
        memory_bytes=24 * GB,  # [G]
        memory_bandwidth=936e9,  # [G]
        sms=82,  # [G]
        clock_hz=1.695e9,  # [G]
        l2_bytes=6 * MIB,  # [G]
        ctas_per_sm=16,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="a10",
        names=("A10",),
        arch="sm_86",
        bf16_flops=125 * TERA,  # [G]
        tf32_flops=62.5 * TERA,  # [G]
        fp32_flops=31.2 * TERA,  # [G]
        memory_bytes=24 * GB,  # [G]
        memory_bandwidth=600e9,  # [G]
        sms=72,  # [G]
        clock_hz=1.695e9,  # [G]
        l2_bytes=6 * MIB,  # [G]
        ctas_per_sm=16,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="a6000",
        names=("RTX A6000",),
        arch="sm_86",
        bf16_flops=154.8 * TERA,  # [G]
        tf32_flops=77.4 * TERA,  # [G]
        fp32_flops=38.7 * TERA,  # [G]
        memory_bytes=48 * GB,  # [G]
        memory_bandwidth=768e9,  # [G]
        sms=84,  # [G]
        clock_hz=1.8e9,  # [G]
        l2_bytes=6 * MIB,  # [G]
        ctas_per_sm=16,  # [C]
        link_bandwidth=PCIE4,  # a bridge joins two of them at 56 GB/s [G]; not counted
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="4090",
        names=("GeForce RTX 4090",),
        arch="sm_89",
        bf16_flops=165.2 * TERA,  # [L]
        tf32_flops=82.6 * TERA,  # [L]
        fp32_flops=82.6 * TERA,  # [L]
        memory_bytes=24 * GB,  # [L]
        memory_bandwidth=1008e9,  # [L]
        sms=128,  # [L]
        clock_hz=2.52e9,  # [L]
        l2_bytes=72 * MIB,  # [L]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="l40s",
        names=("L40S",),
        arch="sm_89",
        bf16_flops=362.05 * TERA,  # [L]
        tf32_flops=183 * TERA,  # [L]
        fp32_flops=91.6 * TERA,  # [L]
        memory_bytes=48 * GB,  # [L]
        memory_bandwidth=864e9,  # [L]
        sms=142,  # [L]
        clock_hz=2.52e9,  # [L]
        l2_bytes=96 * MIB,  # [L]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="l4",
        names=("L4",),
        arch="sm_89",
        bf16_flops=121 * TERA,  # 242 with sparsity, halved [L]
        tf32_flops=60 * TERA,  # 120 with sparsity, halved [L]
        fp32_flops=30.3 * TERA,  # [L]
        memory_bytes=24 * GB,  # [L]
        memory_bandwidth=300e9,  # [L]
        sms=58,  # 7,424 CUDA cores of 128 an SM
        clock_hz=2.04e9,  # [L]
        l2_bytes=48 * MIB,  # [L]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="rtx-6000-ada",
        names=("RTX 6000 Ada Generation",),
        arch="sm_89",
        bf16_flops=364.2 * TERA,  # [L]
        tf32_flops=182.1 * TERA,  # [L]
        fp32_flops=91.1 * TERA,  # [L]
        memory_bytes=48 * GB,  # [L]
        memory_bandwidth=960e9,  # [L]
        sms=142,  # [L]
        clock_hz=2.505e9,  # [L]
        l2_bytes=96 * MIB,  # [L]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE4,
        link="PCIe 4",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="5090",
        names=("GeForce RTX 5090",),
        arch="sm_120",
        bf16_flops=209.5 * TERA,  # [X]
        tf32_flops=104.8 * TERA,  # [X]
        fp32_flops=104.8 * TERA,  # [X]
        memory_bytes=32 * GB,  # [X]
        memory_bandwidth=1792e9,  # [X]
        sms=170,  # [X]
        clock_hz=2.407e9,  # [X]
        l2_bytes=96 * MIB,  # [X]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE5,
        link="PCIe 5",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="rtx-pro-6000",
        names=("RTX PRO 6000 Blackwell Workstation Edition",),
        arch="sm_120",
        bf16_flops=503.8 * TERA,  # [W]
        tf32_flops=251.9 * TERA,  # [W]
        fp32_flops=126 * TERA,  # [W]
        memory_bytes=96 * GB,  # [W]
        memory_bandwidth=1792e9,  # [W]
        sms=188,  # [W]
        clock_hz=2.617e9,  # [W]
        l2_bytes=128 * MIB,  # [W]
        ctas_per_sm=24,  # [C]
        link_bandwidth=PCIE5,
        link="PCIe 5",
        network_bandwidth=ETHERNET_10G,
        **_CONSUMER,
    ),
    Card(
        key="t4",
        names=("Tesla T4", "T4"),
        arch="sm_75",
        bf16_flops=65 * TERA,  # of fp16: there is no bf16 [T]
        tf32_flops=0,
        fp32_flops=8.1 * TERA,  # [T]
        memory_bytes=16 * GB,  # [T]
        memory_bandwidth=320e9,  # [T]
        sms=40,  # [T]
        clock_hz=1.59e9,  # [T]
        l2_bytes=4 * MIB,  # [T]
        link_bandwidth=PCIE3,
        link="PCIe 3",
        network_bandwidth=ETHERNET_10G,
        **_TURING,
    ),
    Card(
        key="mi300x",
        names=("Instinct MI300X", "Instinct MI300X OAM"),
        arch="gfx942",
        bf16_flops=1307.4 * TERA,  # [M]
        tf32_flops=653.7 * TERA,  # [M]
        fp32_flops=163.4 * TERA,  # [M]
        memory_bytes=192 * GB,  # [M]
        memory_bandwidth=5300e9,  # [M]
        sms=304,  # compute units [M]
        clock_hz=2.1e9,  # [M]
        l2_bytes=32 * MIB,  # 4 MiB in each of 8 dies; 256 MiB of Infinity Cache behind it [M]
        shared_per_cta=64 * KIB,  # local data share of one compute unit [M]
        shared_per_sm=64 * KIB,  # [M]
        registers_per_sm=131072,  # four SIMD units with 128 KiB of vector registers each [M]
        warps_per_sm=32,  # eight wavefronts on each of four SIMD units [M]
        ctas_per_sm=32,
        link_bandwidth=448e9,  # seven links of 128 GB/s both ways [M]
        link="Infinity Fabric",
        network_bandwidth=INFINIBAND_400G,
    ),
)

CARDS: dict[str, Card] = {card.key: card for card in _ALL}


def by_name(device_name: str) -> Card | None:
    """The card that torch.cuda.get_device_name() names, or None.

    The whole name has to agree: an A100 is no A10, an H100 PCIe runs at three quarters of an
    H100 SXM's rate, and a MIG slice carries the name of its card with a tail.
    """
    name = device_name.removeprefix("NVIDIA ").removeprefix("AMD ").strip().lower()
    for card in _ALL:
        if name in (known.lower() for known in card.names):
            return card
    return None
