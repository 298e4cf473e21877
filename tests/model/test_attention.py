"""Attention within documents: every kernel means what the dense mask means, and none allocates T x T of anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import LlamaForCausalLM

from pretrain.config import Config
from pretrain.data.masks import attention_inputs
from pretrain.model import attention
from pretrain.model.attention import attend, choose_kernel
from pretrain.model.build import build_model
from pretrain.model.loss import IGNORED, LossModel
from tests.conftest import SPEEDRUN

MakeConfig = Callable[..., Config]
EOS = 0
HEADS, SIZE = 4, 16


def packed(rows: int, length: int, documents: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with about so many documents in each row, and valid lengths: one row is padded, one is all separators."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (rows, length), generator=generator)
    tokens[torch.rand(rows, length, generator=generator) < documents / length] = EOS
    lengths = torch.full((rows,), length, dtype=torch.int32)
    lengths[0] = max(1, length // 3)
    tokens[0, length // 3 :] = EOS
    tokens[-1] = EOS
    return tokens, lengths


def loss_and_gradients(
    kernel: Any, rows: int, length: int, key_heads: int, dtype: torch.dtype, options: dict[str, Any], documents: float
) -> list[Tensor]:
    """Outputs at the valid positions, and gradients of queries, keys and values from there."""
    tokens, lengths = packed(rows, length, documents)
    mask, _ = attention_inputs(tokens, EOS, **options, kernel=kernel, lengths=lengths)
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, heads, length, SIZE) for heads in (HEADS, key_heads, key_heads, HEADS)]
    query, key, value, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    valid = (torch.arange(length) < lengths[:, None])[:, None, :, None]
    mixed = attend(query, key, value, mask, 0.3) * valid
    mixed.backward(grad)
    return [mixed.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "key_heads", "documents"),
    [(3, 33, 4, 5), (2, 300, 2, 3), (2, 128, 1, 60), (2, 1, 4, 0), (4, 7, 2, 0)],
)
@pytest.mark.parametrize("document_mask", [True, False])
def test_segments_equal_the_dense_mask(
    dtype: torch.dtype, rows: int, length: int, key_heads: int, documents: float, document_mask: bool
) -> None:
    options = {"document_mask": document_mask, "reset_positions": True}
    expected, found = (
        loss_and_gradients(kernel, rows, length, key_heads, dtype, options, documents)
        for kernel in ("dense", "segments")
    )
    assert len(found) == 4
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [5, 128, 300, 513])
@pytest.mark.parametrize("document_mask", [True, False])
def test_block_masks_equal_the_dense_mask(length: int, document_mask: bool) -> None:
    """FlexAttention has no backward pass on CPUs, and uncompiled it ignores the blocks, which are compared apart."""
    tokens, lengths = packed(3, length, documents=4)
    options = {"document_mask": document_mask, "reset_positions": True}
    mask, positions = attention_inputs(tokens, EOS, **options, kernel="flex", lengths=lengths)
    dense, expected_positions = attention_inputs(tokens, EOS, **options, lengths=lengths)
    assert isinstance(mask, BlockMask)
    assert isinstance(dense, Tensor)
    assert torch.equal(positions, expected_positions)  # type: ignore[arg-type]
    for row in range(3):
        for query, key in ((0, 0), (length - 1, 0), (length - 1, length // 2), (length // 2, length - 1)):
            seen = mask.mask_mod(*(torch.tensor(n) for n in (row, 0, query, key)))
            assert bool(seen) == bool(dense[row, 0, query, key])
    library = create_block_mask(mask.mask_mod, 3, None, length, length, device="cpu")
    assert mask.shape == library.shape
    assert torch.equal(mask.to_dense(), library.to_dense())
    assert mask.q_num_blocks is not None
    heads = torch.randn(3, HEADS, length, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = flex_attention(heads, heads, heads, block_mask=mask)
    torch.testing.assert_close(found, attend(heads, heads, heads, dense), atol=2e-6, rtol=2e-6)


def test_borders_are_those_of_documents_and_rows_and_padding_is_one_document() -> None:
    tokens = torch.tensor([[EOS, 5, EOS, 6, 7], [1, 2, EOS, EOS, EOS], [1, EOS, 2, 3, EOS]])
    lengths = torch.tensor([5, 3, 5])
    for document_mask, expected in ((True, [0, 1, 3, 5, 8, 10, 12, 15]), (False, [0, 5, 10, 15])):
        borders, positions = attention_inputs(
            tokens, EOS, document_mask=document_mask, reset_positions=True, kernel="varlen", lengths=lengths
        )
        assert isinstance(borders, Tensor)
        assert borders.dtype == torch.int32
        assert borders.shape[:3] == (1, 1, 1)
        assert borders.flatten().tolist() == expected
        assert positions is not None
        assert positions.tolist() == [[0, 0, 1, 0, 1], [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    without, _ = attention_inputs(tokens, EOS, document_mask=False, reset_positions=False, kernel="varlen")
    assert without is None


def test_the_varlen_kernel_gets_joined_rows_and_the_causal_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU: shapes, dtypes and arguments are those that the kernel accepts; tests/gpu has its numbers."""
    calls: list[dict[str, Any]] = []
    kernel = attention.varlen_attn

    def look(*arguments: Any, **named: Any) -> Any:
        calls.append({"arguments": arguments, **named})
        return kernel(*arguments, **named)

    monkeypatch.setattr(attention, "varlen_attn", look)
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, HEADS, 64, SIZE, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(2, 2, 64, SIZE, device="cuda", dtype=torch.bfloat16)
        borders = torch.zeros(1, 1, 1, 6, dtype=torch.int32, device="cuda")
        mixed = attend(query, key, key, borders, 0.3)
        assert (mixed.shape, mixed.dtype) == (query.shape, torch.bfloat16)
    [call] = calls
    query, key, value, first, second, *longest = call["arguments"]
    assert [tuple(z.shape) for z in (query, key, value)] == [(128, HEADS, SIZE), (128, 2, SIZE), (128, 2, SIZE)]
    assert {z.dtype for z in (query, key, value)} == {torch.bfloat16}
    assert first is second
    assert (first.shape, first.dtype) == ((6,), torch.int32)
    assert longest == [64, 64]
    assert (call["scale"], call["window_size"], call["enable_gqa"]) == (0.3, (-1, 0), True)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "capability", "heads", "length", "triton", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, (8, 0), 64, 2048, True, "varlen"),
        ("auto", "cuda", torch.bfloat16, (9, 0), 256, 2048, True, "varlen"),
        ("auto", "cuda", torch.bfloat16, (9, 0), 320, 2048, True, "flex"),
        ("auto", "cuda", torch.float32, (9, 0), 64, 2048, True, "flex"),
        ("auto", "cuda", torch.float32, (9, 0), 64, 128, True, "flex"),
        ("auto", "cuda", torch.float32, (9, 0), 64, 127, True, "dense"),
        ("auto", "cuda", torch.bfloat16, (9, 0), 64, 32, True, "varlen"),
        ("auto", "cuda", torch.float32, (9, 0), 64, 2048, False, "dense"),
        ("auto", "cuda", torch.bfloat16, (6, 1), 64, 2048, True, "dense"),
        ("auto", "cuda", torch.bfloat16, (7, 5), 8, 2048, True, "dense"),
        ("auto", "cpu", torch.bfloat16, None, 64, 2048, False, "segments"),
        ("auto", "mps", torch.float32, None, 64, 2048, False, "dense"),
        ("dense", "cuda", torch.bfloat16, (9, 0), 64, 2048, True, "dense"),
        ("dense", "cpu", torch.float32, None, 64, 2048, True, "dense"),
    ],
)
def test_the_kernel_is_what_the_device_supports(
    wanted: Any,
    device: str,
    dtype: torch.dtype,
    capability: Any,
    heads: int,
    length: int,
    triton: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: triton or None)
    choice = choose_kernel(wanted, torch.device(device), dtype, heads, length)
    assert choice.kernel == expected
    assert choice.reason


ARCHITECTURES: dict[str, dict[str, Any]] = {"llama": {}, "speedrun": {"model": SPEEDRUN}}


def gradients(
    config: Config, kernel: Any, batches: int = 1, autocast: bool = False, length: int = 32
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some packed batches, and the summed gradients of all weights."""
    torch.compiler.reset()
    model = build_model(config.model, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.named_parameters():  # the speedrun's outputs are zero at first
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    module = LossModel(model, config.train)
    module.train()
    if config.train.compile:
        module.compile()
    losses = []
    for seed in range(batches):
        tokens, lengths = packed(3, length, documents=3 + 2 * seed, seed=seed)
        mask, positions = attention_inputs(
            tokens, EOS, document_mask=True, reset_positions=True, kernel=kernel, lengths=lengths
        )
        labels = tokens.roll(-1, 1).masked_fill(torch.arange(length) >= lengths[:, None], IGNORED)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(tokens, labels, mask, positions)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = float((found[name] - value).norm() / value.norm().clamp(min=1e-6))
        assert distance < tolerance, (name, distance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"train.activation_checkpointing": "full"}, {"train.loss_chunk_tokens": 20}],
    ids=str,
)
def test_both_architectures_train_alike_with_both_masks(
    architecture: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    config = tiny_config(ARCHITECTURES[architecture] | {"data.document_mask": True} | changes)
    expected_losses, expected = gradients(config, "dense")
    losses, found = gradients(config, "segments")
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_under_autocast_both_masks_differ_by_rounding(architecture: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(ARCHITECTURES[architecture])
    losses, found = gradients(config, "segments", autocast=True)
    expected_losses, expected = gradients(config, "dense", autocast=True)
    assert losses == pytest.approx(expected_losses, rel=2e-3)
    assert_near(found, expected, 5e-2)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_it_is_one_graph_for_any_number_of_documents(architecture: str, tiny_config: MakeConfig) -> None:
    expected_losses, expected = gradients(tiny_config(ARCHITECTURES[architecture]), "segments", batches=3)
    torch._dynamo.utils.counters.clear()
    config = tiny_config(ARCHITECTURES[architecture] | {"train.compile": True})
    losses, found = gradients(config, "segments", batches=3)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_near(found, expected, 1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the second has a variable number of documents


def largest_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest block that torch allocates, inside of operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(("architecture", "document_mask"), [("llama", True), ("llama", False), ("speedrun", True)])
def test_nothing_of_the_size_of_the_dense_mask_is_allocated(
    architecture: str, document_mask: bool, tiny_config: MakeConfig
) -> None:
    length, rows = 2048, 2
    config = tiny_config(ARCHITECTURES[architecture])
    model = config.model.model_copy(update={"vocab_size": 64, "context_length": length})
    module = LossModel(build_model(model, seed=1), config.train)
    tokens = torch.randint(1, 50, (rows, length))
    tokens[:, 100::200] = EOS

    def step(kernel: Any) -> Callable[[], object]:
        def work() -> None:
            mask, positions = attention_inputs(
                tokens, EOS, document_mask=document_mask, reset_positions=True, kernel=kernel
            )
            module(tokens, tokens, mask, positions).backward()

        return work

    mask_bytes = rows * length * length
    assert largest_allocation(step("segments")) < mask_bytes / 3
    if architecture == "llama" and document_mask:
        assert largest_allocation(step("dense")) >= mask_bytes  # it would be noticed


def test_a_stored_config_has_no_trace_of_the_kernel(tiny_config: MakeConfig) -> None:
    """The name is ours; another program could not load an exported model with it."""
    model = build_model(tiny_config().model, seed=1)
    assert isinstance(model, LlamaForCausalLM)
    before = model.config.to_json_string()
    LossModel(model, tiny_config().train)
    assert model.config.to_json_string() == before
    assert attention.TRANSFORMERS_NAME not in before
