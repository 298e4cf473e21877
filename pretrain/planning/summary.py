"""The numbers that follow from a config: `aurora check` and every run print them at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from optimizers.blocks import blocks, row_blocks
from optimizers.flops import step_flops
from optimizers.table import format_table
from pretrain.config import Config
from pretrain.model.cost import flops_per_token, parameter_count


def routing_table(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    """How each parameter is trained, one row each, for the manifest."""
    return [asdict(route) for route in config.optimizer.routes(model)]


def format_routing(config: Config, model: nn.Module) -> list[str]:
    """The routing table as text, in columns: name, shape, form, optimizer, direction, lr scale, why."""
    return format_table(config.optimizer.routes(model))


def describe(config: Config, model: nn.Module, world_size: int) -> list[str]:
    """Every derived number with its inputs, one line per subject."""
    counts = parameter_count(config.model)
    train, length = config.train, config.sequence_length
    per_token = flops_per_token(config.model, length)
    sequences, rounds = config.global_batch_sequences, config.accumulation(world_size)
    head = "tied head" if config.model.tie_embeddings else f"head {counts['head']:,}"
    bf16 = " in bf16" if config.model.embedding_dtype == "bf16" else ""
    inner = counts["blocks"] + counts["biases"] + counts["norms"]
    return [
        f"model     {counts['total']:,} parameters: {inner:,} without embeddings, "
        f"embedding {counts['embedding']:,}{bf16}, {head}",
        f"batch     {train.global_batch_tokens:,} tokens = {sequences} sequences of {length} = {world_size} ranks x "
        f"{rounds} micro-batches x {train.micro_batch_sequences} sequences",
        f"length    {train.total_tokens:,} tokens = {config.total_steps:,} steps x {train.global_batch_tokens:,}, "
        f"{train.total_tokens / inner:.1f} tokens per parameter without embeddings",
        f"schedule  {_schedule(config)}",
        f"FLOPs     {per_token:.3e} per token (6 x multiplied weights + causal attention), "
        f"{per_token * train.total_tokens:.3e} in all",
        f"optimizer {_optimizer(config, model)}",
    ]


def block_shapes(group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix that gets a direction of its own: a weight, or a block of a fused one."""
    parts = zip(group["params"], row_blocks(group), strict=True)
    return [block.shape for weight, split in parts for block in blocks(weight, split)]


def _optimizer(config: Config, model: nn.Module) -> str:
    """Which parameters the matrix optimizer trains, and the cost of its step."""
    matrix = next((g for g in config.optimizer.param_groups(model) if g["kind"] == "matrix"), None)
    if matrix is None:
        return "adamw for every parameter"
    shapes = block_shapes(matrix)
    flops = step_flops(shapes, matrix)
    share = flops / (flops_per_token(config.model, config.sequence_length) * config.train.global_batch_tokens)
    elements = sum(rows * columns for rows, columns in shapes)
    return (
        f"{config.optimizer.name} for {len(shapes)} matrices ({elements:,} elements), adamw for the rest; "
        f"{flops:.3e} FLOPs a step, {share:.1%} of the model's"
    )


def _schedule(config: Config) -> str:
    schedule, train = config.schedule, config.train
    steps = schedule.warmup_tokens / train.global_batch_tokens
    parts = [f"{schedule.kind}, warm-up {schedule.warmup_tokens:,} tokens ({steps:,.0f} steps)"]
    if schedule.kind == "wsd":
        decay = train.total_tokens - schedule.decay_start(train.total_tokens)
        parts.append(f"decay over the last {decay:,.0f} tokens ({decay / train.global_batch_tokens:,.0f} steps)")
    return ", ".join(parts)
