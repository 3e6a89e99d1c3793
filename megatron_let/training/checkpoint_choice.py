"""Which checkpoint a run starts from, and whether it is one of the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_let.config.run_config import RunConfig
from megatron_let.data.encoding_fingerprint import encode_otherwise, without_mark
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.checkpoint import ITERATION, RUN, SCHEDULER, load_common
from megatron_let.mcore.checkpoint_reader import check_objects
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.plain_json import shown
from megatron_let.training import checkpoint_files as files
from megatron_let.training.checkpoints import TokenizerRecord
from megatron_let.training.saved_run import require_run, with_consumed_tokens

# Settings that decide the shapes of the weights: a checkpoint fits only a run that agrees on all of them.
_SHAPES = {
    "transformer": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
        add_bias_linear add_qkv_bias qk_layernorm
    """,
    "model": "swiglu squared_relu position_embedding_type untie_embeddings_and_output_weights",
}
# Settings that decide what the weights compute: only `--finetune` may change them.
_MEANING = {
    "transformer": "layernorm_epsilon layernorm_zero_centered_gamma rotary_interleaved apply_query_key_layer_scaling",
    "model": """
        rotary_base rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
        add_position_embedding
    """,
}


def choose_checkpoint(config: RunConfig, context: ParallelContext) -> Path | None:
    """Return the directory of the checkpoint to load, or None for a fresh start; every rank calls this.

    What the tracker names is taken, if it is whole; a damaged one is named and the one before it taken. `--load` naming
    the `--save` directory is the usual requeue idiom and may find nothing; anywhere else an empty `--load` is an error.

    Raises:
        ConfigError: nothing (whole) to load, or damage under `--strict-load` or `--ckpt-step`.
    """
    if config.checkpoint.load is None:
        return None
    root = Path(config.checkpoint.load)
    step = config.checkpoint.ckpt_step
    iterations = context.on_rank_0(lambda: files.resume_order(root))
    if step is not None:
        if step not in iterations:
            raise ConfigError(
                f"--ckpt-step {step}: {root} has checkpoints of {_listed(iterations)}; choose one of these"
            )
        iterations = [step]
    if not iterations:
        context.on_rank_0(lambda: _say_fresh_start(config, root))
        return None
    if step is None:
        context.on_rank_0(lambda: _say_if_not_the_usual(config, root, iterations[0]))
    damages = []
    for iteration in iterations:
        directory = files.iteration_directory(root, iteration)
        damage = _find_damage(directory, context)
        if damage is None:
            return directory
        if config.checkpoint.strict_load or step is not None:
            raise ConfigError(f"checkpoint {directory} is damaged: {damage}; choose another with --ckpt-step")
        LOGGER.warning(f"checkpoint {directory} is damaged and skipped: {damage}")
        damages.append(f"iteration {iteration}: {damage}")
    raise ConfigError(
        f"--load {root}: none of its checkpoints is whole ({'; '.join(damages[:4])}); give another directory"
    )


def _say_if_not_the_usual(config: RunConfig, root: Path, first: int) -> None:
    """Say why the first iteration to be tried is not both the tracker's and the one that was saved last."""
    named, last = files.read_tracker(root), files.in_order_of_saving(root)[0]
    if first == named:
        if last != named:
            LOGGER.warning(
                f"{root}: iteration {last} was saved after iteration {named}, which {files.TRACKER} names and which is "
                f"gone on from; --ckpt-step {last} takes the other"
            )
        return
    says = "names no iteration" if named is None else f"names iteration {named}, which is not there"
    if config.checkpoint.strict_load:
        raise ConfigError(f"--load {root}: {files.TRACKER} {says}; choose a checkpoint with --ckpt-step")
    LOGGER.warning(f"{root}: {files.TRACKER} {says}; taking the checkpoint saved last, of iteration {first}")


def _say_fresh_start(config: RunConfig, root: Path) -> None:
    if os.path.lexists(root / files.TRACKER):
        raise ConfigError(
            f"--load {root}: {files.TRACKER} says that there is a checkpoint, and there is none; restore it, or delete "
            "that file to start anew"
        )
    save = config.checkpoint.save
    is_own = save is not None and os.path.realpath(save) == os.path.realpath(root)
    if not is_own or config.checkpoint.exit_on_missing_checkpoint:
        raise ConfigError(
            f"--load {root} holds no checkpoint{files.hint_at(root)}; check the path (only the --save directory may be "
            "empty: a first start)"
        )
    LOGGER.info(f"no checkpoint in {root}: starting from iteration 0")


def _listed(iterations: list[int]) -> str:
    return "no iteration" if not iterations else "iteration " + ", ".join(str(i) for i in iterations[:8])


def _find_damage(directory: Path, context: ParallelContext) -> str | None:
    share = (context.rank, context.world_size)
    found = context.gather(context.together(lambda: files.find_damage(directory, share=share)))
    return next((damage for damage in found if damage is not None), None)


def read_run(directory: Path, context: ParallelContext) -> dict[str, Any]:
    """Return the plain values of a checkpoint: `state`, `config`, `let`, `vocab_size`, and the scheduler's state.

    A checkpoint that is not safe to load stops the run and is not skipped for an older one, as a damaged one is:
    damage happens by itself, and this does not.

    Raises:
        ConfigError: it was not written by this project, is not safe to load, or lacks a value.
    """
    context.on_rank_0(lambda: check_objects(directory))
    common = context.together(lambda: load_common(directory))
    if RUN not in common:
        raise ConfigError(
            f"checkpoint {directory} (iteration {shown(common.get(ITERATION))}) was not written by megatron_let; give one that was"
        )
    run = with_consumed_tokens(common[RUN])
    require_run(run, directory)
    return {**run, SCHEDULER: common.get(SCHEDULER)}


def tokenizer_of_checkpoint(directory: Path) -> tuple[str, str | None] | None:
    """Return the fingerprints of a checkpoint's tokenizer and of its encoding, None where it does not say."""
    run = load_common(directory).get(RUN, {})
    fingerprint, encoding = run.get("tokenizer_fingerprint"), run.get("encoding_fingerprint")
    if fingerprint is None:
        return None
    return str(fingerprint), None if encoding is None else str(encoding)


def check_same_model(
    config: RunConfig, tokenizer: TokenizerRecord, run: dict[str, Any], directory: Path
) -> None:
    """Raise a ConfigError that lists everything in which the checkpoint's model differs from this run's.

    A model continued with `--finetune` may change what its weights mean, such as the base of its rotary embedding, but
    not their shapes.
    """
    now, then = config.to_dict(), run["config"]
    names = [(section, name) for section, text in _SHAPES.items() for name in text.split()]
    if now["model"]["position_embedding_type"] == "learned_absolute":
        names.append(("model", "max_position_embeddings"))
    if not config.checkpoint.finetune:
        names += [(section, name) for section, text in _MEANING.items() for name in text.split()]
    pairs = [(name, now[section][name], then[section].get(name)) for section, name in names]
    pairs.append(("token ids", tokenizer.vocab_size, run["vocab_size"]))
    differences = [
        f"{name} {mine} (checkpoint: {shown(theirs, 30)})" for name, mine, theirs in pairs if mine != theirs
    ]
    if differences:
        raise ConfigError(
            f"checkpoint {directory} holds another model: {', '.join(differences)}; give its settings or another --load"
        )
    _say_other_padding(now, then, directory)
    _check_same_tokenizer(config, tokenizer, run, directory)


def _check_same_tokenizer(
    config: RunConfig, tokenizer: TokenizerRecord, run: dict[str, Any], directory: Path
) -> None:
    mine, theirs = tokenizer.fingerprint, run["tokenizer_fingerprint"]
    if None in (mine, theirs):
        return
    encoding, saved_encoding = tokenizer.encoding_fingerprint, run.get("encoding_fingerprint")
    if saved_encoding is None:
        LOGGER.warning(
            f"checkpoint {directory} does not say how its tokenizer encodes: its vocabulary alone is compared"
        )
    if mine != theirs:
        what = f"was trained with another tokenizer ({shown(theirs[:12])}, now {str(mine)[:12]})"
    elif encode_otherwise(encoding, saved_encoding):
        what = (
            "was trained on data whose tokenizer gives texts other ids, from the same vocabulary (encoding "
            f"{shown(without_mark(str(saved_encoding))[:12])}, now {without_mark(str(encoding))[:12]})"
        )
    else:
        return
    message = f"checkpoint {directory} {what}"
    if not config.checkpoint.finetune:
        raise ConfigError(f"{message}; give its tokenizer, or --finetune to start anew from its weights")
    LOGGER.warning(message)


def _say_other_padding(now: dict[str, Any], then: dict[str, Any], directory: Path) -> None:
    """Warn when the ids that pad the vocabulary enter or leave the softmax: the loss steps at this place."""
    mine, theirs = now["model"]["mask_padded_logits"], then["model"].get("mask_padded_logits", True)
    if mine != theirs:
        LOGGER.warning(
            f"checkpoint {directory} was trained {'with' if mine else 'without'} --no-mask-padded-logits and this run goes "
            f"on {'without' if mine else 'with'} it: its losses do not compare with those before"
        )
