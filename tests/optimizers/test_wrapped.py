"""What wrappers, copies and later groups must not change in silence."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from optimizers import Aurora, OptionError, Settings, blocks


class Small(nn.Module):
    """A fused weight in two blocks, an embedding and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        layer = {"c_attn": nn.Linear(4, 12, bias=False), "c_proj": nn.Linear(12, 4)}
        self.layers = nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(2))
        self.head = nn.Linear(4, 11, bias=False)


def gradients(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore")
def test_zero_redundancy_optimizer_sorts_parameters_so_lists_by_position_are_refused_or_dropped() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    small, large = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(6, 5))
    for lists in ({"views": ["in_out", None]}, {"row_blocks": [None, (3, 3)]}):
        with pytest.raises(OptionError, match=rf"{next(iter(lists))}.*ZeroRedundancyOptimizer sorts"):
            ZeroRedundancyOptimizer([{"params": [small, large], "kind": "matrix", **lists}], optimizer_class=Aurora)
    group = {"params": [small, large], "kind": "matrix", "param_names": ["small", "large"]}
    optimizer = ZeroRedundancyOptimizer([group], optimizer_class=Aurora)
    gradients(optimizer)
    optimizer.step()
    assert isinstance(optimizer.optim, Aurora)
    assert "small" not in optimizer.optim.table


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:these parameters")
def test_fully_shard_on_a_part_of_the_model_is_no_silent_loss() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = Aurora(model.parameters())
    unused = nn.Linear(4, 4)
    other = Aurora([*model[0].parameters(), *unused.parameters()])
    fully_shard(model[1], mesh=dist.init_device_mesh("cpu", (1,)))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptionError, match=r"2 parameters in no module have no gradient.*fully_shard"):
        optimizer.step()
    other.step()  # a layer that is not used is not one that was replaced


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:these parameters")
def test_a_sharded_model_that_is_gone_says_nothing_about_this_one() -> None:
    from torch.distributed.fsdp import fully_shard

    gone = nn.Linear(4, 4)
    fully_shard(gone, mesh=dist.init_device_mesh("cpu", (1,)))
    gone.itself = [gone]  # not collected by counting references
    del gone
    optimizer = Aurora(nn.Linear(4, 3).parameters())
    with pytest.warns(UserWarning, match="no parameter has a gradient at the first step, so it does nothing"):
        optimizer.step()


def test_entries_of_a_group_are_read_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 24
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(count)]
    optimizer = Aurora([{"params": params, "row_blocks": [(2, 2)] * count}])
    optimizer_views, read = blocks.views, []

    def counted(group: Any) -> Any:
        read.append(len(group["params"]))
        return optimizer_views(group)

    monkeypatch.setattr(blocks, "views", counted)
    gradients(optimizer)
    optimizer.step()
    assert count <= sum(read) <= 8 * count


def test_settings_keep_the_defaults_of_aurora() -> None:
    model = Small()
    model.table = nn.Parameter(torch.randn(7, 4))
    with pytest.warns(UserWarning, match=r"unclear whether these weights are matrices: table"):
        plain, given = Aurora(model), Aurora(model, routing=Settings(adamw={"eps": 1e-8}))
    assert plain.table == given.table
    assert "(3 blocks)" in given.table


def test_rates_of_adamw_come_from_those_of_the_matrices_or_are_their_own() -> None:
    def rates(optimizer: Aurora) -> set[tuple[str, float]]:
        return {(group["kind"], group["lr"]) for group in optimizer.param_groups}

    optimizer = Aurora(Small(), lr=0.02)
    before = rates(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "kind": "adamw"})
    assert rates(optimizer) == before == {("matrix", 0.02), ("adamw", 0.02 * 0.15)}
    assert rates(Aurora(Small(), lr=0.02, routing=Settings(adamw={"lr": 1e-4}))) == {("matrix", 0.02), ("adamw", 1e-4)}
    assert rates(Aurora(Small(), routing=Settings(matrix={"lr": 0.5}))) == {("matrix", 0.5), ("adamw", 0.5 * 0.15)}


def test_base_lr_does_not_follow_a_tensor() -> None:
    lr = torch.tensor(0.02)
    optimizer = Aurora([{"params": [nn.Parameter(torch.randn(4, 3))], "kind": "matrix"}], lr=lr)
    lr.mul_(0.5)
    assert float(optimizer.param_groups[0]["base_lr"]) == pytest.approx(0.02)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_a_list_of_matrices_is_not_guessed_in_silence() -> None:
    with pytest.warns(UserWarning, match="treated as matrices.*: 4 x 3, 1 x 4.*Conv1D"):
        Aurora([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 4))])


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_know_how_they_were_made(twin_of: Any) -> None:
    optimizer = Aurora(Small(), lr=0.1, momentum=0.5, maximize=True)
    optimizer.permitted = torch.tensor(False)
    twin = twin_of(optimizer)
    assert twin.table == optimizer.table
    assert not bool(twin.permitted)
    twin.add_param_group({"params": [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))]})
    group = twin.param_groups[-1]
    assert (group["kind"], group["lr"], group["momentum"], group["maximize"]) == ("mixed", 0.1, 0.5, True)


def test_the_table_has_later_groups_and_loaded_options() -> None:
    model = Small()
    model.head.weight.requires_grad_(False)
    optimizer = Aurora(model)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.randn(4, 3)))], "kind": "matrix"})
    lines = {line.split("  ")[0]: line for line in optimizer.table.splitlines()}
    assert "in a group of kind 'matrix'" in lines["late"]
    assert "frozen" in lines["head.weight"]
    other = Aurora(model)
    saved["param_groups"][0]["direction"] = "muon"
    other.load_state_dict(saved)
    assert "aurora" not in other.table


def test_a_getter_that_raises_is_no_head() -> None:
    class Odd(Small):
        def get_output_embeddings(self, kind: str) -> nn.Module:
            raise AssertionError(kind)

    assert "output head" in Aurora(Odd()).table


def test_a_module_that_was_removed_is_a_warning_and_one_that_was_replaced_an_error() -> None:
    model = Small()
    optimizer, strict = Aurora(model), Aurora(model)
    gradients(optimizer)
    for p in model.head.parameters():
        p.grad = None
    old, model.head = model.head, nn.Linear(4, 11, bias=False)
    with pytest.raises(OptionError, match=r"no longer those of the model, head\.weight"):
        strict.step()
    del model.head
    with pytest.warns(UserWarning, match=r"no longer in the model, head\.weight"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert old.weight.grad is None


def test_layers_that_were_frozen_at_the_start_are_not_forgotten_in_silence() -> None:
    model = Small()
    model.head.weight.requires_grad_(False)
    optimizer = Aurora(model)
    gradients(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    model.head.weight.requires_grad_(True)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = model.head.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"1 parameters have a gradient and are in no group, head\.weight for example"):
        optimizer.step()
    assert torch.equal(before, model.head.weight)
    optimizer.add_param_group({"params": [model.head.weight], "kind": "adamw"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_a_module_that_is_replaced_later_is_an_error_too() -> None:
    model = Small()
    optimizer = Aurora(model)
    gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    model.head = nn.Linear(4, 11, bias=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=r"1 parameters have no gradient and are no longer those .*head\.weight"):
        optimizer.step()
