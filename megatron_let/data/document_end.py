"""Which token ends documents, where it is not the eos of the tokenizer's own files."""

from __future__ import annotations

from megatron_let.data.tokenizers import NO_EOD, Tokenizer
from megatron_let.errors import ConfigError


def choose_eod(tokenizer: Tokenizer, eod_token: str | None, *, append_eod: bool) -> None:
    """Make `eod_token` the tokenizer's eod, if one is given.

    Raises:
        ConfigError: the vocabulary has no such token, or documents are to end in eod and there is none.
    """
    if eod_token is not None:
        token_id = tokenizer.batch_encoder().token_id(eod_token)
        if token_id is None:
            raise ConfigError(
                f"--eod-token {eod_token}: tokenizer {tokenizer.name} has no such token; give one as its vocabulary names it"
            )
        tokenizer.eod = token_id
    if append_eod and tokenizer.eod == NO_EOD:
        raise ConfigError(
            f"--append-eod: tokenizer {tokenizer.name} has no eos token; name the token that ends documents by --eod-token, "
            "set eos_token in its files, or leave --append-eod out"
        )
