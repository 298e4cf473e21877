import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimizers.polar import polar, precision
from optimizers.polar.gram import gram_polar
from optimizers.polar.precision import Products, Spelling, as_stated, gram_matrix, has_fast_bf16, resolve

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_to_the_dtype_and_shares_nothing(dtype: torch.dtype) -> None:
    products = Products.on(CPU, dtype)
    x = torch.randn(2, 5, 3)
    rounded = products.round(x.mT)
    assert torch.equal(rounded.to(dtype), x.mT.to(dtype))
    assert torch.equal(rounded.to(dtype).to(rounded.dtype), rounded)
    assert rounded.is_contiguous()
    already = x.to(dtype)
    products.round(already).zero_()
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
        products = Products.on(CPU, torch.bfloat16)
        x, y, z = products.round(a), products.round(b), products.round(c)
        assert x.dtype == (torch.bfloat16 if fast else torch.float32)
        results.append((products.mm(x, y).float(), products.mm_add(z, x, y, beta=-1.5, alpha=0.5).float()))
    for fast_result, emulated in zip(*results, strict=True):
        assert torch.equal(fast_result, emulated)
    # Rounded once, from exact sums: not the unrounded fp32 product.
    assert not torch.equal(results[1][0], torch.bmm(a, b))


@pytest.mark.parametrize("method", ["quintic", "polar_express", "gram"])
def test_both_forms_give_one_polar_factor(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    x = torch.randn(2, 24, 8)
    factors = []
    for fast in (True, False):
        native(monkeypatch, fast)
        factors.append(polar(x, method, dtype="auto" if method == "quintic" else "bf16"))
    assert float((factors[0] - factors[1]).norm() / factors[1].norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [3, 511, 512, 700, 1100])
def test_mirrored_products_are_the_products(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers again: strips change the order of summation only.
    x = torch.randint(-2, 3, (2, size, 9), generator=generator).float()
    c = torch.randint(-9, 10, (2, size, size), generator=generator).float()
    c = c + c.mT
    products, whole = (Products.on(CPU, dtype, mirrored=mirrored) for mirrored in (True, False))
    for given in ({}, {"c": c, "beta": 2.0, "alpha": -1.0}):
        out = torch.full_like(c, torch.nan)
        mirrored = products.symmetric(x, x.mT, out=out, **given)
        assert mirrored is out
        assert torch.equal(mirrored, whole.symmetric(x, x.mT, **given))
        assert torch.equal(products.symmetric(x, x.mT, **given), mirrored)
        assert torch.equal(mirrored, mirrored.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 60, 7), (1, 40, 40), (1, 9, 30)])
def test_a_transposed_layout_gives_the_same_factors(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where X^T X is read from a contiguous X^T: the products are those of the other layout."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    factors, layouts = [], []
    tall = Products.tall

    def noted(self: Products, x: torch.Tensor) -> torch.Tensor:
        found = tall(self, x)
        layouts.append(found.mT.is_contiguous())
        return found

    monkeypatch.setattr(Products, "tall", noted)
    for transposed in (False, True):
        monkeypatch.setattr(precision, "spelling", lambda *_, how=transposed: Spelling(None, transposed=how))
        for even in (None, lambda d: torch.full_like(d[..., :1], 1.01)):
            factors.append(gram_polar(x, dtype, even))
            assert layouts[-1] == transposed
    for one, other in zip(factors[:2], factors[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)


def test_a_large_symmetric_product_costs_five_eighths() -> None:
    x = torch.empty(1, 2048, 64, device="meta")
    with FlopCounterMode(display=False) as count:
        Products.on(CPU, torch.float32).symmetric(x, x.mT)
    assert count.get_total_flops() == 2 * 2048 * 2048 * 64 * 5 // 8


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "cpu"])
def test_only_where_it_was_measured_factorisations_take_the_place_of_products(kind: str) -> None:
    assert precision.spelling(torch.device(kind), torch.float32).factorises == (kind == "cpu")


def test_auto_is_the_fastest_dtype_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {("amx_bf16", "avx512_bf16"): torch.bfloat16, ("avx512_bf16",): torch.float32, (): torch.float32}
    for instructions, dtype in cases.items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=instructions: dict.fromkeys(has, True))
        assert resolve("auto", "cpu") == dtype
        assert resolve("auto", "cuda:0") == torch.float16
        assert resolve("fp32", "cpu") == torch.float32
    with pytest.raises(ValueError, match="unknown polar dtype 'bf8'"):
        resolve("bf8", "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_fp32_whatever_the_process_allows_elsewhere(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), as_stated(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == allowed
        with pytest.raises(RuntimeError, match="inside"), as_stated(CPU):
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_gram_matrix() -> None:
    x = torch.randn(3, 40, 7)
    assert torch.allclose(gram_matrix(x), x.mT @ x, atol=1e-5)
