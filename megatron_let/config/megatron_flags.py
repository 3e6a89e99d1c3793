"""Megatron-LM's flags (core 0.16) that are not settings here: accepted without effect, or refused.

A flag that could not change the result is accepted and named once in the log. One that would change it, or on
which a run relies (memory, resuming), is refused. Notation: `--flag` is a switch, `--flag=` takes values, and
`--flag=value` is refused except with that value, which is what happens here anyway.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlagFamily:
    """Flags on one subject that are treated alike, and why."""

    subject: str
    reason: str
    flags: str
    """Blank-separated, in the notation above."""

    def entries(self) -> dict[str, str | None]:
        """Return flag -> None for a switch, "" for one that takes values, or the value that is harmless."""
        parts = (word.partition("=") for word in self.flags.split())
        return {flag: value if equals else None for flag, equals, value in parts}


WITHOUT_EFFECT: tuple[FlagFamily, ...] = (
    FlagFamily(
        "Only way here",
        "it asks for what is always done here",
        """--use-mcore-models --log-throughput --use-dist-ckpt --ckpt-fully-parallel-save
        --dist-ckpt-optim-fully-reshardable --auto-detect-ckpt-format --tokenizer-hf-use-fast --legacy-tokenizer
        --enable-experimental --disable-msc --local-rank= --lazy-mpu-init= --onnx-safe=
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args""",
    ),
    FlagFamily(
        "Attention masks",
        "a mask is made on the device, and only where a flag asks for one that is not causal",
        "--no-create-attention-mask-in-dataloader",
    ),
    FlagFamily(
        "Ignored by megatron-core",
        "megatron-core and Transformer Engine ignore it",
        """--no-async-tensor-model-parallel-allreduce --disable-async-tensor-model-parallel-allreduce
        --fp8-interval= --no-scatter-gather-tensors-in-pipeline""",
    ),
    FlagFamily(
        "Timers",
        "the time of every iteration always goes to every report, and --log-timers-to-tensorboard has one level",
        """--timing-log-level= --timing-log-option= --no-barrier-with-level-1-timing --log-straggler
        --straggler-ctrlr-port= --straggler-minmax-count= --disable-straggler-on-startup""",
    ),
    FlagFamily(
        "Profilers",
        "no profiler is started",
        """--profile --profile-step-start= --profile-step-end= --use-pytorch-profiler --profile-ranks=
        --record-memory-history --memory-snapshot-path=""",
    ),
    FlagFamily(
        "Reports",
        "every number of the log line goes to metrics.jsonl, TensorBoard and W&B at --log-interval, and no other",
        """--tensorboard-log-interval= --tensorboard-queue-size= --no-log-loss-scale-to-tensorboard
        --disable-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard
        --log-memory-interval= --log-device-memory-used --log-max-attention-logit --log-world-size-to-tensorboard
        --log-energy --log-progress --logging-level= --config-logger-dir= --dump-param-to-param-group-map=
        --no-one-logger --one-logger-project= --one-logger-run-name= --one-logger-async --app-tag-run-name=
        --app-tag-run-version=""",
    ),
    FlagFamily(
        "Faster loading and saving",
        "data and checkpoints are read and written in one way",
        """--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --per-dataset-sequences-path=
        --no-ckpt-fully-parallel-save --disable-ckpt-fully-parallel-save --ckpt-fully-parallel-load
        --ckpt-assume-constant-structure --use-persistent-ckpt-worker
        --distrib-optim-fully-reshardable-mem-efficient""",
    ),
    FlagFamily(
        "Faster communication",
        "it only changes speed, and this way to it is not built in",
        """--tp-comm-overlap --tp-comm-overlap-cfg= --tp-comm-bootstrap-backend=
        --no-tp-comm-bulk-wgrad --disable-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad --disable-tp-comm-bulk-dgrad
        --no-tp-comm-overlap-ag --disable-tp-comm-overlap-ag --no-tp-comm-overlap-rs --disable-tp-comm-overlap-rs
        --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --disable-tp-comm-split-ag --no-tp-comm-split-rs
        --disable-tp-comm-split-rs --high-priority-stream-groups= --nccl-communicator-config-path= --use-sharp
        --sharp-enabled-group= --create-all-gather-group --use-nccl-ub --disable-symmetric-registration
        --use-ring-exchange-p2p --pipeline-model-parallel-comm-backend= --use-tp-pp-dp-mapping
        --no-overlap-p2p-communication --no-align-grad-reduce --overlap-param-gather-with-optimizer-step --ddp-num-buckets= --disable-gloo-process-groups
        --distributed-timeout-seconds-after-init=""",
    ),
    FlagFamily(
        "Faster kernels",
        "it only changes speed, and this way to it is not built in",
        """--enable-cuda-graph --external-cuda-graph --cuda-graph-impl= --cuda-graph-warmup-steps= --cuda-graph-scope=
        --delay-wgrad-compute --defer-embedding-wgrad-compute --wgrad-deferral-limit= --disable-jit-fuser
        --train-sync-interval=""",
    ),
    FlagFamily(
        "Watching the run",
        "a run is restarted from outside (scripts/run_until_done.sh), and watched by --watchdog-seconds",
        """--rerun-mode= --check-for-spiky-loss --check-weight-hash-across-dp-replicas-interval=
        --enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters=
        --run-workload-inspector-server --adlr-autoresume --adlr-autoresume-interval=
        --inprocess-restart --inprocess-max-iterations= --inprocess-monitor-thread-interval=
        --inprocess-monitor-process-interval= --inprocess-progress-watchdog-interval= --inprocess-heartbeat-interval=
        --inprocess-soft-timeout= --inprocess-hard-timeout= --inprocess-heartbeat-timeout= --inprocess-barrier-timeout=
        --inprocess-completion-timeout= --inprocess-last-call-wait= --inprocess-termination-grace-time=
        --inprocess-granularity= --inprocess-active-world-size= --inprocess-empty-cuda-cache""",
    ),
    FlagFamily(
        "Signals to loaders",
        "data-loader workers always leave SIGTERM and SIGUSR1 to their rank",
        "--exit-signal-handler-for-dataloader",
    ),
    FlagFamily(
        "TikTokenizer",
        "it belongs to a tokenizer type that is not offered",
        "--tiktoken-pattern= --tiktoken-num-special-tokens= --tiktoken-special-tokens=",
    ),
    FlagFamily(
        "Inference",
        "pretraining generates no text",
        """--inference-batch-times-seqlen-threshold= --max-tokens-to-oom= --use-legacy-static-engine
        --inference-max-requests= --inference-max-seq-length= --inference-max-batch-size= --inference-dynamic-batching
        --inference-dynamic-batching-buffer-size-gb= --inference-dynamic-batching-paused-buffer-size-gb=
        --inference-dynamic-batching-block-size= --inference-dynamic-batching-max-requests=
        --inference-dynamic-batching-max-tokens= --inference-dynamic-batching-num-cuda-graphs=
        --inference-dynamic-batching-track-paused-request-events --decode-only-cuda-graphs
        --inference-dynamic-batching-unified-memory-level= --nccl-all-reduce-for-prefill --enable-chunked-prefill
        --disable-chunked-prefill --inference-dynamic-batching-cuda-graph-max-tokens=
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count= --inference-logging-step-interval=
        --inference-wandb-logging --no-inference-wandb-logging --inference-coordinator-port= --flash-decode
        --inference-rng-tracker --inference-fuse-tp-communication --symmetric-ar-type= --mlp-chunks-for-prefill=""",
    ),
    FlagFamily(
        "Experts",
        "it only shapes a mixture of experts, and there is none",
        """--expert-tensor-parallel-size= --moe-layer-freq= --moe-upcycling-granularity= --moe-ffn-hidden-size=
        --moe-shared-expert-intermediate-size= --moe-shared-expert-gate --moe-shared-expert-overlap
        --moe-router-load-balancing-type= --moe-router-topk= --moe-router-num-groups= --moe-router-group-topk=
        --moe-router-pre-softmax --moe-router-topk-scaling-factor= --moe-router-score-function=
        --moe-router-dtype= --moe-router-enable-expert-bias --moe-router-bias-update-rate=
        --moe-router-force-load-balancing --moe-router-padding-for-quantization --moe-router-padding-for-fp8
        --moe-router-fusion --moe-enable-routing-replay --moe-aux-loss-coeff= --moe-z-loss-coeff=
        --moe-input-jitter-eps= --moe-grouped-gemm --moe-use-legacy-grouped-gemm --moe-token-dispatcher-type=
        --moe-enable-deepep --moe-flex-dispatcher-backend= --moe-deepep-num-sms= --moe-hybridep-num-sms=
        --moe-per-layer-logging --moe-expert-capacity-factor= --moe-pad-expert-input-to-capacity
        --moe-token-drop-policy= --moe-permute-fusion --moe-apply-probs-on-input --moe-latent-size=
        --moe-pad-experts-for-cuda-graph-inference""",
    ),
    FlagFamily(
        "Of features that are off",
        "it belongs to a feature that is off unless another flag turns it on",
        """--mtp-loss-scaling-factor= --q-lora-rank= --kv-lora-rank= --qk-head-dim= --qk-pos-emb-head-dim=
        --v-head-dim= --rotary-scaling-factor= --mscale= --mscale-all-dim= --cache-mla-latents
        --dsa-indexer-n-heads= --dsa-indexer-head-dim= --dsa-indexer-topk= --dsa-indexer-loss-coeff=
        --dsa-indexer-use-sparse-loss --linear-attention-freq= --linear-conv-kernel-dim= --linear-key-head-dim=
        --linear-value-head-dim= --linear-num-key-heads= --linear-num-value-heads= --window-attn-skip-freq=
        --qk-clip-alpha= --qk-clip-threshold= --relative-attention-num-buckets=
        --relative-attention-max-distance= --mamba-state-dim= --mamba-head-dim= --mamba-num-groups=
        --mamba-num-heads= --disable-mamba-mem-eff-path --fp4-recipe= --kitchen-attention-backend=
        --muon-momentum= --muon-no-split-qkv --muon-use-nesterov --muon-scale-mode= --muon-fp32-matmul-prec=
        --muon-num-ns-steps= --muon-tp-mode= --muon-extra-scale-factor= --optimizer-offload-fraction=
        --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params --offload-modules=
        --min-offloaded-tensor-size= --torch-fsdp2-no-reshard-after-forward --suggested-communication-unit-size=
        --fim-rate= --fim-spm-rate= --fim-split-sample= --fim-fragment-rate= --fim-no-prefix=
        --fim-prefix-token= --fim-middle-token= --fim-suffix-token= --fim-pad-token= --fim-eod-token=
        --sft-tokenizer-prompt-format= --non-persistent-local-ckpt-algo= --replication-jump=
        --replication-factor= --error-injection-type=""",
    ),
    FlagFamily(
        "Other programs",
        "it belongs to other models or other training, and pretraining a GPT does not read it",
        """--num-classes= --img-h= --img-w= --num-channels= --patch-dim= --classes-fraction=
        --data-per-class-fraction= --no-data-sharding --head-lr-mult= --vision-pretraining-type=
        --vision-backbone-type= --swin-backbone-type= --mask-type= --mask-factor= --iter-per-epoch=
        --dino-local-img-size= --dino-local-crops-number= --dino-head-hidden-size= --dino-bottleneck-size=
        --dino-freeze-last-layer= --dino-norm-last-layer --dino-warmup-teacher-temp= --dino-teacher-temp=
        --dino-warmup-teacher-temp-epochs= --bert-no-binary-head --mask-prob= --short-seq-prob= --ict-head-size=
        --biencoder-projection-dim= --biencoder-shared-query-context-model --titles-data-path=
        --query-in-block-prob= --use-one-sent-docs --evidence-data-path= --retriever-report-topk-accuracies=
        --retriever-score-scaling --block-data-path= --embedding-path= --indexer-batch-size=
        --indexer-log-interval= --output-bert-embeddings --bert-embedder-type= --rl-prompts-per-eval=
        --grpo-prompts-per-step= --grpo-group-size= --grpo-iterations= --grpo-clamp-eps-lower=
        --grpo-clamp-eps-upper= --grpo-kl-beta= --grpo-entropy-term-weight=
        --grpo-filter-groups-with-same-reward --langrl-inference-server-type=
        --langrl-inference-server-conversation-template= --langrl-external-server --no-langrl-external-server
        --langrl-env-config= --rl-default-temperature= --rl-default-top-p= --rl-default-top-k=
        --rl-offload-optimizer-during-inference --rl-offload-kv-cache-during-training
        --no-rl-offload-kv-cache-during-training --rl-remove-kv-cache-during-training
        --no-rl-remove-kv-cache-during-training --rl-reset-cuda-graphs --no-rl-reset-cuda-graphs
        --rl-partial-rollouts --no-rl-partial-rollouts --rl-inference-logprobs-is-correction
        --no-rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef=
        --rl-use-sequence-packing --no-rl-use-sequence-packing --rl-sequence-packing-max-sequences-per-bin=
        --rl-sequence-packing-algo= --rl-training-cuda-graphs --no-rl-training-cuda-graphs
        --rl-inference-tensor-model-parallel-size= --rl-inference-pipeline-model-parallel-size=
        --rl-inference-expert-model-parallel-size= --rl-inference-expert-tensor-model-parallel-size=
        --rl-inference-model-unified-memory-level= --rl-offload-inference-model-weights-when-idle
        --no-rl-offload-inference-model-weights-when-idle --refit-method= --rl-verify-model-weights-swap
        --no-rl-verify-model-weights-swap --rl-parallel-generation-tasks= --rl-skip-bos-token
        --no-rl-skip-bos-token""",
    ),
    FlagFamily(
        "Fit of checkpoints",
        "a checkpoint always has to fit the model, tensor by tensor",
        """--dist-ckpt-strictness=""",
    ),
)

REFUSED: tuple[FlagFamily, ...] = (
    FlagFamily("Old name", "use --micro-batch-size", "--batch-size="),
    FlagFamily("Old name", "use --lr-warmup-fraction, --lr-warmup-iters or --lr-warmup-samples", "--warmup="),
    FlagFamily("Old name", "use --tensor-model-parallel-size", "--model-parallel-size="),
    FlagFamily("Old name", "use --recompute-granularity", "--checkpoint-activations"),
    FlagFamily("Old name", "use --apply-wd-to-qk-layernorm", "--no-weight-decay-cond-type="),
    FlagFamily("Other name", "use --config FILE.yaml", "--yaml-cfg="),
    FlagFamily("Other name", "use --num-layers", "--encoder-num-layers= --decoder-num-layers="),
    FlagFamily("Other name", "use --seq-length", "--encoder-seq-length= --decoder-seq-length="),
    FlagFamily(
        "Other name", "use --make-vocab-size-divisible-by", "--padded-vocab-size= --vocab-extra-ids=0"
    ),
    FlagFamily("Other name", "--exit-signal-handler waits for SIGTERM and SIGUSR1", "--exit-signal=SIGTERM"),
    FlagFamily("Other name", "use --load with --finetune", "--pretrained-checkpoint="),
    FlagFamily(
        "Other name", "for a teacher with code of its own use --let-trust-remote-code", "--trust-remote-code"
    ),
    FlagFamily(
        "Comes later",
        "it comes in a later version",
        "--kd-weight= --kd-temperature= --kd-stop-iters=",
    ),
    FlagFamily(
        "Settings out of a checkpoint",
        "give the settings on the command line or in --config; a checkpoint only checks them",
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args",
    ),
    FlagFamily(
        "Mixture of experts",
        "mixture of experts is not supported",
        """--num-experts=0 --expert-model-parallel-size=1 --moe-extended-tp --overlap-moe-expert-parallel-comm
        --ep-overlap-early-attn-memory-release --use-fused-weighted-squared-relu --moe-use-upcycling
        --moe-layer-recompute""",
    ),
    FlagFamily(
        "Multi-token prediction",
        "multi-token prediction is not supported",
        "--mtp-num-layers= --mtp-standalone",
    ),
    FlagFamily(
        "Multi-latent attention",
        "multi-latent attention is not supported; use --group-query-attention",
        "--multi-latent-attention",
    ),
    FlagFamily(
        "Other attention",
        "only causal softmax attention over the whole sequence is supported",
        """--experimental-attention-variant= --window-size= --softmax-type=vanilla --attention-output-gate
        --qk-l2-norm --qk-clip --batch-invariant-mode""",
    ),
    FlagFamily(
        "Other positions",
        "positions are learned, rotary on every layer, or none",
        "--rope-type=rope --no-rope-freq= --mrope-section=",
    ),
    FlagFamily(
        "Other layers",
        "the MLP is GELU, squared ReLU or SwiGLU, with the residual taken before the norm",
        """--openai-gelu --quick-geglu --glu-linear-offset=0.0 --activation-func-clamp-value=
        --apply-residual-connection-post-layernorm --use-te-activation-func""",
    ),
    FlagFamily(
        "Hybrid and other models",
        "only GPT models of megatron-core with equal layers are supported",
        """--use-legacy-models --spec= --is-hybrid-model --hybrid-attention-ratio=0.0 --hybrid-mlp-ratio=0.0
        --hybrid-override-pattern= --heterogeneous-layers-config-path=
        --heterogeneous-layers-config-encoded-json=""",
    ),
    FlagFamily(
        "Other initialisation",
        "weights and random streams start in Megatron-LM's default way",
        "--init-method-xavier-uniform --data-parallel-random-init --te-rng-tracker",
    ),
    FlagFamily(
        "FP4 and other number types",
        "fp32, fp16, bf16 and Transformer Engine's FP8 recipes are supported",
        """--fp4-format= --fp4-param-gather --fp4-quantizer-factory= --fp8-quantizer-factory=
        --te-precision-config-file= --use-kitchen-attention --kitchen-config-file= --kitchen-recipe-number=
        --fp16-lm-cross-entropy""",
    ),
    FlagFamily(
        "Low-precision optimizer",
        "the optimizer's state is fp32",
        """--use-precision-aware-optimizer --main-grads-dtype=fp32 --main-params-dtype=fp32 --exp-avg-dtype=fp32
        --exp-avg-sq-dtype=fp32""",
    ),
    FlagFamily(
        "Offloading to the CPU",
        "nothing is offloaded, so the run would need more memory than you expect; use --recompute-granularity or "
        "--use-distributed-optimizer",
        """--optimizer-cpu-offload --use-torch-optimizer-for-cpu-offload --cpu-offloading-num-layers=0
        --fine-grained-activation-offloading""",
    ),
    FlagFamily(
        "FSDP",
        "FSDP is not supported; use --use-distributed-optimizer",
        """--use-megatron-fsdp --data-parallel-sharding-strategy=no_shard --outer-dp-sharding-strategy=no_shard
        --no-gradient-reduce-div-fusion --fsdp-double-buffer --fsdp-manual-registration
        --keep-fp8-transpose-cache --enable-full-sharding-in-hsdp --init-model-with-meta-device
        --use-torch-fsdp2 --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load""",
    ),
    FlagFamily(
        "Other layouts",
        "the layouts are tensor, sequence, pipeline, interleaved, context and data parallel",
        """--pipeline-model-parallel-layout= --hierarchical-context-parallel-sizes= --hybrid-context-parallel
        --max-seqlen-per-dp-cp-rank= --num-distributed-optimizer-instances=1 --fake-process-group""",
    ),
    FlagFamily(
        "Other batches",
        "every iteration trains on the next whole global batch",
        "--decrease-batch-size-if-needed --iterations-to-skip= --result-rejected-tracker-filename=",
    ),
    FlagFamily(
        "Other data",
        "data are .bin/.idx files on a file system, read once in order",
        """--dataloader-type=single --phase-transition-iterations= --mid-level-dataset-surplus=0.005
        --allow-ambiguous-pad-tokens --object-storage-cache-path= --sample-rate=1.0 --fim-data --sft""",
    ),
    FlagFamily(
        "Other token ids",
        "the tokenizer's own files say what the ids are",
        """--tokenizer-metadata= --tokenizer-special-tokens= --tokenizer-sentencepiece-legacy
        --tokenizer-hf-include-special-tokens""",
    ),
    FlagFamily(
        "Other validation",
        "validation runs --eval-iters iterations on one data set",
        "--full-validation --multiple-validation-sets --test-mode",
    ),
    FlagFamily(
        "Other checkpoints",
        "checkpoints are torch_dist directories under --save, loaded whole and written at --save-interval",
        """--non-persistent-save-interval= --non-persistent-ckpt-type= --non-persistent-global-ckpt-dir=
        --non-persistent-local-ckpt-dir= --replication --ckpt-convert-format= --ckpt-convert-save=
        --ckpt-convert-update-legacy-dist-opt-format --dist-ckpt-format=torch_dist --load-main-params-from-ckpt
        --dist-ckpt-save-pre-mcore-014 --save-wgrads-interval= --save-dgrads-interval=""",
    ),
    FlagFamily(
        "Error injection",
        "no errors are injected",
        "--error-injection-rate=0",
    ),
    FlagFamily(
        "Other models and other training",
        "only GPT pretraining is supported",
        "--ict-load= --bert-load= --vision-pretraining --perform-rl-step",
    ),
)


def family_of(flag: str, families: tuple[FlagFamily, ...]) -> FlagFamily | None:
    """Return the family that `flag` is in, if any."""
    return next((family for family in families if flag in family.entries()), None)


def is_foreign(flag: str) -> bool:
    """Return whether `flag` is Megatron-LM's and no setting here."""
    return family_of(flag, REFUSED) is not None or family_of(flag, WITHOUT_EFFECT) is not None
