"""Neuron telemetry: which neurons of the MLPs still learn.

Every n steps, for every MLP: the leverage of each row of gate_proj and up_proj and of each column of down_proj, the
squared norm of the same rows and columns in the direction that the optimizer applied, and the mean activation of each
neuron over a fixed part of the validation split. What these mean is said in `pretrain.neurons.measures`; shares and
percentiles join the step's line in metrics.jsonl, every neuron's values go to ``telemetry/step-N.safetensors``.

Leverage is that of b, an average (factor 0.95) of the clipped gradients that `pretrain.neurons.watched` keeps; it is
the same quantity for every optimizer and engine. It is saved with the checkpoint; a run that turns telemetry on when it
is resumed starts it at zero.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.store import CheckpointReader
from pretrain.config.telemetry import TelemetryConfig
from pretrain.data import TokenBatch
from pretrain.files import replacing, set_aside
from pretrain.neurons import measures as neurons
from pretrain.neurons.watched import WatchedMatrices
from pretrain.training.hooks import Hook, StepContext, is_due

_FILE = re.compile(r"step-(\d{8,})\.safetensors")


class Telemetry(Hook):
    """Measures the neurons; changes nothing in the run.

    Args:
        settings: the `telemetry` section.
        model: the language model, as prepared by the engine.
        matrices: its watched matrices; from now on they see every gradient.
        folder: for the arrays of each measurement.
        batches: the validation split; empty where the run has none, and then activations are not measured.
        show: prints a line on rank 0.
    """

    def __init__(
        self,
        settings: TelemetryConfig,
        model: nn.Module,
        matrices: WatchedMatrices,
        folder: Path,
        batches: Callable[[], Sequence[TokenBatch]],
        show: Callable[[str], None],
    ) -> None:
        self.settings, self.folder, self.show = settings, folder, show
        self.model, self.matrices, self._batches = model, matrices, batches
        self._survivors = _Survivors(settings.reference_step)
        matrices.optimizer.gradient_observer = matrices.move_averages

    def due(self, step: int, last: bool) -> bool:
        """Every `telemetry.every_steps` steps, at the reference step and after the last."""
        return is_due(self.settings.every_steps, step, last) or step == self.settings.reference_step

    def before_step(self, context: StepContext) -> None:
        """Watch the directions of a step that will be measured."""
        if self.due(context.step, context.last):
            self.matrices.watch_directions(True)

    @torch.no_grad()
    def run(self, context: StepContext) -> dict[str, Any]:
        """Measure, on every rank that holds something that no other rank holds; rank 0 returns the results."""
        started, step = time.perf_counter(), context.step
        batches = self._fixed_batches()
        found: dict[str, Any] = {}
        if self.matrices.here:
            measured = self.matrices.measure(context.taken())
            activations = self._activations(context, batches)
            if context.engine.rank == 0:
                arrays = _arrays(measured) | activations
                forever = self._survivors.follow(step, _leverages(arrays), self.folder)
                save_arrays(self.folder, step, arrays)
                found = summary(arrays) | _weight_variation(measured) | {"telemetry/dead_forever": forever}
                found["telemetry/seconds"] = round(time.perf_counter() - started, 4)
                self.show(_line(step, found))
        self.matrices.watch_directions(False)
        return found

    def fragments(self) -> Iterable[Fragment]:
        """The averages of the gradients."""
        return self.matrices.fragments()

    def restore(self, reader: CheckpointReader) -> None:
        """Take the averages of a checkpoint, if it has them."""
        self.matrices.restore(reader)

    def rewind(self, step: int) -> None:
        """Set aside the measurements of later steps."""
        for measured, path in measurements(self.folder):
            if measured > step:
                set_aside(path)

    def _fixed_batches(self) -> list[TokenBatch]:
        """The first `activation_sequences` sequences of the validation split; reading them is a collective."""
        batches: list[TokenBatch] = []
        for batch in self._batches():
            if sum(len(b.lengths) for b in batches) < self.settings.activation_sequences:
                batches.append(batch)
        return batches

    def _activations(self, context: StepContext, batches: Sequence[TokenBatch]) -> dict[str, Tensor | None]:
        """The mean absolute activation of every neuron (what enters down_proj), over that of its layer.

        Every rank that measures runs the same batches: under ZeRO 3 a forward pass is a collective.
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
        module.eval()
        try:
            for batch in batches:
                positions = torch.arange(batch.tokens.shape[1] - 1, device=device)
                valid = positions < batch.lengths.to(device)[:, None]
                # A compiled module would not see the hooks; ZeRO 3 needs its own, on the module itself.
                context.loss_sum(batch, module.forward if engine.config.train.compile else module)
        finally:
            module.train()
            for handle in handles:
                handle.remove()
        return {f"layers.{index}.activation": neurons.relative(total) for index, total in enumerate(totals)}


class _Survivors:
    """The neurons that were dead at the reference step and at every measurement since.

    Not part of a checkpoint: the files of the measurements tell.
    """

    def __init__(self, reference_step: int) -> None:
        self.reference_step = reference_step
        self._counted = 0
        self._dead: dict[str, Tensor] | None = None

    def follow(self, step: int, leverages: Mapping[str, Tensor], folder: Path) -> float | None:
        """Take in a measurement; returns the share still dead, None without a later one or without any dead."""
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
            # A matrix that says nothing at a measurement leaves its neurons as they were.
            self._dead = {name: rows & dead.get(name, rows) for name, rows in self._dead.items()}


def summary(arrays: Mapping[str, Tensor | None]) -> dict[str, float | None]:
    """A measurement in numbers, under flat keys; None where a quantity says nothing.

    ``telemetry/layers.0.gate_proj/<quantity>`` is of one matrix, ``telemetry/layers.0/<quantity>`` of a layer's
    activations, ``telemetry/<quantity>`` over all rows of gate_proj and up_proj and all activations, and
    ``telemetry/down_proj/<quantity>`` over all columns of down_proj.
    """
    found: dict[str, float | None] = {}
    together: dict[str, list[float]] = defaultdict(list)
    for key, values in arrays.items():
        name, _, kind = key.rpartition(".")
        group = "telemetry/down_proj" if name.endswith("down_proj") else "telemetry"
        for quantity, value in _quantities(kind, values).items():
            found[f"telemetry/{name}/{quantity}"] = value
            if not quantity.startswith("leverage_p"):
                # Every matrix has as many neurons, so the mean of the shares is the share of all.
                together[f"{group}/{quantity}"] += [] if value is None else [value]
    return {key: sum(values) / len(values) if values else None for key, values in together.items()} | found


def _quantities(kind: str, values: Tensor | None) -> dict[str, float | None]:
    """What is said of one array: `leverage`, `direction` (squared norms) or `activation`."""
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
    """The leverages of gate_proj and up_proj."""
    inner = ("gate_proj.leverage", "up_proj.leverage")
    return {key: values for key, values in arrays.items() if values is not None and key.endswith(inner)}


def _arrays(measured: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Leverage and direction of every neuron in every matrix, over their means; None where they say nothing."""
    found: dict[str, Tensor | None] = {}
    for key, values in measured.items():
        if key.endswith(".leverage"):
            found[key] = values if bool(values.any()) else None
        elif key.endswith(".direction"):
            found[key] = neurons.relative(values)
    return found


def _weight_variation(measured: Mapping[str, Tensor]) -> dict[str, float | None]:
    """How uneven the neurons' weights are: the variation of their norms."""
    squares = {key.removesuffix(".weight"): values for key, values in measured.items() if key.endswith(".weight")}
    return {f"telemetry/{name}/weight_cv": neurons.variation(values.sqrt()) for name, values in squares.items()}


def _line(step: int, found: Mapping[str, Any]) -> str:
    """What is shown of a measurement."""
    named = {"leverage_dead": "leverage-dead", "starved": "starved", "activation_dead": "activation-dead"}
    values = {text: found.get(f"telemetry/{key}") for key, text in named.items()}
    values["dead ever since"] = found["telemetry/dead_forever"]
    shares = ", ".join(f"{text} {value:.1%}" for text, value in values.items() if value is not None)
    return (
        f"neurons after step {step}: {shares or 'nothing to say yet'} (measured in {found['telemetry/seconds']:.2f} s)"
    )


def save_arrays(folder: Path, step: int, arrays: Mapping[str, Tensor | None]) -> Path:
    """Write one measurement, fp32, complete or not at all; what is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    kept = {key: values.float().cpu().contiguous() for key, values in arrays.items() if values is not None}
    with replacing(path) as partial:
        save_file(kept, partial)
    return path


def load_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of one measurement."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def measurements(folder: Path) -> list[tuple[int, Path]]:
    """Step and file of every measurement, in order."""
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
