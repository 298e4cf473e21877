"""DTensors that cannot be stepped are refused by name, in one line; those of one rank are stepped as anything else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from optimizers import Aurora, OptionError, Settings


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layers(nn.Module):
    """Two layers, whose weights are all matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 9), "down": nn.Linear(9, 4)}) for _ in range(2))


def placed(model: nn.Module, chosen: dict[str, tuple[Any, tuple[Placement, ...]]]) -> nn.Module:
    """The model with DTensors for some of its parameters."""
    for name, (mesh, placements) in chosen.items():
        module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        whole = getattr(module, key).detach()
        if any(placement.is_partial() for placement in placements):
            value = DTensor.from_local(whole, mesh, placements)
        else:
            value = distribute_tensor(whole, mesh, placements)
        setattr(module, key, nn.Parameter(value))
    return model


def mesh(*names: str) -> Any:
    return init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)


UP = "layers.1.up.weight"


@pytest.mark.parametrize(
    ("names", "placements"),
    [
        (("tp",), (Shard(1),)),
        (("dp", "tp"), (Shard(0), Shard(1))),
        (("dp", "tp"), (Shard(0), Shard(0))),
        (("tp",), (Partial(),)),
    ],
)
def test_placements_other_than_rows_are_refused(names: tuple[str, ...], placements: tuple[Placement, ...]) -> None:
    model = placed(Layers(), {UP: (mesh(*names), placements)})
    with pytest.raises(OptionError, match=r"layers\.1\.up\.weight is a DTensor.*over 'tp'.*override") as told:
        Aurora(model)
    assert "\n" not in str(told.value)
    bare = {"params": [dict(model.named_parameters())[UP]], "kind": "matrix"}
    with pytest.raises(OptionError, match=r"parameter 0 is a DTensor.*sharded by rows"):
        Aurora([bare])


def test_adamw_steps_any_part_of_a_parameter_but_not_partial_sums() -> None:
    model = placed(Layers(), {UP: (mesh("tp"), (Shard(1),))})
    twin = Layers()
    twin.load_state_dict({name: whole(p) for name, p in model.named_parameters()})
    settings = Settings(overrides={r"up\.weight": "adamw"})
    for each in (model, twin):
        optimizer = Aurora(each, routing=settings)
        for p in each.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(map(torch.equal, map(whole, model.parameters()), map(whole, twin.parameters())))
    model = placed(Layers(), {UP: (mesh("tp"), (Partial(),))})
    with pytest.raises(OptionError, match=r"Partial|P\("):
        Aurora(model, routing=settings)


def whole(p: Any) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def test_expert_meshes_are_refused_by_name() -> None:
    model = placed(Layers(), {"layers.0.up.weight": (mesh("dp"), (Shard(0),)), UP: (mesh("ep"), (Shard(0),))})
    with pytest.raises(OptionError, match=r"layers\.1\.up\.weight is on the mesh .*ep.*layers\.0\.up\.weight on .*dp"):
        Aurora(model)
    # Also where a wrapper brings them later.
    plain = Layers()
    optimizer = Aurora(plain)
    placed(plain, {"layers.0.up.weight": (mesh("dp"), (Shard(0),)), UP: (mesh("ep"), (Shard(0),))})
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match="mesh"):
        optimizer.step()


def test_replicas_without_shards_are_stepped() -> None:
    model, twin = Layers(), Layers()
    twin.load_state_dict(model.state_dict())
    placed(model, {name: (mesh("dp"), (Replicate(),)) for name, _ in model.named_parameters()})
    for each in (model, twin):
        optimizer = Aurora(each)
        for index, p in enumerate(each.parameters()):
            torch.manual_seed(index)
            grad = torch.randn(p.shape)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
    assert all(map(torch.equal, map(whole, model.parameters()), map(whole, twin.parameters())))


def test_weights_stored_as_inputs_by_outputs_cannot_be_sharded_by_rows() -> None:
    p = nn.Parameter(torch.randn(4, 9))
    group = {"params": [("c_fc", p)], "kind": "matrix", "views": ["in_out"]}
    optimizer = Aurora([group])
    cut = nn.Parameter(distribute_tensor(p.detach(), mesh("dp"), [Shard(0)]))
    cut.grad = torch.ones_like(cut)
    message = r"c_fc is a DTensor that is stored as inputs x outputs.*AdamW by an override"
    with pytest.raises(OptionError, match=message):
        Aurora([{**group, "params": [("c_fc", cut)]}])
    optimizer.param_groups[0]["params"] = [cut]  # a wrapper brings it later
    for _ in range(2):
        with pytest.raises(OptionError, match=message):
            optimizer.step()


def test_a_state_dict_of_bf16_dtensors_stays_fp32() -> None:
    model = Layers().bfloat16()
    placed(model, {name: (mesh("dp"), (Shard(0),)) for name, _ in model.named_parameters()})
    optimizer = Aurora(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = Aurora(model)
    other.load_state_dict(optimizer.state_dict())
    for p, slots in other.state.items():
        for slot, value in slots.items():
            assert value.dtype == torch.float32
            assert isinstance(value, DTensor) == (slot != "step")
            assert torch.equal(whole(value), whole(optimizer.state[p][slot]))


@pytest.mark.parametrize("direction", ["aurora", "normuon"])
def test_convolutions_and_stacks_of_experts_are_matrices(direction: str) -> None:
    torch.manual_seed(0)
    shapes = {"conv": (9, 2, 2), "experts": (3, 7, 4), "fused": (2, 8, 3)}
    group = {"views": ["flat", "stack", "stack"], "row_blocks": [None, None, (5, 3)], "kind": "matrix"}
    whole_ones = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    cut = {n: nn.Parameter(distribute_tensor(p.detach(), mesh("dp"), [Shard(0)])) for n, p in whole_ones.items()}
    seen: list[dict[str, torch.Tensor]] = []
    for params in (whole_ones, cut):
        optimizer = Aurora([{"params": list(params.items()), **group}], direction=direction, polar="svd", lr=0.1)
        found: dict[str, torch.Tensor] = {}
        optimizer.direction_observer = lambda place, d, found=found: found.update({f"{place}": d.clone()})
        for step in range(2):
            for index, p in enumerate(params.values()):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
            optimizer.step()
        seen.append(found)
        for p in params.values():
            assert isinstance(optimizer.state[p]["momentum"], DTensor) == (params is cut)
    assert all(torch.equal(whole(cut[name]), whole(p)) for name, p in whole_ones.items())
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(d, seen[1][place]) for place, d in seen[0].items())


def test_an_optimizer_follows_through_the_names_of_activation_checkpointing_and_the_compiler() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    model = Layers()
    optimizer = Aurora(model)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1] = nn.ModuleDict({"_orig_mod": model.layers[1]})  # the name that torch.compile gives
    fully_shard(model, mesh=mesh("dp"))
    names = [name for name, _ in model.named_parameters()]
    assert "layers.0._checkpoint_wrapped_module.up.weight" in names
    assert "layers.1._orig_mod.up.weight" in names
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())


def test_a_parameter_of_another_shape_is_not_followed() -> None:
    model = Layers()
    optimizer = Aurora(model)
    model.layers[1]["up"] = nn.Linear(5, 9)
    placed(model, {name: (mesh("dp"), (Shard(0),)) for name, _ in model.named_parameters()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=r"no longer those of the model, layers\.1\.up\.weight"):
        optimizer.step()
