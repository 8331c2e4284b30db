"""Builds the stand-in for a GPU out of this folder's C files, with gcc, in seconds.

    library = build(python, folder)      # folder/libcuda.so.1

What the C files don't define, and torch's own libraries ask for, is made here: functions that
write down their name and return 0, success. Their names are read from torch's libraries as
`nm -D --undefined-only` lists them, so they are those of the torch that is installed.
"""

import re
import shutil
import subprocess
from pathlib import Path

from launch.errors import BadInput

HERE = Path(__file__).parent
# The runtime's, the driver's and cuBLAS's functions; cuFile, cuFFT, cuSPARSE and the like are real.
OURS = re.compile(r"(__)?cuda[A-Z]\w*|cublas\w+|cu(?!File)[A-Z]\w*")


def build(python: str, folder: Path) -> Path:
    """The library for the torch of this interpreter. Raises BadInput without gcc and binutils."""
    for tool in ("gcc", "nm"):
        if not shutil.which(tool):
            raise BadInput(f"the stand-in for a GPU is built by gcc, and there is no {tool} here: "
                           "on Debian `apt-get install gcc`")
    packages = site_packages(python)
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(HERE.glob("*.c"))
    objects = [compile_c(source, folder, packages) for source in sources]
    missing = sorted(wanted(packages) - defined(objects))
    stubs = folder / "stubs.c"
    stubs.write_text('#include "nullgpu.h"\n' + "".join(
        f'int {name}(void) {{ record("call {name}"); return 0; }}\n' for name in missing))
    objects.append(compile_c(stubs, folder, packages))
    library = folder / "libcuda.so.1"
    run(["gcc", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library),
         *map(str, objects), "-ldl", "-lpthread"])
    link = folder / "libcuda.so"  # the name that Triton links its launchers with
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return library


def site_packages(python: str) -> Path:
    """Where an interpreter has its torch."""
    find = "import importlib.util as u; print(u.find_spec('torch').origin)"
    return Path(run([python, "-c", find]).strip()).parent.parent


def compile_c(source: Path, folder: Path, packages: Path) -> Path:
    """An object file. CUDA's headers come with torch's and Triton's wheels."""
    headers = [*packages.glob("nvidia/cu*/include"), packages / "triton/backends/nvidia/include"]
    made = folder / f"{source.stem}.o"
    # Stubs have other parameters than gcc knows of functions with these names.
    run(["gcc", "-O1", "-w", "-fPIC", "-c", str(source), "-I", str(HERE),
         *[f"-I{header}" for header in headers], "-o", str(made)])
    return made


def wanted(packages: Path) -> set[str]:
    """What torch's libraries expect of CUDA's runtime, its driver and cuBLAS."""
    names: set[str] = set()
    for library in sorted((packages / "torch" / "lib").glob("*.so*")):
        for line in run(["nm", "-D", "--undefined-only", str(library)]).splitlines():
            name = line.split()[-1].partition("@")[0]  # without its version
            if OURS.fullmatch(name):
                names.add(name)
    return names


def defined(objects: list[Path]) -> set[str]:
    """The functions that object files define."""
    lines = run(["nm", "-g", "--defined-only", *map(str, objects)]).splitlines()
    return {line.split()[-1] for line in lines if " T " in line}


def run(command: list[str]) -> str:
    """A command's standard output. Raises BadInput with the first line of its complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip() or "no word").splitlines()
        error = next((line for line in complaint if "error" in line), complaint[-1])
        raise BadInput(f"{Path(command[0]).name} failed: {error}")
    return done.stdout
