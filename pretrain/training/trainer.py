"""The training loop.

Setting up, choosing what to resume from, signals and errors are one level up, in `pretrain.launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optimizers import Aurora
from pretrain.checkpoint.store import FORMAT, Index
from pretrain.config import Config
from pretrain.data import TokenBatch, TokenStream
from pretrain.data.masks import attention_inputs
from pretrain.engine.base import Engine, accumulation
from pretrain.model.build import IGNORED
from pretrain.model.cost import flops_per_token
from pretrain.planning.devices import peak_flops
from pretrain.training.schedule import lr_factor
from pretrain.training.timing import PhaseClock


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is untouched."""


@dataclass
class TrainState:
    """The counters that the loop owns. With the weights, the optimizer, the data stream and the random generators
    they are everything that a checkpoint has to hold."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens: int = 0
    """Tokens of the batches trained on, as the schedule counts them: `global_batch_tokens` a step."""
    skipped_steps: int = 0
    """Steps skipped for non-finite gradients."""
    skipped_in_a_row: int = 0
    """Of these, the ones since the last step that was taken."""
    train_seconds: float = 0.0
    """Time spent in steps, without validation, saving and set-up."""
    train_loss: float | None = None
    """Loss of the last step that was taken."""
    validation_loss: float | None = None
    """Last validation loss, in nats per token."""
    bits_per_byte: float | None = None
    """Last validation bits per byte."""


class Hook:
    """Periodic work that changes nothing in the run: same weights with it or without, bit for bit."""

    def before_step(self, trainer: Trainer) -> None:
        """Prepare for the optimizer step that is about to be made, on every rank."""

    def due(self, step: int, last: bool) -> bool:
        """Whether it runs after this step; `last` is the run's last."""
        raise NotImplementedError

    def run(self, trainer: Trainer) -> dict[str, Any]:
        """Do it, on every rank; what is returned joins the step's line in metrics.jsonl."""
        raise NotImplementedError


class Trainer:
    """Owns the loop and its counters.

    Args:
        config: the run.
        engine: prepared with the model.
        optimizer: over the engine's parameters.
        stream: training batches, positioned where `state` says.
        state: counters, fresh or restored.
        hooks: periodic work.
        log: called on every rank with each step's record.
        save: called on every rank to save a checkpoint of the current state.
        stop_requested: asked on every rank after each step; true on any of them stops all.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        optimizer: Aurora,
        stream: TokenStream,
        *,
        eos_id: int,
        state: TrainState | None = None,
        hooks: Sequence[Hook] = (),
        log: Callable[[dict[str, Any]], None] = lambda record: None,
        save: Callable[[Trainer], None] = lambda trainer: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.engine, self.optimizer, self.stream = config, engine, optimizer, stream
        self.eos_id = eos_id
        self.state = state or TrainState()
        self.hooks, self.log, self.save, self.stop_requested = hooks, log, save, stop_requested
        self.base_lrs = base_lrs(config, optimizer)
        self.micro_batches = accumulation(config, engine.world_size)
        self.flops_per_token = flops_per_token(config.model, config.sequence_length)
        bf16 = torch.bfloat16 in (engine.precision.autocast, engine.precision.weights)
        self.peak_flops = peak_flops(engine.device, bf16, config.train.peak_tflops)
        self._checked = False

    def fit(self, stop_at: int | None = None) -> Literal["done", "stopped"]:
        """Train to the end, to `stop_at` (a step number), or until a stop is requested.

        The last state is saved in each case, once.

        Raises:
            TrainingError: too many steps in a row had non-finite gradients.
        """
        config, state = self.config, self.state
        while state.step < config.total_steps:
            clock = PhaseClock(self.engine.device)
            batch = self.stream.next_batch(config.global_batch_sequences)
            clock.mark("data")
            lrs = self.set_learning_rates()
            loss = self.forward_backward(batch)
            clock.mark("forward_backward")
            for hook in self.hooks:
                hook.before_step(self)
            grad_norm = self.engine.step(self.optimizer)
            clock.mark("optimizer")

            state.step += 1
            state.tokens += config.train.global_batch_tokens
            record, stop = self.measure(loss, grad_norm)  # the one host sync of the step
            record |= lrs | self.rates(clock)
            record["batch_sha256"] = batch.sha256()
            self.check_ranks(record["batch_sha256"])

            last = state.step == config.total_steps
            stop |= stop_at is not None and state.step >= stop_at
            for hook in self.hooks:
                if hook.due(state.step, last):
                    record |= hook.run(self)
            self.log(record)
            if last or stop or state.step % config.checkpoint.save_every_steps == 0:
                self.save(self)
            self.check_health()
            if stop and not last:
                return "stopped"
        return "done"

    def forward_backward(self, batch: TokenBatch) -> Tensor:
        """Gradients of the mean loss over the whole global batch; returns this rank's share of that mean."""
        targets = batch.num_targets
        total = torch.zeros((), device=self.engine.device)
        own = self.own_rows()
        for index, rows in enumerate(own):
            with self.engine.accumulate(last=index == len(own) - 1):
                loss = self.loss_sum(batch.slice(rows)) / targets
                self.engine.backward(loss)
            total += loss.detach()
        return total

    def own_rows(self) -> list[slice]:
        """This rank's rows of the global batch, one slice a micro-batch."""
        size = self.config.train.micro_batch_sequences
        first = self.engine.rank * self.micro_batches
        return [slice((first + i) * size, (first + i + 1) * size) for i in range(self.micro_batches)]

    def loss_sum(self, rows: TokenBatch, module: Callable[..., Tensor] | None = None) -> Tensor:
        """Cross-entropy summed over the targets of `rows`, under the engine's precision.

        `module` is what to call instead of the engine's wrapped model.
        """
        tokens = rows.tokens.to(self.engine.device, torch.int64)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        lengths = rows.lengths.to(self.engine.device)
        valid = torch.arange(labels.shape[1], device=self.engine.device) < lengths[:, None]
        data = self.config.data
        mask, positions = attention_inputs(
            inputs, self.eos_id, document_mask=data.document_mask, reset_positions=data.reset_positions
        )
        with self.engine.autocast():
            return (module or self.engine.model)(inputs, labels.where(valid, IGNORED), mask, positions)

    def set_learning_rates(self) -> dict[str, float]:
        """Set every group's rate for this step; returns what is logged."""
        train = self.config.train
        factor = lr_factor(self.config.schedule, self.state.tokens, train.global_batch_tokens, train.total_tokens)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        groups = self.optimizer.param_groups
        lrs = {"lr": next((group for group in groups if group["role"] == "hidden"), groups[0])["lr"]}
        own = self.config.optimizer.adamw.lrs()
        for group in groups:
            if group["kind"] == "adamw":
                lrs[f"{group['role']}_lr" if group["role"] in own else "adamw_lr"] = group["lr"]
        return lrs

    def measure(self, loss: Tensor, grad_norm: Tensor) -> tuple[dict[str, Any], bool]:
        """The step's loss and norm, whether it was skipped, and whether any rank wants to stop."""
        stop = torch.tensor(float(self.stop_requested()), device=loss.device)
        loss_sum, stops = self.engine.sum_over_ranks(torch.stack([loss, stop])).unbind()
        optimizer = self.optimizer
        reports = (grad_norm, optimizer.last_step_finite, optimizer.last_step_fallbacks, optimizer.last_step_retries)
        values = torch.stack([loss_sum, stops, *(report.to(loss.device, torch.float32) for report in reports)])
        mean, stopping, norm, taken, fallbacks, retries = values.tolist()
        state = self.state
        if taken:
            state.skipped_in_a_row, state.train_loss = 0, mean
        else:
            state.skipped_in_a_row += 1
            state.skipped_steps += 1
        record = {"step": state.step, "tokens": state.tokens, "loss": mean, "grad_norm": norm}
        record |= {"balance_fallbacks": int(fallbacks), "cholesky_retries": int(retries)}
        if not taken:
            record["skipped"] = True
        return record, stopping > 0

    def rates(self, clock: PhaseClock) -> dict[str, float]:
        """Throughput and timings of the step just taken; `mfu` only where the device's peak is known."""
        seconds = clock.total()
        self.state.train_seconds += seconds
        per_second = self.config.train.global_batch_tokens / seconds
        record = {
            "tokens_per_second": round(per_second, 1),
            "train_seconds": round(self.state.train_seconds, 3),
            "step_seconds": round(seconds, 6),
            **clock.seconds(),
        }
        if self.peak_flops:
            peak = self.peak_flops * self.engine.world_size
            record["mfu"] = round(per_second * self.flops_per_token / peak, 5)
        return record

    def check_ranks(self, batch: str) -> None:
        """Once per launch: the ranks have equal weights although they trained on different rows."""
        if not self._checked:
            rows = self.own_rows()
            self.engine.check_in_step(batch, range(rows[0].start, rows[-1].stop))
            self._checked = True

    def check_health(self) -> None:
        """Give up when the gradients stay non-finite."""
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"step {self.state.step}: gradients were not finite for {self.state.skipped_in_a_row} steps in a "
                "row (train.max_skipped_steps); the weights are those before these steps. Lower the learning "
                "rates or look at the data"
            )


def base_lrs(config: Config, optimizer: Aurora) -> list[float]:
    """Each group's rate before the schedule. From the config, since a restored group holds a scheduled one."""
    optimizer_config = config.optimizer
    adamw = optimizer_config.adamw
    return [
        optimizer_config.lr if group["kind"] == "matrix" else adamw.lrs().get(group["role"], adamw.lr)
        for group in optimizer.param_groups
    ]


def checkpoint_index(trainer: Trainer, identity: dict[str, Any], groups: list[dict[str, Any]]) -> Index:
    """What the loop owns, for a checkpoint's index; a collective, since the stream's state is one."""
    return Index(
        format=FORMAT,
        step=trainer.state.step,
        world_size=trainer.engine.world_size,
        counters=asdict(trainer.state),
        config=trainer.config.resolved(),
        identity=identity,
        data_state=dict(trainer.stream.state()),
        optimizer_groups=groups,
        parameters={},
        provenance={},
        files={},
    )
