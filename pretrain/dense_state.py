"""Model, optimizer and random generators of one process to and from checkpoint fragments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain.checkpoint import TELEMETRY_SLOT, CheckpointError, CheckpointReader, Fragment


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter to name; a tied parameter has one name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def dense_fragments(model: nn.Module, optimizer: Optimizer) -> Iterator[Fragment]:
    """Every weight and optimizer state whole, each as one fragment."""
    for parameter, name in parameter_names(model).items():
        slots = {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}
        for slot, values in slots.items():
            yield Fragment(name, slot, tuple(values.shape), 0, values)


def group_settings(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups: hyper-parameters and `param_names`."""
    names = parameter_names(model)
    return [
        {key: value for key, value in group.items() if key != "params"}
        | {"param_names": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


@torch.no_grad()
def load_dense(reader: CheckpointReader, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill model and optimizer, hyper-parameters included, from a checkpoint of any layout.

    Raises:
        CheckpointError: the parameters or groups are not those of this model.
    """
    parameters = dict(model.named_parameters())
    saved = reader.index["parameters"]
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    if shapes != {name: slots["weight"]["shape"] for name, slots in saved.items()}:
        raise CheckpointError(f"{reader.folder}: its parameters are not those of this model")
    groups = reader.index["optimizer_groups"]
    if [g["param_names"] for g in groups] != [g["param_names"] for g in group_settings(model, optimizer)]:
        raise CheckpointError(f"{reader.folder}: its optimizer groups are not those of this config")
    for name, parameter in parameters.items():
        for slot in saved[name].keys() - {TELEMETRY_SLOT}:
            values = reader.read(name, slot)
            if slot == "weight":
                parameter.copy_(values)
            else:
                # A step counter stays where its optimizer made it: on the CPU unless it says otherwise.
                optimizer.state[parameter][slot] = values.to(parameter.device)
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        for key, value in settings.items():
            if key != "param_names":
                group[key] = tuple(value) if isinstance(value, list) else value


def random_generators() -> dict[str, Tensor]:
    """The state of every global random generator of this process, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    assert name == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.append(keys.astype(np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(state: dict[str, Tensor]) -> None:
    """Put back what `random_generators` returned."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
