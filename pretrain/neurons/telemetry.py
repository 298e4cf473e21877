"""Neuron telemetry: which neurons of the MLPs are still learning.

Every n steps it measures, for every MLP, the leverage of each row of gate_proj and up_proj and of each column of
down_proj, the squared norm of the same rows and columns in the direction that the optimizer applied, and the mean
absolute activation of each neuron over a fixed part of the validation split. `pretrain.neurons.measures` defines these
quantities. Shares and percentiles are added to the step's record in metrics.jsonl; the values of every neuron are
written to ``telemetry/step-N.safetensors``.

Leverage is computed from b, an exponential moving average (factor 0.95) of the clipped gradients, kept by
`pretrain.neurons.watched`. It is the same quantity for every optimizer and engine. The average is saved with the
checkpoint; if telemetry is turned on when a run is resumed, it starts at zero.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.store import CheckpointReader
from pretrain.checkpoint.tensor_file import save_file
from pretrain.config.telemetry import TelemetryConfig
from pretrain.data import TokenBatch
from pretrain.files import replacing, set_aside
from pretrain.neurons import measures as neurons
from pretrain.neurons.watched import WatchedMatrices
from pretrain.training.hooks import Hook, StepContext, is_due

_FILE = re.compile(r"step-(\d{8,})\.safetensors")


class Telemetry(Hook):
    """Measures the neurons without changing the run.

    Args:
        settings: the `telemetry` section.
        model: the language model, as prepared by the engine.
        matrices: its watched matrices; they are registered to observe every gradient from now on.
        folder: where the arrays of each measurement are written.
        batches: returns the validation split; if it is empty, activations are not measured.
        show: prints a line on rank 0.
        warn: called if a file cannot be written or read, which does not end the run.
    """

    phase = "telemetry"

    def __init__(
        self,
        settings: TelemetryConfig,
        model: nn.Module,
        matrices: WatchedMatrices,
        folder: Path,
        batches: Callable[[], Sequence[TokenBatch]],
        show: Callable[[str], None],
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.folder, self.show, self.warn = settings, folder, show, warn
        self.model, self.matrices, self._batches = model, matrices, batches
        self._survivors = _Survivors(settings.reference_step)
        matrices.optimizer.gradient_observer = matrices.move_averages

    def due(self, step: int, last: bool) -> bool:
        """Return True every `telemetry.every_steps` steps, at the reference step and after the last step."""
        return is_due(self.settings.every_steps, step, last) or step == self.settings.reference_step

    def before_step(self, context: StepContext) -> None:
        """Start recording directions if the step will be measured."""
        if self.due(context.step, context.last):
            self.matrices.watch_directions(True)

    @torch.no_grad()
    def run(self, context: StepContext) -> dict[str, Any]:
        """Measure, on every rank if parameters are sharded and else on rank 0; only rank 0 returns results."""
        started, step = time.perf_counter(), context.step
        batches = self._fixed_batches()
        found: dict[str, Any] = {}
        self.matrices.gather_directions()
        if self.matrices.here:
            measured = self.matrices.measure(context.taken())
            activations = self._activations(context, batches)
            if context.engine.rank == 0:
                arrays = _arrays(measured) | activations
                found = summary(arrays) | _weight_variation(measured) | {"telemetry/dead_forever": None}
                # All ranks learn of an error of ours.
                context.write(lambda: found.update({"telemetry/dead_forever": self._keep(step, arrays)}))
                found["telemetry/seconds"] = round(time.perf_counter() - started, 4)
                self.show(_line(step, found))
        self.matrices.watch_directions(False)
        return found

    def _keep(self, step: int, arrays: Mapping[str, Tensor | None]) -> float | None:
        """Write a measurement; return the share of neurons that have been dead since the reference step."""
        forever = None
        try:
            forever = self._survivors.follow(step, _leverages(arrays), self.folder)
            save_arrays(self.folder, step, arrays)
        except (OSError, SafetensorError) as error:  # the latter from a damaged file of an earlier measurement
            self.warn(f"the measurements of step {step} were not kept in {self.folder}: {error}")
        return forever

    def fragments(self) -> Iterable[Fragment]:
        """Yield the averages of the gradients."""
        return self.matrices.fragments()

    def restore(self, reader: CheckpointReader) -> None:
        """Restore the averages from a checkpoint that contains them."""
        self.matrices.restore(reader)

    def rewind(self, step: int) -> None:
        """Move the measurements of later steps aside, and forget them."""
        self._survivors = _Survivors(self.settings.reference_step)
        for measured, path in measurements(self.folder):
            if measured > step:
                set_aside(path)

    def _fixed_batches(self) -> list[TokenBatch]:
        """Return the batches with the first `activation_sequences` validation sequences; a collective."""
        batches: list[TokenBatch] = []
        for batch in self._batches():
            if sum(len(b.lengths) for b in batches) < self.settings.activation_sequences:
                batches.append(batch)
        return batches

    def _activations(self, context: StepContext, batches: Sequence[TokenBatch]) -> dict[str, Tensor | None]:
        """Return the mean absolute activation of every neuron (the input of down_proj), relative to its layer's mean.

        Every rank that measures runs the same batches, because under ZeRO 3 a forward pass is a collective.
        """
        named = (getattr(module, "down_proj", None) for module in self.model.modules())
        layers = [layer for layer in named if isinstance(layer, nn.Linear)]
        if not batches:
            return {f"layers.{index}.activation": None for index in range(len(layers))}
        engine = context.engine
        device, module = engine.device, engine.module
        totals = [torch.zeros(layer.in_features, dtype=torch.float64, device=device) for layer in layers]
        valid: Tensor

        def add_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                total.add_(inputs[0][valid].abs().sum(dim=0, dtype=torch.float64))

            return hook

        handles = [layer.register_forward_pre_hook(add_to(total)) for layer, total in zip(layers, totals, strict=True)]
        # What is compiled would not call the new hooks.
        eager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if engine.config.train.compile:
            eager = torch.compiler.set_stance("force_eager")
        module.eval()
        try:
            for batch in batches:
                positions = torch.arange(batch.tokens.shape[1] - 1, device=device)
                valid = positions < batch.lengths.to(device)[:, None]
                with eager:
                    context.loss_sum(batch, module)
        finally:
            module.train()
            for handle in handles:
                handle.remove()
        return {f"layers.{index}.activation": neurons.relative(total) for index, total in enumerate(totals)}


class _Survivors:
    """Tracks the neurons that have been dead at the reference step and at every measurement since.

    They are not saved in checkpoints, because they can be computed from the files of earlier measurements.
    """

    def __init__(self, reference_step: int) -> None:
        self.reference_step = reference_step
        self._counted = 0
        self._dead: dict[str, Tensor] | None = None

    def follow(self, step: int, leverages: Mapping[str, Tensor], folder: Path) -> float | None:
        """Add a measurement; return the share of neurons still dead.

        None up to the reference step, if it was not measured, or if no neuron was dead then.
        """
        if step < self.reference_step:
            return None
        if self._dead is None:
            earlier = [(s, path) for s, path in measurements(folder) if self.reference_step <= s < step]
            if step != self.reference_step and (not earlier or earlier[0][0] != self.reference_step):
                return None  # the reference step was not measured
            for s, path in earlier:
                self._take(s, _leverages(load_arrays(path)))
        self._take(step, leverages)
        if step == self.reference_step or not self._counted or self._dead is None:
            return None
        return sum(int(dead.sum()) for dead in self._dead.values()) / self._counted

    def _take(self, step: int, leverages: Mapping[str, Tensor]) -> None:
        dead = {name: values.cpu() < neurons.DEAD for name, values in leverages.items()}
        if step == self.reference_step:
            self._dead, self._counted = dead, sum(int(rows.sum()) for rows in dead.values())
        elif self._dead is not None:
            # If leverage is undefined for a matrix at this measurement, its neurons keep their status.
            self._dead = {name: rows & dead.get(name, rows) for name, rows in self._dead.items()}


def summary(arrays: Mapping[str, Tensor | None]) -> dict[str, float | None]:
    """Summarise a measurement as numbers with flat keys; None where a quantity is undefined.

    ``telemetry/layers.0.gate_proj/<quantity>`` describes one matrix, ``telemetry/layers.0/<quantity>`` the activations
    of a layer, ``telemetry/<quantity>`` all rows of gate_proj and up_proj or all activations, and
    ``telemetry/down_proj/<quantity>`` all columns of down_proj.
    """
    found: dict[str, float | None] = {}
    together: dict[str, list[float]] = defaultdict(list)
    for key, values in arrays.items():
        name, _, kind = key.rpartition(".")
        group = "telemetry/down_proj" if name.endswith("down_proj") else "telemetry"
        for quantity, value in _quantities(kind, values).items():
            found[f"telemetry/{name}/{quantity}"] = value
            if not quantity.startswith("leverage_p"):
                # All matrices have the same number of neurons, so the mean of the shares is the overall share.
                together[f"{group}/{quantity}"] += [] if value is None else [value]
    return {key: sum(values) / len(values) if values else None for key, values in together.items()} | found


def _quantities(kind: str, values: Tensor | None) -> dict[str, float | None]:
    """Return the summary numbers of one array of kind `leverage`, `direction` (squared norms) or `activation`."""
    below = neurons.share_below
    if kind == "leverage":
        shares = {f"leverage_below_{limit:g}": below(values, limit) for limit in (0.05, 0.01)}
        points = {f"leverage_{point}": value for point, value in neurons.percentiles(values).items()}
        dead = {"leverage_dead": below(values, neurons.DEAD)}
        return dead | shares | points | {"leverage_cv": neurons.variation(values)}
    if kind == "direction":
        norms = None if values is None else values.sqrt()
        return {"starved": below(values, neurons.DEAD), "direction_cv": neurons.variation(norms)}
    return {"activation_dead": below(values, neurons.DEAD), "activation_below_0.01": below(values, 0.01)}


def _leverages(arrays: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return only the leverages of gate_proj and up_proj."""
    inner = ("gate_proj.leverage", "up_proj.leverage")
    return {key: values for key, values in arrays.items() if values is not None and key.endswith(inner)}


def _arrays(measured: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return leverage and direction of every neuron in every matrix, relative to their means; None if undefined."""
    found: dict[str, Tensor | None] = {}
    for key, values in measured.items():
        if key.endswith(".leverage"):
            found[key] = values if bool(values.any()) else None
        elif key.endswith(".direction"):
            found[key] = neurons.relative(values)
    return found


def _weight_variation(measured: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Return the coefficient of variation of the neurons' weight norms, per matrix."""
    squares = {key.removesuffix(".weight"): values for key, values in measured.items() if key.endswith(".weight")}
    return {f"telemetry/{name}/weight_cv": neurons.variation(values.sqrt()) for name, values in squares.items()}


def _line(step: int, found: Mapping[str, Any]) -> str:
    """Return the line that is printed for a measurement."""
    named = {"leverage_dead": "leverage-dead", "starved": "starved", "activation_dead": "activation-dead"}
    values = {text: found.get(f"telemetry/{key}") for key, text in named.items()}
    values["dead ever since"] = found["telemetry/dead_forever"]
    shares = ", ".join(f"{text} {value:.1%}" for text, value in values.items() if value is not None)
    return (
        f"neurons after step {step}: {shares or 'nothing defined yet'} (measured in {found['telemetry/seconds']:.2f} s)"
    )


def save_arrays(folder: Path, step: int, arrays: Mapping[str, Tensor | None]) -> Path:
    """Write one measurement atomically, as fp32, without the arrays that are None; return the file's path.

    Raises:
        OSError: it cannot be written, or the run folder is not there, as after its disk was unmounted.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    kept = {key: values.float().cpu().contiguous() for key, values in arrays.items() if values is not None}
    with replacing(path) as partial:
        save_file(kept, partial)
    return path


def load_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of one measurement."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def measurements(folder: Path) -> list[tuple[int, Path]]:
    """Return the step and the file of every measurement, in order."""
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
