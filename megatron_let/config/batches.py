"""Arithmetic of batches, ranks and vocabulary: Megatron-LM's rules as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_let.config.run_config import RunConfig


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Return `vocab_size` rounded up to a multiple of `divisible_by * tensor_parallel_size`."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the number of data-parallel replicas; the world size must be a multiple of TP x PP x CP."""
    return world_size // model_parallel_size(config)


def model_parallel_size(config: RunConfig) -> int:
    """Return TP x PP x CP, the ranks of one replica."""
    sizes = config.transformer
    product: int = (
        sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    )
    return product


def virtual_pipeline_size(config: RunConfig) -> int | None:
    """Return the model chunks of each pipeline rank, None without the interleaved schedule.

    Also None while the numbers do not divide; `validate` says so.
    """
    parallel, transformer = config.parallel, config.transformer
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    stages = transformer.pipeline_model_parallel_size
    if chunks is None and per_chunk and transformer.num_layers and stages > 0:
        chunks = pipeline_units(config) // stages // per_chunk
    return chunks if chunks is not None and chunks > 1 else None


def pipeline_units(config: RunConfig) -> int:
    """Return what is dealt out to pipeline stages: the layers, and embedding and loss where they count as one."""
    transformer = config.transformer
    units: int = transformer.num_layers
    units += transformer.account_for_embedding_in_pipeline_split
    return units + transformer.account_for_loss_in_pipeline_split


def layers_of_chunks(config: RunConfig) -> list[int]:
    """Return how many layers each model chunk has, in the order of the layers; a stage is one chunk without virtual stages.

    For settings that the rules on pipelines have passed.
    """
    transformer, chunks = config.transformer, virtual_pipeline_size(config) or 1
    stages = transformer.pipeline_model_parallel_size
    first, last = (
        transformer.num_layers_in_first_pipeline_stage,
        transformer.num_layers_in_last_pipeline_stage,
    )
    between = stages - (first is not None) - (last is not None)
    even = (pipeline_units(config) - (first or 0) - (last or 0)) // max(1, between)
    per_stage = [even] * stages
    per_stage[0], per_stage[-1] = first or per_stage[0], last or per_stage[-1]
    found = [layers // chunks for _ in range(chunks) for layers in per_stage]
    found[0] -= transformer.account_for_embedding_in_pipeline_split
    found[-1] -= transformer.account_for_loss_in_pipeline_split
    return found


@dataclass(frozen=True)
class BatchPlan:
    """Global batch size as a function of the sequences already consumed (Megatron-LM's batch ramp-up).

    With ramp-up the batch starts at `start` and grows by `increment` in equal shares of `samples`; a share that
    is no whole number ends at the first iteration past it. After more than `samples` sequences it is full.
    """

    micro_batch_size: int
    data_parallel_size: int
    full: int
    """Global batch size after ramp-up."""
    rampup: tuple[int, int, int] | None = None
    """start, increment, samples."""

    def global_batch_size(self, consumed_samples: int) -> int:
        """Return the global batch size of the iteration that begins after `consumed_samples` sequences."""
        if self.rampup is None or consumed_samples > self.rampup[2]:
            return self.full
        start, increment, samples = self.rampup
        increments = (self.full - start) // increment
        if increments == 0 or samples == 0:
            return self.full
        return start + int(consumed_samples / (samples / increments)) * increment

    def sizes(self) -> list[int]:
        """Return every global batch size of the run, smallest first."""
        if self.rampup is None or self.rampup[2] == 0:
            return [self.full]
        start, increment, _ = self.rampup
        return [*range(start, self.full, increment), self.full]

    def num_microbatches(self, consumed_samples: int) -> int:
        """Return the microbatches of each replica in the iteration after `consumed_samples` sequences."""
        return self.global_batch_size(consumed_samples) // (self.micro_batch_size * self.data_parallel_size)

    def iterations_of_samples(self, samples: int) -> int:
        """Return how many iterations `samples` sequences give; a last part batch is left out, in ramp-up too."""
        iterations, consumed = 0, 0
        while self.rampup is not None and consumed <= self.rampup[2]:
            size = self.global_batch_size(consumed)
            if consumed + size > samples:
                return iterations
            consumed += size
            iterations += 1
        return iterations + (samples - consumed) // self.full

    def samples_of_iterations(self, iterations: int, consumed: int = 0) -> int:
        """Return the sequences consumed after `iterations` more iterations."""
        for done in range(iterations):
            if self.rampup is None or consumed > self.rampup[2]:
                return consumed + (iterations - done) * self.full
            consumed += self.global_batch_size(consumed)
        return consumed


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """Return the batch plan of a run, the default global batch (one microbatch a replica) filled in."""
    training = config.training
    replicas = data_parallel_size(config, world_size)
    micro = training.micro_batch_size or 1
    return BatchPlan(
        micro, replicas, training.global_batch_size or micro * replicas, training.rampup_batch_size
    )


def train_iterations(config: RunConfig, world_size: int) -> int:
    """Return the length of the run in iterations, computed from samples and ramp-up where it is given so."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    return batch_plan(config, world_size).iterations_of_samples(training.train_samples or 0)
