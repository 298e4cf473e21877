"""Parameters that are sharded, replaced or loaded during a run: they are followed or refused, never lost in silence."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from optimizers import Aurora, OptionError
from optimizers.sharded import DTensorMatrices

pytestmark = pytest.mark.filterwarnings("ignore:these parameters are treated")


@pytest.fixture(autouse=True)
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A process group of one, and its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Layers(nn.Module):
    """Two layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, words: Tensor) -> Tensor:
        """[batch, 4]."""
        x = self.words(words)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def set_gradients(model: nn.Module, seed: int) -> None:
    for index, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + index))
        p.grad = cut(grad, p.device_mesh) if isinstance(p, DTensor) else grad


def cut(value: Tensor, mesh: Any) -> DTensor:
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", ["auto", "carried"])
@pytest.mark.parametrize("part", ["all", "one layer"])
def test_a_model_that_is_sharded_in_the_middle_of_a_run_goes_on_with_its_state(how: Any, part: str, mesh: Any) -> None:
    model, twin = Layers(), Layers()
    optimizer, other = (Aurora(each, lr=0.1, polar="svd", row_balance=how) for each in (model, twin))
    for step in range(4):
        if step == 2:
            fully_shard(model if part == "all" else model.layers[0], mesh=mesh)
        for each, own in ((model, optimizer), (twin, other)):
            set_gradients(each, step)
            own.step()
            own.zero_grad()
    assert equal(model, twin)
    assert set(optimizer.state) == set(model.parameters())
    assert any(isinstance(p, DTensor) for p in optimizer.state)
    assert all(float(state["step"]) == 4 for state in optimizer.state.values())


def test_placements_are_checked_whenever_parameters_are_sharded(mesh: Any) -> None:
    model = Layers()
    optimizer = Aurora(model)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (9, 4) else None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=r"layers\.0\.0\.weight is a DTensor with the placements S\(1\)"):
        optimizer.step()


def test_bare_parameters_that_are_replaced_in_the_middle_of_a_run_are_an_error(mesh: Any) -> None:
    model = Layers()
    optimizer = Aurora(model.parameters())
    set_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # without gradients, and without a replacement
    fully_shard(model, mesh=mesh)
    set_gradients(model, 1)
    with pytest.raises(OptionError, match=r"11 parameters in no module have no gradient, .*fully_shard"):
        optimizer.step()


def test_a_model_whose_weights_are_replaced_in_the_middle_of_a_run_is_an_error() -> None:
    model = Layers()
    optimizer = Aurora(model)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    set_gradients(model, 1)
    with pytest.raises(OptionError, match=r"11 parameters have no gradient and are no longer those of the model"):
        optimizer.step()


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("form", ["model", "parameters"])
@pytest.mark.parametrize("begun", [False, True])
def test_an_optimizer_made_before_fsdp1_is_refused(keeps: bool, form: str, begun: bool) -> None:
    model = Layers()
    optimizer = Aurora(model if form == "model" else model.parameters())
    if begun:
        set_gradients(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=keeps)
    wrapped(torch.tensor([1, 2]))[:, 0].sum().backward()
    if keeps and dist.get_world_size() == 1:  # which does not shard, and leaves the parameters as they were
        optimizer.step()
        assert len(optimizer.state) == 11
        return
    what = r"_flat_param is a flat parameter of" if form == "model" else r"no gradient|no parameter has a gradient.*"
    with pytest.raises(OptionError, match=rf"({what}).*FullyShardedDataParallel"):
        optimizer.step()


def test_a_sharded_model_may_have_no_gradient_yet(mesh: Any) -> None:
    model = Layers()
    fully_shard(model, mesh=mesh)
    optimizer = Aurora(model)
    with pytest.warns(UserWarning, match="no parameter has a gradient at the first step"):
        optimizer.step()
    set_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(torch.tensor([1]))  # which leaves the root unsharded
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


def matrices(params: list[nn.Parameter], **group: Any) -> Aurora:
    names = [(f"w{index}", p) for index, p in enumerate(params)]
    return Aurora([{"params": names, "kind": "matrix", **group}], lr=0.1, polar="svd")


def step(params: list[nn.Parameter], optimizer: Aurora, seed: int) -> None:
    for index, p in enumerate(params):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + index))
        p.grad = cut(grad, p.device_mesh) if isinstance(p, DTensor) else grad
    optimizer.step()


def pair(mesh: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same matrices, whole and as DTensors."""
    values = [torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return [nn.Parameter(value.clone()) for value in values], [nn.Parameter(cut(value, mesh)) for value in values]


@pytest.mark.parametrize(
    ("saved_with", "made_with"),
    [
        ({"row_blocks": [(8, 4), None]}, {}),
        ({}, {"row_blocks": [(8, 4), None]}),
        ({"direction": "normuon"}, {"direction": "muon"}),
        ({"row_balance": "carried"}, {}),
        ({}, {"row_balance": "carried"}),
    ],
)
def test_options_of_a_loaded_state_win_after_a_step_too(saved_with: Any, made_with: Any, mesh: Any) -> None:
    ends = []
    for params in pair(mesh):
        before = matrices(params, **saved_with)
        step(params, before, 0)
        saved = copy.deepcopy(before.state_dict())
        optimizer = matrices(params, **made_with)
        step(params, optimizer, 1)  # as torch.distributed.checkpoint does, before it loads
        optimizer.load_state_dict(saved)
        for seed in (2, 3):
            step(params, optimizer, seed)
        ends.append([whole(p) for p in params])
        assert len(getattr(optimizer.matrices, "_shards", {0})) == 1
    assert all(map(torch.equal, *ends))


def test_a_loaded_state_may_have_another_layout(mesh: Any) -> None:
    ends = []
    for params in pair(mesh):
        optimizer = matrices(params)
        step(params, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["momentum"] = whole(state["momentum"]).mT.contiguous().mT
        optimizer.load_state_dict(saved)
        for seed in (1, 2, 3):
            step(params, optimizer, seed)
        ends.append([whole(p) for p in params])
    assert all(map(torch.equal, *ends))


def test_dtensors_that_were_replaced_are_not_kept(mesh: Any) -> None:
    params = pair(mesh)[1]
    optimizer = matrices(params)
    step(params, optimizer, 0)
    old = weakref.ref(params[0])
    optimizer.param_groups[0]["params"] = params = pair(mesh)[1]
    optimizer.state.clear()
    step(params, optimizer, 1)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_sends_in_the_same_precision(twin_of: Any, mesh: Any) -> None:
    params = pair(mesh)[1]
    optimizer = matrices(params)
    optimizer.bind(DTensorMatrices(wire_dtype="bf16"))
    step(params, optimizer, 0)
    twin = twin_of(optimizer)
    assert isinstance(twin.matrices, DTensorMatrices)
    assert twin.matrices is not optimizer.matrices
    assert twin.matrices.wire_dtype == "bf16"
    step(twin.param_groups[0]["params"], twin, 1)
    assert bool(twin.last_step_finite)


def test_one_group_may_have_the_names_of_two_models(mesh: Any) -> None:
    ends = []
    for params in pair(mesh):
        optimizer = Aurora([{"params": [("w", p) for p in params], "kind": "matrix"}], lr=0.1, polar="svd")
        seen: list[str] = []
        optimizer.direction_observer = lambda place, _, seen=seen: seen.append(place.name)
        step(params, optimizer, 0)
        assert seen == ["parameter 0", "parameter 1"]
        ends.append([whole(p) for p in params])
    assert all(map(torch.equal, *ends))
