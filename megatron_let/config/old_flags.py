"""Flags that earlier releases of Megatron-LM had and core 0.16 has no more: what to write in their place.

From the argument parsers of v1.1 to core_v0.15. Most are gone because they do nothing any more or have another name.
"""

from __future__ import annotations

_INSTEAD = {
    "use --recompute-granularity full --recompute-method uniform or block": "--activations-checkpoint-method",
    "use --recompute-num-layers": "--activations-checkpoint-num-layers --checkpoint-num-layers",
    "use --distribute-saved-activations": "--distribute-checkpointed-activations",
    "use --norm-epsilon": "--layernorm-epsilon",
    "use --fp8-format e4m3": "--fp8-e4m3",
    "use --fp8-format hybrid": "--fp8-hybrid",
    "use --accumulate-allreduce-grads-in-fp32": "--fp32-allreduce",
    "use --override-opt_param-scheduler": "--override-lr-scheduler",
    "use --use-checkpoint-opt_param-scheduler": "--use-checkpoint-lr-scheduler",
    "use --account-for-embedding-in-pipeline-split": "--standalone-embedding-stage",
    "it is off unless --apply-query-key-layer-scaling is given; leave it out": "--no-query-key-layer-scaling",
    "use --no-masked-softmax-fusion": "--no-scaled-masked-softmax-fusion",
    "use --masked-softmax-fusion": "--scaled-upper-triang-masked-softmax-fusion",
    "it has no effect any more; leave it out": """
        --DDP-impl --data-impl --delay-param-gather --no-delay-grad-reduce --mmap-warmup --local_rank
        --no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-ddp --renormalize-blend-weights
        --enable-one-logger --one-logger-entity --log-batch-size-to-tensorboard --no-log-learnig-rate-to-tensorboard
        --no-log-learning-rate-to-tensorboard
    """,
    "FSDP is not supported; use --use-distributed-optimizer": """
        --use-custom-fsdp --keep-fp8-transpose-cache-when-using-custom-fsdp
    """,
    "only GPT pretraining is supported": """
        --encoder-pipeline-model-parallel-size --encoder-tensor-model-parallel-size --pipeline-model-parallel-split-rank
        --retro-add-retriever --retro-attention-gate --retro-cyclic-train-iters --retro-encoder-attention-dropout
        --retro-encoder-hidden-dropout --retro-encoder-layers --retro-no-verify-neighbor-count --retro-num-neighbors
        --retro-num-retrieved-chunks --retro-project-dir --retro-return-doc-ids --retro-workdir --img-dim
        --faiss-use-gpu --report-topk-accuracies --retriever-seq-length
    """,
    "mixture of experts is not supported": "--moe-token-dropping",
    "data are .bin/.idx files on a file system": "--s3-cache-path",
    "only pretraining is supported": """
        --grpo-default-temperature --grpo-default-top-p --rl-calculate-intra-group-similarity
        --rl-sequence-packing-bin-size --load-model-opt-format
    """,
}


def advice_on(flag: str) -> str:
    """Return "; " and what to write in place of a flag that Megatron-LM had once; nothing for any other."""
    found = (advice for advice, flags in _INSTEAD.items() if flag in flags.split())
    return next((f", a flag of an earlier Megatron-LM; {advice}" for advice in found), "")
