"""What a user says about the inputs, and what is known of each before it is read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_let.data.blocks import RecordKind
from megatron_let.errors import ConfigError

STANDARD_INPUT = "-"
INPUT_FORMATS = ("auto", "jsonl", "parquet", "text")
TEXT_DOCUMENTS = ("file", "line")


@dataclass(frozen=True)
class InputRules:
    """How inputs are read.

    Raises:
        ConfigError: a word that is not among the allowed ones, or a size below 1.
    """

    input_format: str = "auto"
    """One of INPUT_FORMATS; auto goes by content, and by the name for plain text (.txt) alone."""
    text_documents: str = "file"
    """One of TEXT_DOCUMENTS: what makes one document of a plain-text file."""
    columns: tuple[str, ...] = ("text",)
    """Columns to read of a parquet file. Those that it lacks are left out of its records."""
    max_document_bytes: int = 128 << 20
    """Longest record as it stands in the file: the JSON line, the text, the parquet row as a JSON line."""
    block_bytes: int = 1_000_000
    """Size of a block, unless one record alone is longer."""

    def __post_init__(self) -> None:
        if self.input_format not in INPUT_FORMATS:
            raise ConfigError(f"input format {self.input_format}: give one of {', '.join(INPUT_FORMATS)}")
        if self.text_documents not in TEXT_DOCUMENTS:
            raise ConfigError(
                f"text documents {self.text_documents}: give one of {', '.join(TEXT_DOCUMENTS)}"
            )
        if self.max_document_bytes < 1 or self.block_bytes < 1:
            raise ConfigError(
                f"at most {self.max_document_bytes} bytes a document and {self.block_bytes} a block: "
                "both must be at least 1"
            )


@dataclass(frozen=True)
class FoundSource:
    """One input that has been looked at and can be read."""

    path: str
    """As given or found; `-` for standard input."""
    size: int | None
    """Bytes on disk, compressed where the file is; None for standard input."""
    mtime_ns: int
    """When the file was last written; 0 for standard input."""
    kind: RecordKind
    is_parquet: bool

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return display_name(self.path)


@dataclass(frozen=True)
class UnreadFile:
    """A file below a directory, or one that a glob matches, that is left out."""

    path: str
    reason: str


def display_name(path: str) -> str:
    """Return what messages call an input."""
    return "standard input" if path == STANDARD_INPUT else path
