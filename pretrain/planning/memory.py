"""The memory that each process of a run needs, by part.

What lives from step to step (weights, fp32 weights, optimizer state, DeepSpeed's buffers) follows to the byte from the
layout and from what DeepSpeed 0.19.8 allocates. Gradients and activations live within a step; the activations are those
that the Llama of transformers saves for the backward pass. Memory of libraries, the allocator and CUDA is not included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from optimizers.blocks import BUCKET_ELEMENTS, bucket_elements
from optimizers.directions import row_slot
from optimizers.matrices import placed_blocks
from optimizers.sharded import Layout, Plan
from pretrain.config import Config
from pretrain.model.cost import parameter_count

FP32, BF16 = 4, 2
# Tensors of a bucket's size that a direction needs at the same time (optimizers.blocks), and those of the exchange.
DIRECTION_TENSORS, EXCHANGE_TENSORS = 6, 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    """Those that the forward pass reads."""
    master: int
    """The fp32 weights that the optimizer steps, if they are separate."""
    state: int
    """State of the optimizer."""
    buffers: int
    """Buffers that DeepSpeed keeps from step to step."""
    gradients: int
    """Peak within a step."""
    gathered: int
    """Weights that stage 3 gathers for the forward and backward pass, if it keeps all of them."""
    activations: int
    """Peak within a forward and backward pass."""
    stepping: int
    """What the optimizer's step needs in addition: the shard's gradients in fp32, and the tensors of its directions."""

    @property
    def lasting(self) -> int:
        """Bytes between steps."""
        return self.weights + self.master + self.state + self.buffers

    start: int
    """The fp32 model before the engine takes it over; on a CPU the allocator does not give it back."""

    @property
    def peak(self) -> int:
        """Peak of a step, on a GPU."""
        return self.lasting + max(self.gradients + self.gathered + self.activations, self.gradients + self.stepping)

    @property
    def peak_on_cpu(self) -> int:
        """Peak resident memory above the level before set-up; what a step frees stays with the process."""
        return self.lasting + max(self.gradients + self.gathered, self.start) + max(self.activations, self.stepping)

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return asdict(self)


def memory(
    config: Config,
    groups: Sequence[Mapping[str, Any]],
    layout: Layout | None,
    plan: Plan | None,
    bf16: bool,
    ranks: int,
    device_type: str,
) -> Memory:
    """The memory of the rank that needs most.

    Args:
        config: the run's.
        groups: the optimizer's, with whole `params` on any device.
        layout: of ZeRO 1 to 3 or FSDP2; None if every rank holds everything.
        plan: of the matrices; None without a layout or without matrices.
        bf16: whether matrix products are in bf16; under DeepSpeed and FSDP2 the weights then are too.
        ranks: of the run.
        device_type: on which it runs, such as "cuda".
    """
    if config.engine.kind == "fsdp2":
        assert layout is not None, "fully_shard always shards"
        return _fsdp2(config, groups, layout, plan, bf16, ranks)
    engine = config.engine
    zero = engine.kind == "deepspeed"
    element = BF16 if bf16 and zero else FP32
    whole = [sum(p.numel() for p in group["params"]) for group in groups]
    world = layout.world_size if layout else 1
    shards = list(layout.shard_sizes) if layout else whole
    # Flat groups are padded; a group's weights are `world` shards.
    flat = sum(size * world for size in shards) if layout and engine.zero_stage < 3 else sum(whole)
    stage = engine.zero_stage if zero else 0
    own = sum(shards)
    bucket = engine.reduce_bucket_elements
    sums = BF16 if engine.accumulation_dtype == "bf16" else FP32
    buffers = gathered = 0
    if stage == 0:
        gradients = sum(whole) * element
    elif stage == 3:
        buffers = own * sums + bucket * element
        # A gradient is freed once its bucket is reduced, but the allocator keeps what all of them took.
        gradients = gathered = sum(whole) * element
    elif stage == 1 and element == BF16 and sums == FP32:
        buffers = flat * FP32  # the bf16 optimizer sums the gradients of every weight on every rank
        gradients = sum(whole) * BF16
    else:
        gradients = sum(whole) * element + min(bucket, sum(whole)) * element
    has_master = zero and (stage > 0 or element == BF16)
    of_everyone = Memory(
        weights=own * element if stage == 3 else flat * element,
        master=own * FP32 if has_master else 0,
        state=0,
        buffers=buffers,
        gradients=gradients,
        gathered=gathered,
        start=sum(whole) * FP32,
        activations=activations(config, BF16 if bf16 else FP32, autocast=bf16 and not zero),
        stepping=_stepping(own, stage, element, sums),
    )
    copies = DIRECTION_TENSORS + (EXCHANGE_TENSORS if plan else 0)
    matrices = [block.shape for g in groups if g["kind"] == "matrix" for block in placed_blocks(g["params"], g)]
    # Stacks of ranks that share out the matrices are as large on every device.
    most = BUCKET_ELEMENTS if plan or engine.divides_matrices(ranks) else bucket_elements(device_type)
    each = (
        replace(
            of_everyone,
            state=_state(groups, shards, plan, rank),
            stepping=of_everyone.stepping
            + _largest_stack(_owned(plan, rank) if plan else matrices, most) * FP32 * copies,
        )
        for rank in range(world if plan else 1)
    )
    return max(each, key=lambda found: found.peak)


def _fsdp2(
    config: Config,
    groups: Sequence[Mapping[str, Any]],
    layout: Layout,
    plan: Plan | None,
    bf16: bool,
    ranks: int,
) -> Memory:
    """Of the first rank, which has the most rows. While weights are gathered or gradients reduced, a part of the model
    (a block, or all that is in none) is there twice: packed for the collective, and as the parameters themselves."""
    engine, element = config.engine, BF16 if bf16 else FP32
    reduced = BF16 if engine.communication_dtype == "bf16" else FP32
    sizes = dict(zip(layout.shapes, (size * layout.world_size for size in layout.shard_sizes), strict=True))
    whole, own = sum(sizes.values()), sum(layout.shard_sizes)
    blocks = parameter_count(config.model)["blocks"]
    block, rest = blocks // config.model.num_layers, whole - blocks
    state = 0
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            local, rows = sizes[name] // layout.world_size, -(-p.shape[0] // layout.world_size)
            if group["kind"] == "matrix":
                state += FP32 * (local + (rows if row_slot(group, *p.shape) else 0))
            else:
                state += 2 * FP32 * local
    largest = max(block, rest)
    stacks = [_largest_stack(_owned(plan, rank), BUCKET_ELEMENTS) for rank in range(layout.world_size)] if plan else []
    return Memory(
        weights=own * FP32,
        master=0,
        state=state,
        buffers=0,
        gradients=own * FP32 + (whole * reduced if config.accumulation(ranks) > 1 else 0),
        gathered=(rest + 2 * block if engine.reshard_after_forward else whole) * element
        + largest * (element + reduced),
        start=sum(p.numel() for group in groups for p in group["params"]) * FP32,
        activations=activations(config, element),
        stepping=max(stacks, default=0) * FP32 * (DIRECTION_TENSORS + EXCHANGE_TENSORS),
    )


def _state(groups: Sequence[Mapping[str, Any]], shards: Sequence[int], plan: Plan | None, rank: int) -> int:
    """Bytes of the fp32 state: a momentum for matrices, two moments for the rest, and what is kept for each row."""
    total = sum(
        size * (FP32 if group["kind"] == "matrix" else 2 * FP32) for group, size in zip(groups, shards, strict=True)
    )
    for group in groups:
        if group["kind"] != "matrix":
            continue
        shapes = [tuple(p.shape) for p in group["params"]]
        if plan is None:
            total += FP32 * sum(m for m, n in shapes if row_slot(group, m, n))
        else:
            own = [plan.units[index] for index in plan.owned(rank)]
            total += FP32 * sum(unit.rows for unit in own if row_slot(group, *unit.shape))
    return total


def _largest_stack(shapes: Iterable[tuple[int, int]], most: int) -> int:
    """Elements of the largest stack of equally shaped matrices: at most `most`, unless a single one has more."""
    stacks = (m * n * min(alike, max(1, most // (m * n))) for (m, n), alike in Counter(shapes).items())
    return max(stacks, default=0)


def _owned(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """Rows and columns of the matrices that a rank works on."""
    return [plan.units[index].shape for index in plan.owned(rank)]


def _stepping(own: int, stage: int, element: int, sums: int) -> int:
    """Bytes of a shard's gradients in fp32, which DeepSpeed makes for the optimizer from a copy of their fragments."""
    if stage == 0 or (stage == 1 and element == BF16 and sums == FP32):
        return 0  # whole gradients, or a view of the buffer that they are summed in
    return own * FP32 if stage == 3 else own * (FP32 + element)


def activations(config: Config, element: int, *, autocast: bool = False) -> int:
    """Peak bytes of activations in the forward and backward pass of a micro-batch; 0 if not known.

    To what the forward pass saves, the backward pass adds one recomputed layer and, for the head, the gradients of the
    log-softmax in fp32 and of the logits, and under `train.loss_chunk_tokens` the recomputed log-softmax.
    """
    if config.model.architecture != "llama":
        return 0
    train, tokens = config.train, _tokens(config)
    recomputed = 0 if train.activation_checkpointing == "none" else tokens * _layer(config, element, autocast)
    chunk = min(train.loss_chunk_tokens or tokens, tokens)
    head = chunk * config.model.vocab_size * (FP32 + element + (FP32 if chunk < tokens else 0))
    return saved_activations(config, element, autocast=autocast) + recomputed + head


def saved_activations(config: Config, element: int, *, autocast: bool = False) -> int:
    """Bytes that the forward pass of a Llama saves for the backward pass of a micro-batch.

    Token ids, labels and the tables of rotary angles, which all layers share, are left out. A test counts the rest to
    the byte.

    Args:
        config: the run's.
        element: bytes of an element in the dtype of the products.
        autocast: whether weights are fp32 and products bf16 by autocast, as under the plain engine.
    """
    model, train, tokens = config.model, config.train, _tokens(config)
    hidden, every = model.hidden_size, train.activation_checkpointing
    step = None if every == "none" else 1 if every == "full" else every
    recomputed = 0 if step is None else -(-model.num_layers // step)  # of these only the input is saved
    stream = FP32 if autocast else element
    layers = (model.num_layers - recomputed) * _layer(config, element, autocast) + recomputed * hidden * stream
    # Of the last norm its input and result in fp32, and what the head reads.
    top = hidden * (2 * FP32 + BF16 if autocast else FP32 + 2 * element) + FP32
    whole = (train.loss_chunk_tokens or tokens) >= tokens
    logits = model.vocab_size * FP32 if whole else 0  # their log-softmax
    # Autocast keeps bf16 copies of the weights that are multiplied.
    parts = parameter_count(model)
    copies = BF16 * (parts["blocks"] // model.num_layers * (model.num_layers - recomputed)) if autocast else 0
    copies += BF16 * model.vocab_size * hidden if autocast and whole else 0
    return tokens * (layers + top + logits) + copies


def _tokens(config: Config) -> int:
    """Of a micro-batch on one rank."""
    return config.train.micro_batch_sequences * config.sequence_length


def _layer(config: Config, element: int, autocast: bool) -> int:
    """Bytes that a layer saves for each token.

    Of both norms the input in fp32 and the normalised input, and one fp32 number; of each projection its input, which
    those that read the same share unless autocast converts it for each; queries, keys and values; four tensors of the
    MLP's width; one fp32 number for each head.
    """
    model = config.model
    hidden, kv = model.hidden_size, model.hidden_size // model.num_heads * model.num_kv_heads
    wide = hidden * (4 * FP32 + 7 * BF16) if autocast else hidden * (2 * FP32 + 6 * element)
    return wide + element * (4 * model.intermediate_size + 2 * kv) + FP32 * (model.num_heads + 2)
