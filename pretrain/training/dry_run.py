"""The largest batches of a run, computed once before its first step, so that a lack of memory shows early."""

from __future__ import annotations

import torch

from pretrain.config.errors import ConfigError
from pretrain.data import TokenBatch
from pretrain.training.trainer import Trainer


def wants_dry_run(trainer: Trainer) -> bool:
    """Return whether `watch.dry_run` asks for one, and this engine allows it."""
    config, wanted = trainer.config, trainer.config.watch.dry_run
    if wanted is None:
        wanted = trainer.engine.device.type == "cuda"
    # A rank without memory would leave the others waiting for its weights. Stage 3 also gathers them by hooks that
    # record in which order the layers were called.
    return wanted and not config.engine.shards_weights


def dry_run(trainer: Trainer) -> None:
    """Run the largest micro-batch forward and backward, and the validation batch forward; a collective.

    Weights, gradients, random generators and data stay as they are: the tokens are made up, and the gradients are
    returned by autograd instead of being accumulated, which also leaves out the hooks of DDP and DeepSpeed. Meanwhile
    memory of the size of the gradients is held, since all but the first micro-batch of a step find them there.

    Raises:
        ConfigError: the memory of this rank's device does not suffice.
        PeerError: that of another rank does not.
    """
    config, engine = trainer.config, trainer.engine
    train, rows = config.train, config.train.micro_batch_sequences
    validates = config.data.validation_fraction > 0
    more = (config.validation.batch_sequences or 0) if validates else 0

    def attempt() -> None:
        devices = [engine.device] if engine.device.type == "cuda" else []
        key, size = "train.micro_batch_sequences", rows
        try:
            with torch.random.fork_rng(devices=devices):
                _train_batch(trainer, rows, hold_gradients=config.accumulation(engine.world_size) > 1)
                if more > rows:
                    key, size = "validation.batch_sequences", more
                    _validation_batch(trainer, more)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                [
                    f"{key}: {size} sequences of {config.sequence_length} tokens do not fit into the memory of "
                    f"{engine.device} of rank {engine.rank}: {str(error).splitlines()[0]} Lower {key}, or see "
                    f"`aurora plan` for what needs the memory (train.activation_checkpointing is "
                    f"{train.activation_checkpointing})"
                ]
            ) from error

    engine.ranks.together(attempt)
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _batch(trainer: Trainer, rows: int) -> TokenBatch:
    """Full sequences, each of one document."""
    length = trainer.config.sequence_length
    other = 0 if trainer.eos_id else 1  # any token that does not end a document
    tokens = torch.full((rows, length + 1), other, dtype=torch.int32)
    return TokenBatch(tokens, torch.full((rows,), length, dtype=torch.int32))


def _train_batch(trainer: Trainer, rows: int, hold_gradients: bool) -> None:
    module = trainer.engine.module
    parameters = [p for p in module.parameters() if p.requires_grad]
    held = [torch.empty_like(p) for p in parameters] if hold_gradients else []
    loss = trainer.loss_sum(_batch(trainer, rows), module)
    torch.autograd.grad(loss, parameters, allow_unused=True)
    del held


@torch.no_grad()
def _validation_batch(trainer: Trainer, rows: int) -> None:
    module = trainer.engine.module
    module.eval()
    try:
        trainer.loss_sum(_batch(trainer, rows), module)
    finally:
        module.train()
