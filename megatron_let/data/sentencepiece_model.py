"""The one thing about a SentencePiece .model file that its library does not tell: which algorithm it is for."""

from __future__ import annotations

from collections.abc import Iterator

# Field numbers and values of sentencepiece_model.proto.
_TRAINER_SPEC, _MODEL_TYPE = 2, 3
_UNIGRAM = 1  # also what a file without the field means
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def is_unigram(model: bytes) -> bool:
    """Return whether the model is a unigram one. Raises ValueError for bytes that are no model."""
    trainer_spec = b""
    for number, value in _fields(model):
        if number == _TRAINER_SPEC and isinstance(value, bytes):
            trainer_spec += value  # a message given in parts is their concatenation
    model_type: int | bytes = _UNIGRAM
    for number, value in _fields(trainer_spec):
        if number == _MODEL_TYPE:
            model_type = value
    return model_type == _UNIGRAM


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of each field of a protobuf message; a fixed-size value as its bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            number, place = _varint(message, place)
            yield tag >> 3, number
            continue
        if kind == _BYTES:
            size, place = _varint(message, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"not a SentencePiece model: field of kind {kind}")
        yield tag >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("not a SentencePiece model: it ends within a number")
