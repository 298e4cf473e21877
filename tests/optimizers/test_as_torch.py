"""What torch's own optimizers accept, and what wraps them: schedules, scalers, copies, engines, checkpoints."""

import copy
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from optimizers import Aurora, OptionError


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 4), nn.LayerNorm(4))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def train(model: nn.Module, optimizer: Any, *seeds: int) -> list[Tensor]:
    for seed in seeds:
        gradients(model, seed)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_parameters_of_a_model_are_one_group_of_both_kinds() -> None:
    model, twin = mlp(), mlp()
    with pytest.warns(UserWarning, match=r"treated as matrices.*12 x 6, 4 x 12") as caught:
        optimizer = Aurora(model.parameters(), lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    assert len(caught) == 1
    assert [group["kind"] for group in optimizer.param_groups] == ["mixed"]
    weights, vectors = [[p for p in twin.parameters() if (p.ndim == 2) == two] for two in (True, False)]
    adamw = {"params": vectors, "kind": "adamw", "lr": 0.015, "betas": (0.8, 0.9)}
    other = Aurora([{"params": weights, "lr": 0.1, "weight_decay": 0.2}, adamw])
    for got, wanted in zip(train(model, optimizer, 1, 2), train(twin, other, 1, 2), strict=True):
        assert torch.equal(got, wanted)
    assert "mixed" in optimizer.table
    # A schedule moves both rates.
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert all(map(torch.equal, before, train(model, optimizer, 3)))


def test_named_and_mixed_parameters_in_any_form() -> None:
    model = mlp()
    optimizer = quietly(lambda: Aurora(model.named_parameters()))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    two = quietly(lambda: Aurora([{"params": iter(decay), "weight_decay": 0.1}, {"params": iter(rest)}], lr=0.01))
    assert [(g["kind"], g["weight_decay"], len(g["params"])) for g in two.param_groups] == [
        ("mixed", 0.1, 2),
        ("mixed", 0.0, 4),
    ]
    for given in (decay, iter(decay), [{"params": decay}]):
        with pytest.warns(UserWarning, match="treated as matrices"):
            Aurora(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Aurora([{"params": decay, "kind": "matrix"}])


def test_vectors_and_single_rows_alone_are_refused() -> None:
    for params in ([torch.zeros(3)], [torch.zeros(1, 3), torch.zeros(3)], [torch.zeros(2, 2, 2)]):
        given = [nn.Parameter(p) for p in params]
        for form in (given, [{"params": given}]):
            with pytest.raises(OptionError, match="expected 2-D"):
                Aurora(form)


def test_shards_in_a_mixed_group_are_no_silent_adamw() -> None:
    model = mlp()
    optimizer = quietly(lambda: Aurora(model.parameters()))
    train(model, optimizer, 1)
    flat = nn.Parameter(torch.zeros(72))
    flat.grad = torch.ones(72)
    optimizer.param_groups[0]["params"][0] = flat
    with pytest.raises(OptionError, match="other dimensions"):
        optimizer.step()


@pytest.mark.parametrize("form", ["model", "parameters"])
@pytest.mark.parametrize("schedule", ["one", "cyclic"])
def test_cycled_momentum_reaches_matrices_and_adamw(schedule: str, form: str) -> None:
    model = mlp()
    optimizer = quietly(lambda: Aurora(model if form == "model" else model.parameters(), lr=0.02))
    if schedule == "one":
        cycle: Any = OneCycleLR(optimizer, max_lr=0.05, total_steps=8)
    else:
        cycle = CyclicLR(optimizer, 0.01, 0.05, step_size_up=2)
    matrix, vector = model[0].weight, model[0].bias
    for seed in range(4):
        gradients(model, seed)
        momentum = optimizer.param_groups[0]["momentum"]
        assert 0.8 <= momentum <= 0.95
        state = optimizer.state[matrix]
        before = state.get("momentum", torch.zeros_like(matrix)).clone()
        average = optimizer.state[vector].get("exp_avg", torch.zeros_like(vector)).clone()
        optimizer.step()
        assert torch.equal(optimizer.state[matrix]["momentum"], before.lerp(matrix.grad, 1 - momentum))
        wanted = average.lerp(vector.grad, 1 - momentum)
        assert torch.allclose(optimizer.state[vector]["exp_avg"], wanted, atol=1e-7)
        cycle.step()
    assert len({group["momentum"] for group in optimizer.param_groups}) == 1


def test_adamw_alone_cycles_its_beta() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = Aurora([{"params": [w], "kind": "adamw"}])
    OneCycleLR(optimizer, max_lr=0.05, total_steps=8)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.95)
    assert optimizer.defaults["lr"] == 3e-3


def test_defaults_hold_the_options_and_do_not_leak_into_groups() -> None:
    optimizer = Aurora([nn.Parameter(torch.zeros(4, 3))], lr=0.1, momentum=0.9)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (
        0.1,
        0.9,
        0,
    )
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "kind": "adamw"})
    assert "momentum" not in optimizer.param_groups[1]
    assert set(optimizer.param_groups[0]) == {"params", "kind", "base_lr", *optimizer.defaults}


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written: it makes the optimizer from groups of its own."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, "adaptive": False, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)

    def step(self, closure: Any = None) -> None:
        self.base.step()


def test_a_wrapper_that_makes_the_optimizer_from_its_own_groups() -> None:
    model, twin = mlp(), mlp()
    sam = quietly(lambda: SAM(model.parameters(), Aurora, lr=0.05, momentum=0.9))
    plain = quietly(lambda: Aurora(twin.parameters(), lr=0.05, momentum=0.9))
    assert sam.defaults["momentum"] == 0.9
    assert all(map(torch.equal, train(model, sam, 1, 2), train(twin, plain, 1, 2)))


@pytest.mark.parametrize("fused", [False, True])
def test_maximize_climbs(fused: bool) -> None:
    model, twin = mlp(), mlp()
    up = Aurora(model, maximize=True, fused=fused)
    down = Aurora(twin, fused=fused)
    for seed in (1, 2):
        gradients(model, seed)
        up.step()
        gradients(twin, seed)
        for p in twin.parameters():
            p.grad = -p.grad  # type: ignore[operator]
        down.step()
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=1e-7)
    assert all(group["maximize"] is True for group in copy.deepcopy(up).param_groups)
    assert "maximize" not in down.param_groups[0]


@pytest.mark.parametrize("direction", ["aurora", "riemannian_aurora", "muon", "normuon", "u_normuon"])
@pytest.mark.parametrize("form", ["model", "parameters", "matrices"])
def test_a_learning_rate_may_be_a_tensor(direction: str, form: str) -> None:
    results = []
    for lr in (0.05, torch.tensor(0.05)):
        model = mlp()
        given: Any = {"model": model, "parameters": model.parameters(), "matrices": [model[0].weight, model[2].weight]}
        optimizer = quietly(lambda: Aurora(given[form], lr=lr, direction=direction))  # noqa: B023
        results.append(train(model, optimizer, 1, 2))
    for number, tensor in zip(*results, strict=True):
        assert torch.allclose(number, tensor, atol=1e-6)


def test_the_step_can_be_handed_to_the_compiler() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = Aurora(model), Aurora(twin)
    compiled = torch.compile(optimizer.step)
    for seed in (1, 2):
        gradients(model, seed)
        compiled()
        train(twin, other, seed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))

    @torch.compile
    def step() -> None:
        optimizer.step()

    gradients(model, 3)
    step()
    train(twin, other, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_group_without_names_joins_groups_with_names() -> None:
    model = mlp()
    optimizer = Aurora(model)
    extra = nn.Parameter(torch.randn(5, 3))
    optimizer.add_param_group({"params": extra, "kind": "matrix"})
    assert optimizer.param_groups[-1]["param_names"] == [f"group {len(optimizer.param_groups) - 1} parameter 0"]
    optimizer.add_param_group({"params": [("last", nn.Parameter(torch.randn(3)))], "kind": "adamw"})
    assert optimizer.param_groups[-1]["param_names"] == ["last"]
    extra.grad = torch.randn_like(extra)
    before = extra.detach().clone()
    optimizer.step()
    assert not torch.equal(before, extra)


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("direction", ["aurora", "muon", "u_normuon", "riemannian_aurora"])
def test_empty_matrices_take_part(shape: tuple[int, int], direction: str) -> None:
    empty, full = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(4, 2))
    for lr_scale in ("aspect", "spectral", "rms"):
        optimizer = Aurora([empty, full], direction=direction, lr_scale=lr_scale, uw_floor=0.1)
        empty.grad, full.grad = torch.zeros(shape), torch.randn(4, 2)
        optimizer.step()
        assert bool(full.any())
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "5 x 0" in optimizer.table or shape != (5, 0)


def test_a_gradient_scaler_steps_and_skips() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = Aurora(model), Aurora(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(5, 6)
    scaler.scale(model(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x).square().sum().backward()
    other.step()
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_closure_may_be_called_for_both_kinds() -> None:
    model = mlp()
    optimizer = Aurora(model)
    x = torch.randn(5, 6)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x)[:, 0].square().sum()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_copies_and_pickles_go_on_alike() -> None:
    for form in ("model", "parameters"):
        model = mlp()
        optimizer = quietly(lambda: Aurora(model if form == "model" else model.parameters(), maximize=True))  # noqa: B023
        train(model, optimizer, 1)
        twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        train(model, optimizer, 2)
        wanted = [p for group in optimizer.param_groups for p in group["params"]]
        for twin in twins:
            params = [p for group in twin.param_groups for p in group["params"]]
            for p, q in zip(params, wanted, strict=True):
                p.grad = q.grad.clone()  # type: ignore[union-attr]
            twin.step()
            assert all(map(torch.equal, params, wanted))
            twin.load_state_dict(optimizer.state_dict())


def test_a_state_whose_step_is_a_plain_number_loads() -> None:
    model = mlp()
    optimizer = Aurora(model)
    train(model, optimizer, 1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    twin_model = copy.deepcopy(model)
    twin = Aurora(twin_model)
    twin.load_state_dict(saved)
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin_model, twin, 3)))


def test_sparse_and_complex_are_refused_in_every_form() -> None:
    words = nn.Embedding(5, 3, sparse=True)
    optimizer = quietly(lambda: Aurora([*words.parameters(), nn.Parameter(torch.zeros(3))]))
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    with pytest.raises(OptionError, match="complex64"):
        quietly(lambda: Aurora([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)), nn.Parameter(torch.zeros(2))]))
    with pytest.raises(TypeError, match="iterable"):
        Aurora(nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="empty"):
        Aurora([])


def test_a_first_step_without_gradients_warns_once_and_does_nothing() -> None:
    model = mlp()
    optimizer = Aurora([model[0].weight])
    with pytest.warns(UserWarning, match="no parameter has a gradient at the first step"):
        optimizer.step()
    gradients(model, 1)
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.usefixtures("alone")
def test_zero_redundancy_optimizer_of_torch() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = mlp(), mlp()
    sharded = quietly(lambda: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Aurora, lr=0.05))
    plain = quietly(lambda: Aurora(twin.parameters(), lr=0.05))
    assert all(map(torch.equal, train(model, sharded, 1, 2), train(twin, plain, 1, 2)))
    sharded.param_groups[0]["lr"] = 0.01
    plain.param_groups[0]["lr"] = 0.01
    assert all(map(torch.equal, train(model, sharded, 3), train(twin, plain, 3)))
    sharded.consolidate_state_dict()
    again = quietly(lambda: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Aurora, lr=0.5))
    again.load_state_dict(sharded.state_dict())
    assert all(map(torch.equal, train(model, again, 4), train(twin, plain, 4)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _two_ranks(rank: int, port: int, out: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(6, 12))  # one rank has no matrix
    torch.manual_seed(3)
    for p in model.parameters():
        p.data.normal_()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Aurora, lr=0.05)
    train(model, optimizer, 1)
    optimizer.consolidate_state_dict()
    if rank == 0:
        torch.save([p.detach() for p in model.parameters()], out)
    dist.destroy_process_group()


@pytest.mark.long
def test_zero_redundancy_optimizer_where_a_rank_has_no_matrix(tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    torch.multiprocessing.spawn(_two_ranks, (_free_port(), out), nprocs=2)  # type: ignore[no-untyped-call]
    model = nn.Sequential(nn.Linear(6, 12))
    torch.manual_seed(3)
    for p in model.parameters():
        p.data.normal_()
    wanted = train(model, quietly(lambda: Aurora(model.parameters(), lr=0.05)), 1)
    for got, expected in zip(torch.load(out), wanted, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.usefixtures("alone")
def test_an_optimizer_made_before_fully_shard_follows_its_model_or_is_an_error() -> None:
    from torch.distributed.fsdp import fully_shard

    bare_model, model = mlp(), mlp()
    bare = [
        Aurora([w for w in bare_model.parameters() if w.ndim == 2]),
        quietly(lambda: Aurora(bare_model.parameters())),
    ]
    routed = Aurora(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(bare_model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for each in (bare_model, model):
        each(torch.randn(3, 6))[:, 0].sum().backward()
    for optimizer in bare:
        with pytest.raises(OptionError, match=r"sharded by fully_shard.*after the model is wrapped"):
            optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    routed.step()  # it knows the model, and follows
    assert all(p.grad is not None for group in routed.param_groups for p in group["params"])
    assert not any(map(torch.equal, before, model.parameters()))
    # As Accelerate does: the groups get the new parameters.
    taken = bare[1]
    taken.param_groups[0]["params"] = list(bare_model.parameters())
    taken.step()
    assert len(taken.state) == len(list(bare_model.parameters()))


@pytest.mark.usefixtures("alone")
def test_flat_parameters_of_fsdp1_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = quietly(lambda: FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))
    for given in (model, model.parameters(), [{"params": list(model.parameters())}]):
        with pytest.raises(OptionError, match=r"flat|FSDP"):
            quietly(lambda: Aurora(given))  # noqa: B023


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel_is_followed() -> None:
    model, twin = mlp(), mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, other = Aurora(wrapped), Aurora(twin)
    assert "module.0.weight" in optimizer.table
    assert all(map(torch.equal, train(model, optimizer, 1), train(twin, other, 1)))


@pytest.mark.parametrize("form", ["model", "parameters"])
def test_distributed_checkpoint_state_dicts_go_round(form: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make(model: nn.Module) -> Any:
        return quietly(lambda: Aurora(model if form == "model" else model.parameters()))

    model, twin = mlp(), mlp()
    optimizer, other = make(model), make(twin)
    train(model, optimizer, 1, 2)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=copy.deepcopy(state))
    assert other.param_groups[0]["lr"] == 0.01
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin, other, 3)))
