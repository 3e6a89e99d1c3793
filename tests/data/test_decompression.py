"""Compressed input: told by content, whole or an error, and never more of it in memory than a chunk."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.decompression import Compression, compression_of, content_chunks
from megatron_let.data.raw_stream import RawStream
from megatron_let.errors import ConfigError

CONTENT = b"".join(
    b'{"text": "%06d %s"}\n' % (number, os.urandom(30).hex().encode()) for number in range(6000)
)
SKIPPABLE = b"\x53\x2a\x4d\x18" + struct.pack("<I", 70_000) + b"\x28\xb5\x2f\xfd" * 17_500
CHECKSUMMED = zstandard.ZstdCompressor(write_checksum=True)


def read(content: bytes, read_bytes: int = 1 << 18) -> bytes:
    raw = RawStream(io.BytesIO(content), "input", read_bytes=read_bytes)
    chunks = list(content_chunks(raw))
    assert raw.position == len(content), "not read to the end"
    assert all(chunks), "an empty chunk"
    return b"".join(chunks)


def zstd_stream(content: bytes, *, level: int = 3, window_log: int | None = None) -> bytes:
    """Return a frame whose header does not tell the size, as a compressor in a pipe writes it."""
    if window_log is None:
        compressor = zstandard.ZstdCompressor(level=level)
    else:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, window_log=window_log, enable_ldm=True
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()
    return stream.compress(content) + stream.flush()


WHOLE: dict[str, bytes] = {
    "plain": CONTENT,
    "gzip": gzip.compress(CONTENT),
    "gzip members": b"".join(
        gzip.compress(CONTENT[begin : begin + 900]) for begin in range(0, len(CONTENT), 900)
    ),
    "gzip padded": gzip.compress(CONTENT[:9000]) + b"\0" * 70_000 + gzip.compress(CONTENT[9000:]) + b"\0" * 5,
    "zstd": zstandard.compress(CONTENT),
    "zstd frames": b"".join(
        zstandard.compress(CONTENT[begin : begin + 900]) for begin in range(0, len(CONTENT), 900)
    ),
    "zstd checksum": CHECKSUMMED.compress(CONTENT),
    "zstd stream": zstd_stream(CONTENT),
    "zstd long window": zstd_stream(CONTENT, window_log=29),
    "zstd skippable": SKIPPABLE + zstandard.compress(CONTENT) + SKIPPABLE,
    "zstd empty frames": zstandard.compress(b"") + zstandard.compress(CONTENT) + zstandard.compress(b""),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("read_bytes", [1 << 18, 4099, 100])
def test_every_kind_gives_its_content(kind: str, read_bytes: int) -> None:
    assert read(WHOLE[kind], read_bytes) == CONTENT


@given(
    pieces=st.lists(st.binary(max_size=300) | st.integers(1, 5000).map(bytes), max_size=6),
    compress=st.sampled_from([gzip.compress, zstandard.compress, CHECKSUMMED.compress, zstd_stream]),
    read_bytes=st.integers(1, 200),
)
@settings(max_examples=100, deadline=None)
def test_any_members_and_frames_give_their_content(
    pieces: list[bytes], compress: Callable[[bytes], bytes], read_bytes: int
) -> None:
    assert read(b"".join(map(compress, pieces)), read_bytes) == b"".join(pieces)


def test_compression_is_told_by_the_first_bytes() -> None:
    heads = {kind: compression_of(whole[:4]) for kind, whole in WHOLE.items()}
    assert heads == {kind: Compression(kind.split()[0].replace("plain", "none")) for kind in WHOLE}
    assert compression_of(b"\x28\xb5\x2f") is Compression.NONE
    assert compression_of(b"") is Compression.NONE


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind not in ("plain", "gzip padded")])
def test_a_compressed_file_cut_anywhere_is_an_error(kind: str) -> None:
    whole, dice = WHOLE[kind], random.Random(kind)
    places = {dice.randrange(5, len(whole)) for _ in range(10)} | {len(whole) - 1, 5}
    # Between two parts a file can end without anyone being able to tell.
    magics = (b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", SKIPPABLE[:8])
    for place in (place for place in places if not whole.startswith(magics, place)):
        with pytest.raises(
            ConfigError, match=rf"^input input is cut off .+ near byte {place}: .+ has no end"
        ):
            read(whole[:place])


@pytest.mark.parametrize("kind", ["gzip", "zstd checksum"])
def test_a_flipped_bit_under_a_checksum_is_an_error(kind: str) -> None:
    dice = random.Random(7)
    for _ in range(10):
        damaged = bytearray(WHOLE[kind])
        damaged[dice.randrange(20, len(damaged))] ^= 1 << dice.randrange(8)
        with pytest.raises(ConfigError, match="input is cut off or damaged near byte"):
            read(bytes(damaged))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("garbage", [b"garbage", b"g", b'{"text": "a"}\n' * 10_000])
def test_garbage_behind_compressed_data_is_an_error(kind: str, garbage: bytes) -> None:
    with pytest.raises(ConfigError, match="input is cut off or damaged near byte"):
        read(WHOLE[kind] + garbage)


def test_garbage_is_named_with_its_place() -> None:
    with pytest.raises(
        ConfigError, match=f"damaged near byte {len(WHOLE['zstd']) + 4}: what follows the last"
    ):
        read(WHOLE["zstd"] + b"garbage")


def test_a_zstd_block_above_the_formats_limit_is_an_error() -> None:
    header = b"\x28\xb5\x2f\xfd\x00\x88"
    for block_type in (0, 1, 2):
        block = ((1 << 17) + 1 << 3 | block_type << 1 | 1).to_bytes(3, "little")
        with pytest.raises(ConfigError, match="a zstd block of 131073 bytes"):
            read(header + block + b"x" * 200_000)


def test_zstd_without_its_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_let.data.decompression.has_zstandard", lambda: False)
    with pytest.raises(ConfigError, match="install the package zstandard or decompress it"):
        read(WHOLE["zstd skippable"])


def bomb(kind: str, size: int) -> bytes:
    """Return compressed data of `size` bytes, all the same letter."""
    stream = zlib.compressobj(1, wbits=31) if kind == "gzip" else zstandard.ZstdCompressor().compressobj()
    part = b"a" * 1_000_000
    return b"".join(stream.compress(part) for _ in range(size // len(part))) + stream.flush()


@pytest.mark.parametrize(("kind", "size"), [("zstd", 300_000_000), ("gzip", 100_000_000)])
def test_a_few_compressed_bytes_do_not_become_a_gigabyte_in_memory(kind: str, size: int) -> None:
    compressed = bomb(kind, size)
    assert len(compressed) < size // 200
    tracemalloc.start()
    try:
        sizes = [len(chunk) for chunk in content_chunks(RawStream(io.BytesIO(compressed), "input"))]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert sum(sizes) == size
    assert max(sizes) <= 1 << 18
