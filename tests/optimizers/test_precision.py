import pytest
import torch

from optimizers import precision
from optimizers.precision import bf16_baddbmm, bf16_bmm, has_fast_bf16, to_bf16


@pytest.fixture
def cpu_capabilities(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What torch says of the processor, for a test to change."""
    found: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(precision, "_cpu_has_fast_bf16", precision._cpu_has_fast_bf16.__wrapped__)
    return found


@pytest.mark.parametrize("instruction", ["amx_bf16", "avx512_bf16"])
def test_a_cpu_is_fast_with_bf16_instructions_only(cpu_capabilities: dict[str, bool], instruction: str) -> None:
    cpu_capabilities["avx512_f"] = True
    assert not has_fast_bf16("cpu")
    cpu_capabilities[instruction] = True
    assert has_fast_bf16(torch.device("cpu")) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_fast_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fast: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(precision, "_cuda_has_fast_bf16", precision._cuda_has_fast_bf16.__wrapped__)
    assert has_fast_bf16("cuda:0") == fast


def test_other_devices_are_not_assumed_to_be_fast() -> None:
    assert not has_fast_bf16("meta")


def test_rounding_is_to_bf16_and_shares_nothing() -> None:
    x = torch.randn(2, 5, 3)
    rounded = to_bf16(x.mT)
    assert torch.equal(rounded.bfloat16().to(rounded.dtype), rounded)
    assert torch.equal(rounded.bfloat16(), x.mT.bfloat16())
    assert rounded.is_contiguous()
    already = x.bfloat16()
    to_bf16(already).zero_()
    assert bool(already.any())


def native(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda _: fast)


def test_the_emulation_is_native_bf16_arithmetic_up_to_summation_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers whose sums are exact in fp32: no order of summation can matter, so every bit is equal.
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-9, 10, shape, generator=generator).float() for shape in ((2, 8, 40), (2, 40, 6), (2, 8, 6))
    )
    results = []
    for fast in (True, False):
        native(monkeypatch, fast)
        x, y, z = to_bf16(a), to_bf16(b), to_bf16(c)
        assert x.dtype == (torch.bfloat16 if fast else torch.float32)
        results.append((bf16_bmm(x, y).float(), bf16_baddbmm(z, x, y, beta=-1.5, alpha=0.5).float()))
    for fast_result, emulated in zip(*results, strict=True):
        assert torch.equal(fast_result, emulated)
    # Rounded once, from exact sums: not the unrounded fp32 product.
    assert not torch.equal(results[1][0], torch.bmm(a, b))


def test_both_forms_give_one_polar_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizers.polar import polar

    x = torch.randn(2, 24, 8)
    factors = []
    for fast in (True, False):
        native(monkeypatch, fast)
        factors.append(polar(x))
    assert float((factors[0] - factors[1]).norm() / factors[1].norm()) < 0.006
