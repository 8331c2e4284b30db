"""Where tensors lie in a .safetensors file: 8 bytes of length, a JSON header, the data.

safetensors' own library writes whole files and maps them into memory. Ranks write and read rows of
their own, at the offsets that follow from the names and shapes; and a disk that fails under read()
is an error, where under a memory map it is SIGBUS, the end of the process.
Format: huggingface/safetensors, README.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from launch.progress import track

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as safetensors' library has it
LARGEST_READ = 1 << 30  # bytes; Linux reads at most 2^31 - 4096 at once (read(2))


@dataclass(frozen=True)
class Layout:
    """A file that is about to be written: its header, and each tensor's offset in the file."""

    header: bytes
    offsets: dict[str, int]
    size: int

    @classmethod
    def of(
        cls, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ) -> "Layout":
        """Tensors one after the other, as they come."""
        entries: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
        relative, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            relative[name] = end
            end += dtype.itemsize * torch.Size(shape).numel()
            place = [relative[name], end]
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": place}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        header = len(text).to_bytes(8, "little") + text
        return cls(header, {k: len(header) + v for k, v in relative.items()}, len(header) + end)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file. The library's save_file is silent until it's done, and leaves a
    file that nobody else may read (mode 0600) whatever the umask says."""
    layout = Layout.of({name: (w.dtype, tuple(w.shape)) for name, w in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(layout.header)
        for name in track(tensors, f"writing {path.name}", "tensor"):
            content = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            file.write(content.numpy().data)


class TensorFile(Mapping[str, Tensor]):
    """An open .safetensors file: `with TensorFile(path) as file: file["wte.weight"]` reads one.

    Raises ValueError for what is no such file, OSError where the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._places = self._header()  # name -> (dtype, shape, first byte)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._places[name][1]

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all tensors."""
        return {dtype for dtype, _, _ in self._places.values()}

    def rows(self, name: str, first: int, end: int | None) -> Tensor:
        """A tensor's rows from `first` up to `end`, in the dtype of the file; None: all of it."""
        dtype, shape, offset = self._places[name]
        if end is not None:
            row = torch.Size(shape[1:]).numel() * dtype.itemsize
            offset, shape = offset + first * row, (end - first, *shape[1:])
        content = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        left = memoryview(content.numpy())  # type: ignore[arg-type]
        while left:
            count = os.preadv(self._handle, [left[:LARGEST_READ]], offset)
            if count == 0:
                raise ValueError(f"it ends in the middle of {name}")
            left, offset = left[count:], offset + count
        return content.view(dtype).reshape(shape)

    def _header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        """Every tensor's place, each inside the file."""
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if not 0 < length <= min(size - 8, LARGEST_HEADER):
            raise ValueError("it is no safetensors file")
        tensors = {}
        try:
            entries = json.loads(os.pread(self._handle, length, 8))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
                start, end = (int(n) for n in entry["data_offsets"])
                wanted = torch.Size(shape).numel() * dtype.itemsize
                if min(start, *shape, 0) < 0 or end - start != wanted or 8 + length + end > size:
                    raise ValueError(f"{name} lies outside of it")
                tensors[name] = (dtype, shape, 8 + length + start)
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"its header can't be read: {error!r}") from None
        return tensors
