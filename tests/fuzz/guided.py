"""Look for input that neither is used nor refused in a line, guided by the code that each try reached.

    pip install -e '.[fuzz]'                                             # Linux, CPython 3.11 to 3.13
    python -m tests.fuzz.guided idx --seconds 600                        # or manifest, yaml, metadata, hf-config, all
    python -m tests.fuzz.guided idx --repeat fuzz-idx-crash-0123456789   # what was found, once more

A first byte says which file of the target the others are, and the first to be found ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.doors import Door

TARGETS = ("idx", "manifest", "yaml", "metadata", "hf-config")
_INSTRUMENTED = ["megatron_let", "yaml", "zipfile"]
_TOO_SLOW = ["yaml.scanner", "yaml.reader", "yaml.emitter"]
_HUNG_SECONDS = 100
_MOST_MEGABYTES = 4096
_LONGEST = 1 << 16
"""Bytes of an input, or twice the longest honest one."""


def main(argv: list[str] | None = None) -> int:
    """Run the program; return 0, 1 with a finding, 2 where it cannot run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="how long to look (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="directory of inputs to begin with, kept up to date")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="use this input alone")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeat is None and importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not installed: pip install -e '.[fuzz]' (Linux, CPython 3.11 to 3.13); pytest tests/fuzz needs none",
            file=sys.stderr,
        )
        return 2
    if options.within is not None:
        _explore(options.target, options.within, options.corpus.absolute(), options.seconds)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as scratch:
        if options.repeat is None:
            return _start(options, Path(scratch))
        return _repeat(options.target, options.repeat.read_bytes(), Path(scratch))


def _start(options: argparse.Namespace, scratch: Path) -> int:
    """Have a program of its own explore, for libFuzzer ends the one that it runs in; pass on what it says."""
    from tests.surroundings import OFFLINE

    command = [sys.executable, "-m", "tests.fuzz.guided", options.target, "--seconds", str(options.seconds)]
    command += ["--within", str(scratch), "--corpus", str(options.corpus or scratch / "corpus")]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(scratch / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    reached: list[str] = []
    tried, found = "0", None
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if not line.startswith("INFO: Instrumenting"):
                sys.stderr.write(line)
            if "INITED" in line:  # the honest inputs have been read
                reached.clear()
            reached += re.findall(r" cov: (\d+) ", line)
            tried = "".join(re.findall(r"number_of_executed_units: (\d+)", line)) or tried
            found = "".join(re.findall(r"Test unit written to (\S+)", line)) or found
    if child.returncode and found is None:
        return 1
    growth = f"{reached[0]} to {reached[-1]}" if reached else "0"
    print(
        f"{options.target}: {tried} executions, branches reached: {growth}, findings: {int(found is not None)}"
    )
    if found is not None:
        print(f"once more: python -m tests.fuzz.guided {options.target} --repeat {found}")
    return int(child.returncode != 0)


def _explore(target: str, scratch: Path, corpus: Path, seconds: int) -> None:
    """Explore until something is found or the time is over; this does not return."""
    import atheris

    atheris.instrument_imports(_INSTRUMENTED, _TOO_SLOW, enable_loader_override=False).__enter__()
    findings = Path.cwd()
    doors, use = _open(target, scratch)
    from megatron_let.mcore.safe_pickle import _Reader

    for action in {*_Reader.dispatch.values()} - {_Reader.set_item, _Reader.set_items}:
        atheris.instrument_func(action)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, door in enumerate(doors):
        for place, seed in enumerate(door.seeds):
            (corpus / f"seed-{target}-{number}-{place}").write_bytes(bytes([number]) + seed)
    words = scratch / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _words(doors)))
    longest = max(_LONGEST, 2 * max(len(seed) for door in doors for seed in door.seeds))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return _mutate(doors, data, max_size, random.Random(seed), atheris.Mutate)

    flags = {
        "max_total_time": seconds,
        "timeout": _HUNG_SECONDS,
        "rss_limit_mb": _MOST_MEGABYTES,
        "report_slow_units": _HUNG_SECONDS,
        "max_len": longest,
        "print_final_stats": 1,
        "dict": words,
        "artifact_prefix": findings / f"fuzz-{target}-",
    }
    words_of_fuzzer = [f"-{name}={value}" for name, value in flags.items()]
    atheris.Setup([sys.argv[0], *words_of_fuzzer, str(corpus)], use, custom_mutator=mutate)
    atheris.Fuzz()


def _repeat(target: str, data: bytes, scratch: Path) -> int:
    _, use = _open(target, scratch)
    print(use(data) or "used")
    return 0


def _open(target: str, scratch: Path) -> tuple[list[Door], Callable[[bytes], str | None]]:
    """Make the doors of a target, and the watched way through them."""
    from tests.fuzz.doors import DOORS
    from tests.fuzz.watch import Watch

    doors: list[Door] = []
    is_setting: list[bool] = []
    for name in TARGETS if target == "all" else (target,):
        place = scratch / name / "here"
        place.mkdir(parents=True)
        doors += DOORS[name](place)
        is_setting += [name == "yaml"] * (len(doors) - len(is_setting))
    os.chdir(scratch)
    watch = Watch(scratch)

    def use(data: bytes) -> str | None:
        number = data[0] % len(doors) if data else 0
        with watch.use(reads_anything=is_setting[number]):
            return doors[number].use(data[1:])

    for number, door in enumerate(doors):  # what is imported and made once, in peace
        door.use(door.seeds[0])
        refusal = use(bytes([number]) + door.seeds[0])
        assert refusal is None, f"honest input is refused: {refusal}"
    return doors, use


def _mutate(doors: list[Door], data: bytes, max_size: int, dice: random.Random, mutate_bytes: Any) -> bytes:
    """Change some values where there are any, else bytes; the door stays."""
    import json

    import yaml

    from tests.fuzz.kit import ODD, change, to_json

    number, body = (data[0] % len(doors), data[1:]) if data else (0, b"")
    kind = doors[number].kind
    if kind != "bytes" and dice.random() < 0.5:
        kinds = ("replace", "replace", "replace", "delete", "add", "rename")
        changes = [
            (dice.choice(kinds), [dice.random() * 0.999 for _ in range(dice.randint(1, 6))], dice.choice(ODD))
            for _ in range(dice.randint(1, 3))
        ]
        try:
            if kind == "json":
                body = to_json(change(json.loads(body), changes))
            else:
                body = yaml.safe_dump(change(yaml.safe_load(body), changes)).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
            kind = "bytes"  # no values in there
    else:
        kind = "bytes"
    if kind == "bytes":
        body = bytes(mutate_bytes(body, max_size - 1))
    return bytes([number]) + body[: max_size - 1]


def _words(doors: Iterable[Door]) -> list[bytes]:
    """Return names out of the honest files, and numbers at the edges of what fits."""
    from tests.fuzz.kit import NUMBERS

    names = {
        name for door in doors for seed in door.seeds for name in re.findall(rb"[A-Za-z_][\w.-]{2,40}", seed)
    }
    return [
        *sorted(names)[:1000],
        *((n & (1 << 8 * size) - 1).to_bytes(size, "little") for n in NUMBERS for size in (4, 8)),
    ]


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
