"""`tools/benchmark.py data`: preprocessing beside its floors, the bare tokenizer, and Megatron-LM's own tool.

Every side is a program of its own that starts, works and ends; sides take turns. What they write is compared: two
sides that disagree in a byte are an error, not a figure.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_report import Cell

from megatron_let.regular_files import read_text
from megatron_let.testing.peak_memory import measured, peak_of

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("floors", "plain", "fast")
VOCABULARY = 16_000
_TRAINING_MEGABYTES = 10
_TEN, _START_UP_DOCUMENTS = "ten.jsonl", 10
# Only reading and parsing, in the two ways that a program could.
_FLOOR = """
import sys, orjson, zstandard
path = sys.argv[1]
stream = open(path, "rb")
if path.endswith(".zst"):
    stream = zstandard.ZstdDecompressor().stream_reader(stream)
rest = b""
while block := stream.read(1 << 18):
    lines = (rest + block).split(b"\\n")
    rest = lines.pop()
    for line in lines:
        orjson.loads(line)["text"]
"""
# The tokenizer alone, as fast as its library goes on one thread: texts in memory, ids as Python lists or, as in no use of
# them, left where the library keeps them.
_RAW = """
import itertools, sys, time, orjson, tokenizers
backend = tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
seconds = 0.0
with open(sys.argv[1], "rb") as lines:
    while texts := [orjson.loads(line)["text"] for line in itertools.islice(lines, 64)]:
        began = time.monotonic()
        batch = backend.encode_batch_fast(texts, add_special_tokens=False)
        if sys.argv[3] == "ids":
            for encoding in batch:
                encoding.ids
        del batch
        seconds += time.monotonic() - began
print("seconds", seconds)
"""


@dataclass
class Side:
    """A program to time, and what its turns took."""

    name: str
    file: str
    workers: int | None
    command: Sequence[str]
    output: Path | None = None
    """Prefix of the pair it writes."""
    paths: Sequence[str] = ()
    """Where it looks for packages first."""
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Resident memory of its largest process at most."""
    digest: str = ""

    def take_turn(self) -> None:
        """Run once."""
        for path in self.output.parent.glob(f"{self.output.name}*") if self.output else ():
            path.unlink()
        paths = os.pathsep.join([*self.paths, str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
        began = time.monotonic()
        result = subprocess.run(
            measured(list(self.command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        seconds = time.monotonic() - began
        said = result.stdout.splitlines()[:-1]
        if result.returncode:
            raise RuntimeError("\n".join([f"{self.name} on {self.file} failed:", *said]))
        own = said[-1].split() if said else []
        self.seconds.append(float(own[1]) if own[:1] == ["seconds"] else seconds)
        self.megabytes.append(peak_of(result.stdout) / 1e6)
        if self.output is not None:
            self.digest = _digest_of_pair(self.output)


def measure_data(
    directory: Path,
    *,
    megabytes: int,
    workers: Sequence[int],
    kinds: Sequence[str],
    repeats: int,
    megatron_lm: Path | None,
) -> tuple[str, list[dict[str, Cell]], list[str]]:
    """Return conditions, rows and notes of the benchmark of preprocessing; `kinds` of sides are among KINDS."""
    plain = directory / "corpus.jsonl"
    num_bytes, num_unique = write_corpus(plain, megabytes * 10**6)
    compressed = directory / "corpus.jsonl.zst"
    _compress(plain, compressed)
    ten = directory / _TEN
    with plain.open("rb") as stream:
        ten.write_bytes(b"".join(stream.readline() for _ in range(_START_UP_DOCUMENTS)))
    tokenizer = directory / "tokenizer"
    _train_tokenizer(directory, plain, tokenizer)
    sides = _floors(plain, compressed, tokenizer) if "floors" in kinds else []
    sides += _our_sides(directory, plain, compressed, tokenizer, workers, kinds)
    sides.append(_ours("start-up: ten documents", ten, directory / "ours_ten", tokenizer, 1, "auto"))
    if megatron_lm is not None:
        sides += [_megatron(megatron_lm, plain, directory / "megatron", tokenizer)]
        sides += [_megatron(megatron_lm, ten, directory / "megatron_ten", tokenizer)]
    for _ in range(repeats):
        for side in sides:
            side.take_turn()
    require_same_bytes(sides)
    pair = next(side.output for side in sides if side.output is not None and side.file != _TEN)
    num_tokens = Path(f"{pair}.bin").stat().st_size // 2
    rows = [_row(side, sides, num_bytes, num_tokens) for side in sides]
    conditions = (
        f"{num_bytes / 1e6:,.0f} MB of JSON lines ({num_unique / 1e6:,.0f} MB of it unique), {num_tokens:,} tokens of a byte-level BPE vocabulary of "
        f"{VOCABULARY:,}; {os.cpu_count()} cores, medians of {repeats} turn(s)"
    )
    return conditions, rows, _notes(sides)


def write_corpus(path: Path, num_bytes: int) -> tuple[int, int]:
    """Write the source files of this Python and of its packages as JSON lines, in the Pile's form.

    When they give out they are written again. Returns the bytes written, and those of the first time.
    """
    written = unique = 0
    with path.open("wb") as stream:
        while written < num_bytes:
            for name, text in _texts():
                record = {"text": text, "meta": {"pile_set_name": name}}
                written += stream.write(json.dumps(record).encode() + b"\n")
                if written >= num_bytes:
                    break
            unique = unique or written
    return written, unique


def _texts() -> Iterator[tuple[str, str]]:
    """Yield package and text of every source file, each text once."""
    seen: set[bytes] = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = read_text(path)
            except (OSError, ValueError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield path.relative_to(root).parts[0], text


def _compress(source: Path, target: Path) -> None:
    import zstandard

    with source.open("rb") as stream, target.open("wb") as output:
        zstandard.ZstdCompressor(level=3).copy_stream(stream, output)


def _train_tokenizer(directory: Path, corpus: Path, output: Path) -> None:
    part = directory / "training.jsonl"
    with corpus.open("rb") as stream:
        part.write_bytes(b"".join(stream.readlines(_TRAINING_MEGABYTES * 10**6)))
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(part)]
    command += ["--vocab-size", str(VOCABULARY), "--output-dir", str(output)]
    subprocess.run(command, check=True, capture_output=True)


def _floors(plain: Path, compressed: Path, tokenizer: Path) -> list[Side]:
    sides = [
        Side("read and parse only", path.name, None, (sys.executable, "-c", _FLOOR, str(path)))
        for path in (plain, compressed)
    ]
    for name, what in (("tokenizer only, one thread", "ids"), ("tokenizer only, ids not read", "none")):
        raw = (sys.executable, "-c", _RAW, str(plain), str(tokenizer), what)
        sides.append(Side(name, plain.name, None, raw))
    return sides


def _our_sides(
    directory: Path,
    plain: Path,
    compressed: Path,
    tokenizer: Path,
    workers: Sequence[int],
    kinds: Sequence[str],
) -> list[Side]:
    return [
        _ours(
            f"ours, {encoder}", path, directory / f"ours_{encoder}_{count}{suffix}", tokenizer, count, encoder
        )
        for encoder, path, suffix in (("plain", plain, ""), ("fast", plain, ""), ("fast", compressed, "_zst"))
        for count in workers
        if encoder in kinds
    ]


def _ours(name: str, path: Path, output: Path, tokenizer: Path, workers: int, encoder: str) -> Side:
    program = (sys.executable, str(ROOT / "tools/preprocess_data.py"), "--encoder", encoder)
    command = (*program, *_flags(path, output, tokenizer, workers))
    return Side(name, path.name, workers, command, output.with_name(f"{output.name}_text_document"))


def _megatron(checkout: Path, path: Path, output: Path, tokenizer: Path) -> Side:
    command = (sys.executable, "-W", "ignore", str(checkout / "tools/preprocess_data.py"))
    return Side(
        "Megatron-LM's tool" if path.name != _TEN else "Megatron-LM's start-up: ten documents",
        path.name,
        1,
        (*command, *_flags(path, output, tokenizer, 1)),
        output.with_name(f"{output.name}_text_document"),
        [str(checkout)],
    )


def _flags(path: Path, output: Path, tokenizer: Path, workers: int) -> tuple[str, ...]:
    return (
        *("--input", str(path), "--output-prefix", str(output), "--append-eod", "--workers", str(workers)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
    )


def _digest_of_pair(prefix: Path) -> str:
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with Path(f"{prefix}{suffix}").open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def require_same_bytes(sides: Sequence[Side]) -> None:
    """Raise RuntimeError when two sides made different pairs of one corpus."""
    first: dict[bool, Side] = {}
    for side in sides:
        if side.output is not None:
            other = first.setdefault(side.file == _TEN, side)
            if other.digest != side.digest:
                raise RuntimeError(f"{other.name} and {side.name} wrote different pairs")


def _row(side: Side, sides: Sequence[Side], num_bytes: int, num_tokens: int) -> dict[str, Cell]:
    seconds = statistics.median(side.seconds)
    row: dict[str, Cell] = {"side": side.name, "input": side.file, "workers": side.workers}
    row |= {"seconds": round(seconds, 2), "peak MB a process": round(max(side.megabytes))}
    if side.file == _TEN:
        return row
    row |= {"MB/s": round(num_bytes / 1e6 / seconds, 1), "tokens/s": round(num_tokens / seconds)}
    for peer in sides:
        if peer.name == "Megatron-LM's tool":
            row["over Megatron-LM"] = round(statistics.median(peer.seconds) / seconds, 2)
    return row


def _notes(sides: Sequence[Side]) -> list[str]:
    """Return what the aims are about, each a ratio within this run."""
    median = {
        (side.name, side.workers): statistics.median(side.seconds)
        for side in sides
        if side.file != "corpus.jsonl.zst"
    }
    start_up = median["start-up: ten documents", 1]
    alone = median.get(("ours, plain", 1))
    notes = [
        "Whole programs, start-up included, but for the tokenizer only. Every side that writes wrote the same bytes."
    ]
    turns = {(side.name, side.workers): side.seconds for side in sides}
    for name in ("tokenizer only, one thread", "tokenizer only, ids not read"):
        if (name, None) in median and alone is not None:
            pairs = zip(turns[name, None], turns["ours, plain", 1], strict=True)
            shares = [floor / (ours - start_up) for floor, ours in pairs]
            notes.append(
                f"Plain encoder, one worker, start-up taken off: {statistics.median(shares):.3f} of the rate of {name} "
                f"(turns {min(shares):.3f} to {max(shares):.3f})."
            )
    if alone is not None and ("ours, plain", 2) in median:
        two = (alone - start_up) / (median["ours, plain", 2] - start_up)
        notes.append(f"Plain encoder, two workers over one, start-up taken off: {two:.2f}.")
    peer, fast = median.get(("Megatron-LM's tool", 1)), median.get(("ours, fast", 1))
    if peer is not None and fast is not None:
        times = (peer - median["Megatron-LM's start-up: ten documents", 1]) / (fast - start_up)
        notes.append(
            f"Fast encoder over Megatron-LM's tool, one worker each, start-up taken off both: {times:.1f}."
        )
    return notes
