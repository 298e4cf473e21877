"""What the ranks of the FSDP2 tests do with real models: training loops, checkpoints, and odd gradients."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from optimizers import Aurora, Settings
from optimizers.sharded import DTensorMatrices
from tests.distributed.fsdp import start

# More words in a batch than any matrix has rows: directions of momenta of low rank are not unique.
WORDS, WIDTH, LENGTH, BATCH = 23, 10, 16, 12
WAYS = ("plain", "plain, made before", "cut", "cut, made before", "full", "dense state")
FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """A gated layer with a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH + 1), nn.Linear(WIDTH, 3 * WIDTH + 1, bias=False)
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    """A model of words with a tied head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def language(tied: bool = True) -> Language:
    """The same weights on every rank."""
    torch.manual_seed(7)
    return Language(tied)


def shard(model: Language, mesh: DeviceMesh) -> None:
    """As torchtitan does: each block, then the root."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def make(model: nn.Module, **options: Any) -> Aurora:
    """The optimizer of these tests."""
    return Aurora(model, lr=0.02, polar="svd", weight_decay=0.1, **options)


def batch(step: int) -> Tensor:
    """Words of all ranks, [BATCH, LENGTH + 1]."""
    return torch.randint(WORDS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, words: Tensor) -> Tensor:
    """The mean over the words of some rows."""
    return cross_entropy(model(words[:, :-1]).reshape(-1, WORDS), words[:, 1:].reshape(-1))


def train(model: nn.Module, optimizer: Aurora, steps: range, rank: int, world_size: int) -> list[float]:
    """Train on this rank's rows of each batch; the losses of all ranks."""
    losses = []
    for step in steps:
        loss = loss_of(model, batch(step)[rank::world_size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The distance of all weights together, relative to their norm."""
    assert a.keys() == b.keys()
    first, second = (torch.cat([w.flatten() for w in weights.values()]).double() for weights in (a, b))
    return float((first - second).norm() / second.norm())


def message(act: Callable[[], Any]) -> str:
    """What an act that should fail says; empty if it does not."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def dense_runs(ranks: int) -> list[dict[str, Any]]:
    """20 steps of one process; then five times those that add up the gradients of `ranks` parts of shuffled batches."""
    runs = []
    for order in range(6):
        model = language()
        optimizer, losses = make(model), []
        generator = torch.Generator().manual_seed(order)
        for step in range(20):
            words = batch(step)[torch.randperm(BATCH, generator=generator)] if order else batch(step)
            parts = words.split(BATCH // ranks) if order else [words]
            own = [loss_of(model, part) / len(parts) for part in parts]
            for loss in own:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(sum(own)))
        runs.append({"weights": whole(model), "losses": losses})
    return runs


def loop(mesh_shape: tuple[int, ...]) -> dict[str, Any]:
    """20 steps of a sharded model whose optimizer is made before or after fully_shard; the first rank compares them
    with dense ones."""
    mesh = start(mesh_shape)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    runs = {}
    for when in ("after", "before"):
        model = language()
        optimizer = make(model) if when == "before" else None
        shard(model, mesh)
        optimizer = optimizer or make(model)
        losses = train(model, optimizer, range(20), rank, world_size)
        assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        runs[when] = {"weights": whole(model), "losses": losses}
    dist.destroy_process_group()
    found: dict[str, Any] = {"same": distance(runs["before"]["weights"], runs["after"]["weights"])}
    if rank == 0:
        dense, *others = dense_runs(world_size)
        found["losses"] = losses = dense["losses"]
        found["loss difference"] = max(abs(a - b) for a, b in zip(runs["after"]["losses"], losses, strict=True))
        found["distance"] = distance(runs["after"]["weights"], dense["weights"])
        found["spread"] = max(distance(other["weights"], dense["weights"]) for other in others)
    return found


def checkpoints(direction: str) -> dict[str, Any]:
    """Save after three steps by every way of saving, load into new optimizers, and continue."""
    mesh = start((int(os.environ["WORLD_SIZE"]),))
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def new(before: bool = False) -> tuple[Language, Aurora]:
        model = language()
        optimizer = make(model, direction=direction) if before else None
        shard(model, mesh)
        return model, optimizer or make(model, direction=direction)

    model, optimizer = new()
    train(model, optimizer, range(3), rank, world_size)
    weights = whole(model)
    plain = copy.deepcopy(optimizer.state_dict())
    cut = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    everyone: list[Any] = [full]
    dist.broadcast_object_list(everyone)  # only the first rank gets it
    train(model, optimizer, range(3, 5), rank, world_size)
    wanted = whole(model)

    def load(twin: Language) -> None:
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(distribute_tensor(weights[name], mesh, p.placements))

    found: dict[str, Any] = {"slots": sorted({k for state in plain["state"].values() for k in state})}
    for way in WAYS:
        twin, other = new(before=way.endswith("before"))
        load(twin)
        if way in ("plain", "plain, made before"):
            other.load_state_dict(copy.deepcopy(plain))
        elif way.startswith("cut"):
            set_optimizer_state_dict(twin, other, copy.deepcopy(cut))
        elif way == "full":
            set_optimizer_state_dict(twin, other, copy.deepcopy(everyone[0]), options=FULL)
        else:  # as one process would have saved it
            state = {
                index: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in slots.items()}
                for index, slots in plain["state"].items()
            }
            other.load_state_dict({**copy.deepcopy(plain), "state": state})
        train(twin, other, range(3, 5), rank, world_size)
        found[way] = all(torch.equal(value, wanted[name]) for name, value in whole(twin).items())
    dense = language()
    found["into a dense one"] = message(lambda: make(dense, direction=direction).load_state_dict(plain))
    dist.destroy_process_group()
    return found


def behaviours() -> dict[str, Any]:
    """What may happen to gradients and parameters, on every rank."""
    mesh = start((int(os.environ["WORLD_SIZE"]),))
    rank = dist.get_rank()

    def new(settings: Settings | None = None) -> tuple[Language, Aurora, dict[str, DTensor]]:
        model = language(tied=False)
        shard(model, mesh)
        params: dict[str, Any] = dict(model.named_parameters())
        for index, p in enumerate(params.values()):
            torch.manual_seed(index)
            part = torch.randn(p.shape)
            p.grad = distribute_tensor(part, mesh, p.placements, src_data_rank=None)
        return model, make(model, routing=settings), params

    def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
        return {name for name, value in whole(model).items() if not torch.equal(value, before[name])}

    found: dict[str, Any] = {}

    model, optimizer, params = new()
    before = whole(model)
    if rank == 1:
        params["layers.0.up.weight"].grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    found["not finite"] = (changed(model, before), bool(optimizer.last_step_finite))

    model, optimizer, params = new()
    for name in ("layers.1.gate.weight", "layers.1.gate.bias"):
        params[name].grad = None
    optimizer.step()
    found["no gradient"] = set(params) - changed(model, before)
    found["no gradient steps"] = "step" in optimizer.state[params["layers.1.gate.weight"]]

    # One rank lacks a gradient, in another run it has one of zeros.
    ends = []
    for zero in (False, True):
        model, optimizer, params = new()
        for name in ("layers.1.gate.weight", "layers.1.gate.bias", "embed.weight"):
            if rank == 0:
                grad = params[name].grad
                params[name].grad = torch.zeros_like(grad) if zero else None
        optimizer.step()
        ends.append(whole(model))
    found["lacking is zero"] = all(torch.equal(ends[0][name], ends[1][name]) for name in before)
    found["lacking changes"] = {name for name in before if not torch.equal(ends[0][name], before[name])} == set(before)

    model, optimizer, params = new()
    for p in params.values():
        p.grad = None
    for name in ("layers.0.up.weight",):
        params[name].grad = torch.zeros_like(params[name])
    optimizer.step()
    found["zero"] = changed(model, before)

    model = language(tied=False)
    bare = Aurora([p for layer in model.layers for p in (layer.gate.weight, layer.up.weight)], lr=0.1)
    shard(model, mesh)
    model(batch(0)[:, :-1]).sum().backward()
    found["bare"] = message(bare.step)

    # Bare parameters, each module on the mesh that fully_shard makes by default.
    model, other = language(tied=False), language(tied=False)
    for module in (*model.layers, model):
        fully_shard(module)
    params = dict(model.named_parameters())
    dense = Aurora(other.parameters(), lr=0.1, polar="svd")
    bare = Aurora(model.parameters(), lr=0.1, polar="svd")
    for step in range(2):
        for index, (name, p) in enumerate(other.named_parameters()):
            torch.manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape)
            mine = params[name]
            mine.grad = distribute_tensor(p.grad, mine.device_mesh, mine.placements, src_data_rank=None)
        dense.step()
        bare.step()
    found["bare parameters"] = distance(whole(model), whole(other))

    # As Accelerate does: the groups get the new parameters. One matrix is not sharded, and every rank steps it.
    model = language(tied=False)
    optimizer, alone = make(model), make(language(tied=False))
    for layer in model.layers[:1]:
        fully_shard(layer, mesh=mesh)
    current: dict[str, Any] = dict(model.named_parameters())
    for own in (optimizer, alone):
        for group in own.param_groups:
            if own is optimizer:
                group["params"] = [current[name] for name in group["param_names"]]
            for index, p in enumerate(group["params"]):
                torch.manual_seed(index)
                part = torch.randn(p.shape)
                if isinstance(p, DTensor):
                    part = distribute_tensor(part, mesh, p.placements, src_data_rank=None)
                p.grad = part
    optimizer.step()
    alone.step()
    found["partly sharded"] = max(
        float((whole_of(p) - whole_of(q)).abs().max())
        for group, other in zip(optimizer.param_groups, alone.param_groups, strict=True)
        for p, q in zip(group["params"], other["params"], strict=True)
    )
    found["kinds"] = sorted({type(p).__name__ for p in optimizer.param_groups[0]["params"]})
    found |= plain_next_to_sharded(mesh) | planned_again(mesh)
    dist.destroy_process_group()
    return found


def plain_next_to_sharded(mesh: DeviceMesh) -> dict[str, Any]:
    """Only the blocks are sharded: what is said of the other parameters, whose gradients nothing averages."""
    found = {}
    for kind in ("zero, then own", "same"):
        model = language(tied=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        optimizer = make(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(3):
                for index, p in enumerate(model.parameters()):
                    rank = dist.get_rank() if kind != "same" and not isinstance(p, DTensor) else 0
                    torch.manual_seed(100 * rank + index)
                    grad = torch.randn(p.shape) * (kind == "same" or step > 0)
                    if isinstance(p, DTensor):
                        grad = distribute_tensor(grad, mesh, p.placements, src_data_rank=None)
                    p.grad = grad
                optimizer.step()
        found[f"plain, {kind}"] = [str(warning.message) for warning in said if warning.category is UserWarning]
    return found


def planned_again(mesh: DeviceMesh) -> dict[str, Any]:
    """A team shares a matrix; then a loaded state has a backend that works on whole matrices. The sizes of the teams
    before and after, and the difference from a dense optimizer."""
    whole_one = nn.Parameter(torch.randn(61, 9, generator=torch.Generator().manual_seed(0)))
    cut = nn.Parameter(distribute_tensor(whole_one.detach(), mesh, [Shard(0)], src_data_rank=None))
    teams: list[int] = []
    saved: dict[str, Any] = {}
    for p in (whole_one, cut):
        exact, shared = (
            Aurora([{"params": [("up", p)], "kind": "matrix", **options}], direction="muon")
            for options in ({"polar": "svd"}, {"polar": "gram", "polar_dtype": "fp32"})
        )
        for step, optimizer in enumerate((exact, shared, shared)):
            if step == 2:
                shared.load_state_dict(saved)
            grad = torch.randn(61, 9, generator=torch.Generator().manual_seed(1 + step))
            p.grad = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None) if p is cut else grad
            optimizer.step()
            if step == 0:
                saved = copy.deepcopy(exact.state_dict())
            elif p is cut:
                assert isinstance(shared.matrices, DTensorMatrices)
                teams += map(len, shared.matrices.sharded(shared.param_groups[0]).plan.teams)
    return {"teams": teams, "planned again": float((whole_of(cut) - whole_one.detach()).abs().max())}


def whole_of(p: Tensor) -> Tensor:
    """All of a parameter."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def _state(optimizer: Aurora) -> dict[str, Any]:
    """All state, whole and as lists, by parameter and slot."""
    return {
        f"{name} {slot}": whole_of(value).tolist()
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        for slot, value in optimizer.state[p].items()
    }


def save_files(root: str) -> dict[str, Any]:
    """Train three steps and save with torch.distributed.checkpoint; the state."""
    mesh = start((int(os.environ["WORLD_SIZE"]),))
    model = language()
    shard(model, mesh)
    optimizer = make(model, direction="normuon")
    train(model, optimizer, range(3), dist.get_rank(), dist.get_world_size())
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=root)
    found = _state(optimizer)
    dist.destroy_process_group()
    return found


def load_files(root: str) -> dict[str, Any]:
    """Load what `save_files` has saved, on any number of ranks; the state."""
    mesh = start((int(os.environ["WORLD_SIZE"]),))
    model = language()
    optimizer = make(model, direction="normuon")
    shard(model, mesh)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=root)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    found = _state(optimizer)
    dist.destroy_process_group()
    return found
