"""Reads NVIDIA machine code: what ptxas made of a kernel, with the tools that come with Triton.

    code = disassemble(cubin)
    code.registers, code.spills, [loop.count for loop in code.loops]

Nothing here needs a GPU. Opcodes: "CUDA Binary Utilities", instruction set reference.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Matrix instructions: of a warp (sm_80), of four warps (sm_90, wgmma), of one thread (sm_100,
# tcgen05).
MMA = ("HMMA", "HGMMA", "UTCHMMA")
ASYNC = {"LDGSTS": "cp.async", "UTMALDG": "tma", "UTMASTG": "tma-store"}
SPILLS = ("LDL", "STL")  # loads and stores of a thread's local memory
FP32 = ("FADD", "FADD2", "FMUL", "FMUL2", "FFMA", "FFMA2", "FMNMX", "FMNMX3", "FSEL", "FSETP")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # HGMMA
    full: str  # HGMMA.64x64x16.F32.BF16
    target: str | None  # the label that a branch goes to

    @property
    def width(self) -> int:
        """Bits that one thread moves, of a load or a store."""
        bits = re.search(r"\.(128|64|[US]16|[US]8)(\.|$)", self.full)
        return int(bits[1].strip("US")) if bits else 32

    @property
    def mma_flops(self) -> int:
        """FLOP of one warp's HMMA, or of one warp group's HGMMA; 0 for the rest.

        tcgen05 keeps its shape in a register, where nobody can read it.
        """
        warp = re.search(r"^HMMA\.(16)(8)(16|8|32)", self.full)  # HMMA.16816
        group = re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", self.full)  # HGMMA.64x64x16
        shape = warp or group
        if shape is None:
            return 0
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k


@dataclass(frozen=True)
class Code:
    """A kernel, or a loop of one."""

    instructions: tuple[Instruction, ...]
    registers: int = 0
    stack: int = 0  # bytes of local memory per thread

    @property
    def opcodes(self) -> Counter:
        return Counter(i.opcode for i in self.instructions)

    @property
    def count(self) -> int:
        return len(self.instructions)

    @property
    def spills(self) -> int:
        return sum(self.opcodes[op] for op in SPILLS)

    @property
    def mma(self) -> Counter:
        return Counter({op: n for op, n in self.opcodes.items() if op in MMA})

    @property
    def mma_waits(self) -> int:
        """How often it waits for HGMMA to end."""
        return sum(i.full.startswith("WARPGROUP.DEPBAR") for i in self.instructions)

    @property
    def asynchronous(self) -> str:
        return " ".join(name for op, name in ASYNC.items() if self.opcodes[op])

    @property
    def load_widths(self) -> list[int]:
        """Widths in bits of its loads from global memory, ascending."""
        return sorted({i.width for i in self._loads})

    @property
    def narrow_loads(self) -> int:
        """How many of them move less than 128 bits."""
        return sum(i.width < 128 for i in self._loads)

    @property
    def _loads(self) -> list[Instruction]:
        return [i for i in self.instructions if i.opcode in ("LDG", "LDGSTS")]

    def mma_flops(self, warps: int) -> int:
        """FLOP that a CTA of so many warps executes in one pass, without tcgen05's."""
        of = {"HMMA": warps, "HGMMA": warps // 4}
        return sum(i.mma_flops * of.get(i.opcode, 0) for i in self.instructions)

    @property
    def loops(self) -> list["Code"]:
        """The innermost loops: those with most matrix instructions first, then the shortest first.

        A loop of a handful of instructions only waits on a barrier, and is left out.
        """
        labels: dict[str, int] = {}
        spans = []  # (first, last) instruction of each branch backwards
        for position, i in enumerate(self.instructions):
            if i.opcode == "LABEL":
                labels[i.full] = position
            elif i.opcode == "BRA" and i.target in labels:
                spans.append((labels[i.target], position))
        loops = []
        for first, last in spans:
            inside = [(a, b) for a, b in spans if first <= a and b <= last]
            if len(inside) > 1:  # holds another loop beside itself
                continue
            body = self.instructions[first : last + 1]
            loop = Code(tuple(i for i in body if i.opcode != "LABEL"))
            if loop.count > 16:
                loops.append(loop)
        return sorted(loops, key=lambda loop: (-sum(loop.mma.values()), loop.count))


def parse(sass: str) -> Code:
    """The instructions of nvdisasm's output, with their labels."""
    found = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            found.append(Instruction("LABEL", label[1], None))
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"\.L_x_\d+", code[2])
            full = code[1]
            found.append(Instruction(full.split(".")[0], full, target[0] if target else None))
    return Code(tuple(found))


def disassemble(cubin: bytes) -> Code:
    """The code in a cubin, with its registers and stack per thread."""

    import triton  # brings nvdisasm and cuobjdump

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(*command: str) -> str:
        run = subprocess.run([tools / command[0], *command[1:]], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{command[0]}: {run.stderr.strip()}")
        return run.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = parse(tool("nvdisasm", "-c", file.name))
        usage = tool("cuobjdump", "-res-usage", file.name)
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = map(int, found)
    return Code(code.instructions, registers, stack)
