"""How fast shards are made and read on this machine, and in how much memory.

    python -m tests.measure_data 'DIR/*.parquet' [MEGABYTES]     # FineWeb's files, or some of them

Makes parquet of MEGABYTES (default 200) of text out of the given documents, in which no document
repeats: their sentences are shuffled, and each word that occurs in them once becomes one that
nobody has seen, as tokenizers remember words. Prints each stage alone; then, in turn and each in
processes of its own, python -m data.fineweb and the usual way (tests/bench/shards.py), three times;
the peak memory (PSS of all processes) also on a quarter of the text; and the loader.
"""

import collections
import glob
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.fineweb import readers
from data.loader import Loader, Stream
from data.shard_file import ShardWriter, open_shard, shard_bytes
from data.shards import open_folder
from data.sources import local_files, pieces
from data.tokenise import encoder, tokenise
from data.tokenizer import EOT

WORKERS = 2
WORD = re.compile(r"[^\W\d_]+")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHARD_TOKENS = 5_000_000


def write_corpus(sample: str, folder: Path, megabytes: int) -> int:
    """Writes parquet files of about 50 MB of text; returns the bytes of text."""
    texts = [text for path in sorted(glob.glob(sample))
             for text in pq.read_table(path)["text"].to_pylist()]
    seen = collections.Counter(word for text in texts for word in WORD.findall(text))
    rng, total, written, batch, size = random.Random(0), 0, 0, [], 0
    made: set[str] = set()

    def unseen(match: re.Match) -> str:
        word = match[0]
        if seen[word] > 1:
            return word
        return word[0] + "".join(rng.choices(LETTERS, k=max(4, len(word)) - 1))

    while total < megabytes * 1_000_000:
        for text in rng.sample(texts, len(texts)):
            sentences = text.split(". ")
            rng.shuffle(sentences)
            text = WORD.sub(unseen, ". ".join(sentences))
            if text in made:
                continue
            made.add(text)
            batch.append(text)
            size += len(batch[-1].encode())
            if size >= min(50_000_000, megabytes * 1_000_000 - total):
                table = pa.table({"text": batch, "id": [str(i) for i in range(len(batch))]})
                pq.write_table(table, folder / f"{written:03d}.parquet", row_group_size=1000,
                               compression="zstd")
                total, written, batch, size = total + size, written + 1, [], 0
            if total >= megabytes * 1_000_000:
                break
    return total


def stages(source: str) -> None:
    """Reads, tokenises and writes one after the other; prints the rate and CPU time of each."""
    name, encode = encoder(WORKERS)
    spent = {stage: [0.0, 0.0] for stage in ("read", f"tokenise ({name})", "write")}
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder) / "x.bin", 2**31 - 1)
        for piece in pieces(local_files(source), "text"):
            marks = [(time.perf_counter(), time.process_time())]
            texts = piece.load().texts
            marks.append((time.perf_counter(), time.process_time()))
            tokens = tokenise(texts, encode)
            marks.append((time.perf_counter(), time.process_time()))
            writer.append(tokens.ids)
            marks.append((time.perf_counter(), time.process_time()))
            size += int(tokens.text_bytes.sum())
            clock = iter(spent.values())
            for before, after in zip(marks, marks[1:], strict=False):
                total = next(clock)
                total[0] += after[0] - before[0]
                total[1] += after[1] - before[1]
        writer.abandon()
    print(f"{'stage, alone':24}{'MB/s':>8}{'CPU s/MB':>12}")
    for stage, (wall, cpu) in spent.items():
        print(f"{stage:24}{size / 1e6 / wall:8.0f}{cpu / (size / 1e6):12.4f}")


def ours(source: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "data.fineweb", "--source", source, "--out", str(out),
            "--shard_tokens", str(SHARD_TOKENS), "--workers", str(WORKERS)]


def usual(source: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "tests.bench.shards", source, str(out), str(WORKERS),
            str(SHARD_TOKENS)]


def measure(command: list[str], memory: bool = False) -> tuple[float, float, float]:
    """(seconds of the whole command, its CPU seconds, its peak memory in MiB if asked for)."""
    start, peak, cpu = time.perf_counter(), 0.0, cpu_seconds()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if memory:
                peak = max(peak, sum(map(pss, [process.pid, *children(process.pid)])) / 1024)
            time.sleep(0.02)
        assert process.stderr is not None
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return time.perf_counter() - start, cpu_seconds() - cpu, peak


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children(pid: int) -> list[int]:
    """Process numbers of all that a process has started, and they in turn."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, listed) for found in (child, *children(child))]


def pss(pid: int) -> int:
    """A process's proportional share of memory, in KiB: shared pages count once over all."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    return int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])


def compare(source: str, folder: Path, size: int) -> None:
    """Both ways in turn, three times; the ratios are medians of the pairs'."""
    spent: dict[str, list[tuple[float, float, float]]] = {"ours": [], "usual": []}
    for i in range(3):
        for name, command in (("ours", ours), ("usual", usual)):
            spent[name].append(measure(command(source, folder / f"{name}{i}")))
    train, val, _ = open_folder(folder / "ours0")
    tokens = sum(len(shard.tokens) for shard in train + val)
    assert tokens == sum(np.load(p, mmap_mode="r").size for p in (folder / "usual0").glob("*.npy"))
    for name, found in spent.items():
        wall, cpu, _ = np.median(found, axis=0)
        print(f"{name:8}{size / 1e6 / wall:8.1f} MB/s, {tokens / 1e6 / wall:6.2f} M tokens/s, "
              f"{cpu / (size / 1e6):.4f} CPU s/MB, start and end included")
    for i, what in enumerate(("time", "CPU time")):
        ratios = [b[i] / a[i] for a, b in zip(spent["ours"], spent["usual"], strict=True)]
        print(f"ratio of {what} in each pair:", " ".join(f"{r:.2f}" for r in ratios),
              f"median {statistics.median(ratios):.2f}")


def loader_rate() -> float:
    """Tokens a second that one thread assembles into batches of 64 x 1024, pages cached."""
    T, steps = 1024, 700
    tokens = np.random.RandomState(0).randint(0, EOT, 50_000_000).astype(np.uint16)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "toy_train_000001.bin"
        path.write_bytes(shard_bytes(tokens))
        loader = Loader(Stream([open_shard(path)]), T=T, batch_tokens=64 * T, micro_batch=64,
                        seed=1)
        rates = []
        for _ in range(6):
            start = time.perf_counter()
            for step in range(steps):
                loader._read_batch(step)
            rates.append(steps * 64 * T / (time.perf_counter() - start))
        loader.close()
    return statistics.median(rates[1:])  # the first one reads the shard in


def main() -> None:
    sample, megabytes = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("all", "quarter"):
            (folder / part).mkdir()
        size = write_corpus(sample, folder / "all", megabytes)
        small = write_corpus(sample, folder / "quarter", megabytes // 4)
        print(f"{size / 1e6:,.0f} MB of text, {WORKERS} workers, {readers(WORKERS)} readers")
        subprocess.run([sys.executable, "-m", "tests.measure_data", "--stages",
                        f"{folder}/all/*.parquet"], check=True)
        compare(f"{folder}/all/*.parquet", folder, size)
        for part, text in (("all", size), ("quarter", small)):
            *_, peak = measure(ours(f"{folder}/{part}/*.parquet", folder / f"memory-{part}"), True)
            print(f"peak memory on {text / 1e6:,.0f} MB: {peak:,.0f} MiB")
        print(f"loader: {loader_rate() / 1e6:,.0f} M tokens/s")


if __name__ == "__main__":
    if sys.argv[1] == "--stages":
        stages(sys.argv[2])
    else:
        main()
