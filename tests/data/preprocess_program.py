"""A run of preprocessing in a process of its own, to be killed: numbers as text, so that it starts quickly.

python tests/data/preprocess_program.py '{"inputs": [...], "output_prefix": ..., "workers": 2, ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.data.tokenizers import NullTokenizer
from megatron_let.errors import LetError


def main() -> int:
    """Preprocess as the settings say; an error is one line."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    lists: dict[str, Any] = {name: tuple(values.pop(name)) for name in ("inputs", "json_keys")}
    settings = PreprocessSettings(**lists, **values)
    try:
        preprocess(settings, NullTokenizer(60000), lambda line: print(line, flush=True))
    except LetError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
