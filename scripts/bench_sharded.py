"""The sharded optimizer step: two processes against one, bytes against the formula, and DeepSpeed's own Muon.

Three ways to step the matrices and the other weights of a quickstart of hidden size 1024 alternate, with one thread per
process: one process with everything; two processes, each with everything (the most that two processes can reach on this
machine); two processes that divide the work, over the shards of ZeRO or, at stage 0, over whole parameters. The
speed-up of the last over one process is stated as a share of that of the independent processes. Then, except at stage
0, real DeepSpeed engines on two processes, with our optimizer and with DeepSpeed's Muon: the bytes that a rank receives
in a step, counted at the calls of torch.distributed, and the time of backward pass and step.

    python scripts/bench_sharded.py [--stage 1] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimizers import Aurora, param_groups
from optimizers.sharded import DividedMatrices, ShardedMatrices, shard, zero_layout
from optimizers.sharded.divided import divided_plan
from pretrain.config import Config, load_config
from pretrain.model.build import build_model
from pretrain.processes.torchrun import free_port
from pretrain.run.manifest import environment

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
BIG_SIBLING = ("model.hidden_size=1024", "model.intermediate_size=4096", "model.num_heads=16", "model.num_kv_heads=16")
COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
)

ENGINES = ("muon", "aurora", "deepspeed-muon")
STAGE = "ZeRO stage; 0: whole parameters, as under DistributedDataParallel, and no DeepSpeed (default: %(default)s)"


def big_sibling(layers: int) -> Config:
    """The quickstart with hidden size 1024."""
    return load_config(QUICKSTART, [*BIG_SIBLING, f"model.num_layers={layers}"])


def dense_optimizer(config: Config) -> Aurora:
    """An optimizer of whole weights with recorded gradients."""
    model = build_model(config.model, config.run.seed)
    optimizer = Aurora(param_groups(model, config.optimizer.settings()))
    generator = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    return optimizer


def sharded_optimizer(config: Config, dense: Aurora, stage: int, rank: int, world_size: int) -> Aurora:
    """The same over this rank's shards."""
    model = build_model(config.model, config.run.seed, device="meta")
    shapes = [
        dict(zip(g["param_names"], (tuple(p.shape) for p in g["params"]), strict=True)) for g in dense.param_groups
    ]
    optimizer = Aurora([dict(group) for group in param_groups(model, config.optimizer.settings())])
    return _with_shards(optimizer, dense, zero_layout(shapes, world_size, stage), rank)


def _with_shards(optimizer: Aurora, dense: Aurora, layout: Any, rank: int) -> Aurora:
    whole = {
        name: p for group in dense.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    shards = [torch.zeros(size, requires_grad=True) for size in layout.shard_sizes]
    for flat in shards:
        flat.grad = torch.zeros_like(flat)
    with torch.no_grad():
        for f in layout.fragments[rank]:
            own = slice(f.offset, f.offset + f.length)
            shards[f.shard][own] = whole[f.name].reshape(-1)[f.start : f.stop]
            shards[f.shard].grad[own] = whole[f.name].grad.reshape(-1)[f.start : f.stop]  # type: ignore[index]
    for group, flat in zip(optimizer.param_groups, shards, strict=True):
        group["params"] = [flat]
    shard(optimizer, layout, rank)
    return optimizer


def worker(rank: int, port: int, results: Any, options: argparse.Namespace) -> None:
    """One of the two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    try:
        results.put((rank, engines(rank, options) if options.engine else turns(rank, options), None))
    except BaseException as error:  # the parent prints it
        results.put((rank, None, repr(error)))
        raise


def turns(rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per step of each way, in every round."""
    dist.init_process_group("gloo")
    config = big_sibling(options.layers)
    dense = dense_optimizer(config)
    if options.stage:
        sharded = sharded_optimizer(config, dense, options.stage, rank, 2)
    else:
        sharded = dense_optimizer(config)
        sharded.bind(DividedMatrices())
    found: dict[str, list[float]] = {"one": [], "independent": [], "sharded": []}
    sharded.step()  # warms up, and counts
    moved, planned, imbalance = received(sharded, rank)
    dense.step()

    def timed(step: Callable[[], None], runs: bool) -> float:
        dist.barrier()
        started = time.perf_counter()
        if runs:
            for _ in range(options.steps):
                step()
        dist.barrier()
        return (time.perf_counter() - started) / options.steps

    for index in range(options.rounds):
        ways = list(found)
        for way in ways if index % 2 else ways[::-1]:
            step = sharded.step if way == "sharded" else dense.step
            found[way].append(timed(step, way != "one" or rank == 0))
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": found, "bytes": moved, "planned": planned, "imbalance": imbalance}


def received(optimizer: Aurora, rank: int) -> tuple[int, int, float]:
    """Return the bytes that this rank has received for matrices, those planned for a step, and the imbalance."""
    holder, matrices = optimizer.matrices, next(g for g in optimizer.param_groups if g["kind"] == "matrix")
    if isinstance(holder, DividedMatrices):
        shapes = (p.shape for p in matrices["params"])
        plan = divided_plan(dict(zip(matrices["param_names"], map(tuple, shapes), strict=True)), matrices, 2)
        others = (unit.elements for unit, team in zip(plan.units, plan.teams, strict=True) if rank not in team)
        return holder.received_bytes, sum(others) * holder.dtype.itemsize, plan.imbalance
    assert isinstance(holder, ShardedMatrices)
    return holder.exchange.received_bytes, holder.plan.received_elements[rank] * 2, holder.plan.imbalance


class Matrices(nn.Module):
    """The matrices of the model under a loss whose gradients are constant: nothing but the optimizer costs."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) * 0.02 for shape in shapes)
        self.gradients = [torch.randn(shape, generator=generator) for shape in shapes]

    def forward(self, scale: Tensor) -> Tensor:
        """sum <w, g>."""
        return scale * sum((w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True))


def engines(rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of one kind of optimizer under DeepSpeed."""
    from pretrain.engine.deepspeed import deepspeed  # sets what DeepSpeed reads at import

    matrix = next(g for g in dense_optimizer(big_sibling(options.layers)).param_groups if g["kind"] == "matrix")
    module = Matrices([tuple(p.shape) for p in matrix["params"]])
    named = dict(module.named_parameters())
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": options.stage, "sub_group_size": 10**12, "reduce_bucket_size": 50_000_000},
    }
    counted = _count_received(rank)  # before DeepSpeed takes the functions over
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    if options.engine == "deepspeed-muon":
        for p in module.parameters():
            p.use_muon = True  # type: ignore[attr-defined]
        if options.stage == 3:
            settings["zero_optimization"]["reduce_scatter"] = False  # it refuses the two together
        muon = {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95}}
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config={**settings, "optimizer": muon}
        )
    else:
        from optimizers.sharded.engines.deepspeed import read_layout

        group = {"params": list(named.values()), "param_names": list(named), "direction": options.engine}
        optimizer = Aurora([{**group, "kind": "matrix"}])
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        held = read_layout(engine.optimizer, [named], rank, 2)
        assert held is not None
        shard(optimizer, held.layout, rank)
    seconds, received = [], []
    for _ in range(options.rounds + 1):
        dist.barrier()
        counted["bytes"], counted["by"], started = 0, {}, time.perf_counter()
        engine.backward(engine(torch.ones(())))
        engine.step()
        seconds.append(time.perf_counter() - started)
        received.append(counted["bytes"])
    dist.destroy_process_group()
    return {"seconds": seconds[1:], "bytes": received[-1], "by": counted["by"]}


def _count_received(rank: int) -> dict[str, Any]:
    """From now on, count the bytes that collectives write into this rank's tensors and that come from the other."""
    counted: dict[str, Any] = {"bytes": 0, "by": {}}

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    def wrap(name: str) -> None:
        call = getattr(dist, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            first = arguments[0] if arguments else next(iter(named.values()))
            out = size(first)
            if name == "all_to_all_single":
                sizes = arguments[2] if len(arguments) > 2 else named.get("output_split_sizes")
                own = sizes[rank] * first.element_size() if sizes else out // 2
                moved = out - own
            else:
                # Of what is gathered half is a rank's own; a sum over two ranks brings as much as it is long.
                moved = out // 2 if name.startswith("all_gather") else out
            counted["bytes"] += moved
            counted["by"][name] = counted["by"].get(name, 0) + moved
            return call(*arguments, **named)

        setattr(dist, name, counting)

    for name in COLLECTIVES:
        wrap(name)
    return counted


def run_two(options: argparse.Namespace, **changes: Any) -> list[dict[str, Any]]:
    """Run both workers and return their results."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    given = argparse.Namespace(**{**vars(options), **changes})
    processes = [context.Process(target=worker, args=(rank, port, results, given)) for rank in range(2)]
    for process in processes:
        process.start()
    found: dict[int, dict[str, Any]] = {}
    for _ in processes:
        rank, value, error = results.get(timeout=3600)
        if error:
            for process in processes:
                process.terminate()
            raise RuntimeError(f"rank {rank}: {error}")
        found[rank] = value
    for process in processes:
        process.join()
    return [found[0], found[1]]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    both = run_two(options, engine="")
    seconds = both[0]["seconds"]
    pairs = zip(seconds["one"], seconds["independent"], seconds["sharded"], strict=True)
    # Two independent processes do twice the work in their time.
    speedups = [(one / sharded, 2 * one / independent) for one, independent, sharded in pairs]
    found: dict[str, Any] = {
        "machine": environment(),
        "stage": options.stage,
        "layers": options.layers,
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "speedup": statistics.median(sharded for sharded, _ in speedups),
        "independent_speedup": statistics.median(independent for _, independent in speedups),
        "share": statistics.median(sharded / independent for sharded, independent in speedups),
        "imbalance": both[0]["imbalance"],
        "bytes": [result["bytes"] for result in both],
        "planned_bytes": [result["planned"] for result in both],
    }
    for engine in ENGINES if options.stage else ():
        results = run_two(options, engine=engine)
        found[engine] = {
            "bytes": [result["bytes"] for result in results],
            "by": results[0]["by"],
            "seconds": statistics.median(results[0]["seconds"]),
        }
    return found


def main() -> int:
    """Run the benchmark and print the result; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3), help=STAGE)
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="medians are over these (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = report(options)
    print(f"hidden 1024, {options.layers} layers, stage {options.stage}, one thread a process")
    for way, value in found["seconds"].items():
        print(f"  {way:12} {value * 1e3:9.1f} ms a step")
    print(f"  speed-up {found['speedup']:.3f}, of two independent processes {found['independent_speedup']:.3f}")
    print(f"  sharded / independent {found['share']:.3f} (work of the slowest rank {found['imbalance']:.3f} of a half)")
    print(f"  received by the exchange, bytes {found['bytes']}, planned {found['planned_bytes']}")
    if options.stage:
        print("under DeepSpeed, matrices only, bytes received by all collectives and time of backward and step")
    for engine in ENGINES if options.stage else ():
        result = found[engine]
        print(f"  {engine:15} {max(result['bytes']):>13,} bytes {result['seconds'] * 1e3:9.1f} ms  {result['by']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
