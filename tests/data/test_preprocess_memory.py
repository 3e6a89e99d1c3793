"""Memory of a whole run of preprocessing: bounded by blocks and the longest document, not by the file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_let.data.manifest import Manifest, read_manifest
from megatron_let.testing.peak_memory import measured, peak_of
from tests.data.conftest import write_tokenizer_directory
from tests.processes import HANG_SECONDS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
# Half of the 1 GiB that is promised, and half of what is read. It is made up of libraries (170 MB), the words that
# gigatoken remembers (up to 192 MB), and a document of 32 MB on its way through the program.
LIMIT_MEGABYTES = 537
REPEATS, LONG_BYTES, TOO_LONG_BYTES = 40, 32_000_000, 900_000_000


def write_input(path: Path) -> int:
    """Write 210 MB of documents, one of 32 MB among them and a line of 900 MB, in few bytes; return the documents."""
    words = random.Random(1)
    lines = [
        json.dumps({"text": " ".join(f"{words.randrange(10**6):x}" for _ in range(400))}).encode()
        for _ in range(1500)
    ]
    part = b"\n".join(lines) + b"\n"
    with path.open("wb") as stream, zstandard.ZstdCompressor().stream_writer(stream) as output:
        for repeat in range(REPEATS):
            output.write(part)
            if repeat == REPEATS // 2:
                output.write(b'{"text": "' + b"word " * (LONG_BYTES // 5) + b'"}\n')
                output.write(b'{"text": "')
                for _ in range(TOO_LONG_BYTES // 1_000_000):
                    output.write(b"x" * 1_000_000)
                output.write(b'"}\n')
    return REPEATS * len(lines) + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_input(backend: object, tmp_path: Path, workers: int) -> None:
    pytest.importorskip(
        "gigatoken", reason="two hundred megabytes take a minute with the tokenizer's own library"
    )
    documents = write_input(tmp_path / "input.jsonl.zst")
    peak, manifest = preprocess(
        backend, tmp_path / "input.jsonl.zst", "--encoder", "fast", "--workers", workers
    )
    assert (manifest.documents, manifest.skipped) == (documents, {"too_long": 1})
    assert peak / 1e6 < LIMIT_MEGABYTES


def test_a_long_document_with_a_token_a_character_takes_a_piece_at_a_time(
    backend: object, tmp_path: Path
) -> None:
    digits = random.Random(1).randbytes(2_000_000).hex()
    (tmp_path / "input.jsonl").write_text(json.dumps({"text": digits}) + "\n")
    peak, manifest = preprocess(backend, tmp_path / "input.jsonl", "--encoder", "plain")
    assert manifest.tokens > 2_000_000
    # Libraries and half a mebibyte in the tokenizer take 183 MB; all 4 MB at once in it would take 1,000.
    assert peak / 1e6 < 300


def preprocess(backend: object, source: Path, *flags: object) -> tuple[int, Manifest]:
    """Run the tool; return the peak of the largest of its processes, in bytes, and the manifest."""
    tokenizer = source.parent / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer_directory(tokenizer, backend)
    command = [
        sys.executable,
        str(TOOL),
        "--input",
        str(source),
        "--output-prefix",
        str(source.parent / "out"),
    ]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    result = subprocess.run(
        measured([*command, *map(str, flags)]), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(str(source.parent / "out_text_document"))
    assert manifest is not None
    return peak_of(result.stdout), manifest
