"""Texts on which tokenizers are known to go apart: what a second implementation must encode as the first does."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_let.data.batch_encoders import BackendEncoder, BatchEncoder, SentencePieceEncoder

_PLAIN_PROBES = (
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "the quick brown fox jumps over the lazy dog",
    "Don't you'd we'll I'M HE'S it\u2019s they'RE 'tis 's 'll",
    "a  b   c    d" + " " * 33 + "e" + " " * 200 + "f",
    "tabs\t\tand \t mixed \t\t  \tends\t",
    "lines\nand\n\nmore\n\n\n  indented\n\t\n \n\n  ",
    "carriage\r\nreturns\r\r\n\n\r \r\n",
    "no-break\u00a0space thin\u2009space ideographic\u3000space line\u2028para\u2029nel\u0085 zero\u200bwidth\ufeffmark",
    "\x0b\x0c\x1c\x1d\x1e\x1f vertical",
    "nul \x00 and \x00\x00 controls \x01\x02\x1b[0m\x7f",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-10 0x7fff 007 2024-02-30 12:34:56",
    "a  1   22\t3\n  456 x7   8y  -9 {  10}\n\n    11",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \uff11\uff12\uff13 \u00bd\u00be \u2160\u2161 \u00b2\u00b3 \u2460",
    "CamelCaseWord snake_case_word SHOUTING miXed iPhone x86_64 a1b2c3 __init__ $var @name #tag",
    "!!! ??? ... ,,, ;;; ::: --- === *** /// \\\\\\ ((([[[{{{}}}]]])))<<<>>> && || ~~ `` ^^ %%",
    "def f(x):\n    if x != 0:\n        return {\"a\": [1, 2], 'b': x**-1}  # note\n\n\nclass A: ...\n",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt /usr/lib",
    "\u00fcn\u00efc\u00f6de caf\u00e9 na\u00efve \u00df \u1e9e \u0130\u0131 \u01c5 \ufb01 \u017f",
    "cafe\u0301 n\u0303 a\u0308\u0323 \u1ea5 a\u0302\u0301 \uac00 \u1100\u1161 \u212b \u2126",
    "\u0301alone \u0308 \u0301\u0302\u0303 a" + "\u0336" * 20,
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0c\u6d4b\u8bd5\ud55c\uad6d\uc5b4 \uff21\uff22\uff41 \uff76\uff9e",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03a3\u03c3\u03c2 \u0423\u043a\u0440\u0430\u0457\u043d\u0430",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0644\u0627\u200c\u0631\u0648\u200d \u202ertl\u202c \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f916 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd 1\ufe0f\u20e3 \u2764\ufe0f",
    "\U0001d400\U0001d41a\U0001d7d8 \U00020000\U0002a6d6 \U0010ffff \ufffd \ufffe \ue000",
    "\u2581 \u2581\u2581 a\u2581b \u2581word \u0120 \u010a \u0120word",
    "\u2018q\u2019 \u201cq\u201d \u2013 \u2014 \u2026 \u00ab\u00bb \u2212 \u00d7 \u00b1 \u20ac \u00a3 \u00b0 \u2192 \u2264 \u2211 \u221a",
    "a" * 3000,
    "antidisestablishmentarianism" * 40,
    "ab" * 700 + "\u00e9" * 700 + "\u65e5" * 700 + "7" * 700 + "-" * 700,
    "TGFuZ3VhZ2UgbW9kZWxz" * 30 + "==",
    "\n" * 300,
    "[UNK] <unk> <s> </s> <pad> [CLS] <|endoftext|> <|im_start|> <0x0A> <0xFF> <|endoftext",
)
# Of the vocabulary's tokens: every so-many-th, this many in a row.
_NUM_TOKEN_RUNS, _TOKEN_RUN = 256, 12
# Longest list of special tokens of which each gets texts of its own.
_MAX_SPECIAL_PROBES = 64


def probe_texts(encoder: BatchEncoder) -> list[str]:
    """Return fixed texts, the encoder's special tokens in several surroundings, and its own tokens put in a row."""
    specials = special_texts(encoder)
    probes = list(_PLAIN_PROBES)
    for text in specials[:_MAX_SPECIAL_PROBES]:
        probes += [
            text,
            f"a{text}b",
            f"a {text} b",
            f"\n{text}\n{text}{text}",
            text[:-1],
            f"{text[:-1]} {text}",
        ]
    probes.append("".join(specials))
    probes.append(" x ".join(specials))
    return probes + _token_runs(encoder)


def special_texts(encoder: BatchEncoder) -> list[str]:
    """Return the tokens that are looked for in a text before it is split: added, control and user-defined ones."""
    if isinstance(encoder, BackendEncoder):
        return [token.content for token in encoder.backend.get_added_tokens_decoder().values()]
    if isinstance(encoder, SentencePieceEncoder):
        processor = encoder.processor
        pieces = range(processor.get_piece_size())
        return [
            processor.id_to_piece(index)
            for index in pieces
            if processor.is_control(index) or processor.is_unknown(index)
        ]
    return []


def _token_runs(encoder: BatchEncoder) -> list[str]:
    if isinstance(encoder, BackendEncoder):
        size, decode = encoder.backend.get_vocab_size(), encoder.backend.decode_batch
        return list(decode([list(run) for run in _runs(size)]))
    if isinstance(encoder, SentencePieceEncoder):
        processor = encoder.processor
        return [processor.decode_ids(list(run)) for run in _runs(processor.get_piece_size())]
    return []


def _runs(size: int) -> Sequence[range]:
    step = max(size // _NUM_TOKEN_RUNS, 1)
    return [range(start, min(start + _TOKEN_RUN, size)) for start in range(0, size, step)]
