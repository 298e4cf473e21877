"""The utilisation is against the right peak, or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.config import load_config
from pretrain.model.cost import flops_per_token, peak_flops

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("Some Other GPU 9000", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_none(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault of a famous trainer: utilisation from the wrong peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu, bf16=True, peak_tflops=None) == peak
    assert peak_flops(gpu, bf16=False, peak_tflops=None) is None
    assert peak_flops(gpu, bf16=False, peak_tflops=67.0) == 67e12


def test_a_processor_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), bf16=True, peak_tflops=None) is None


def test_the_1_1b_costs_what_the_yardstick_says() -> None:
    config = load_config(REPOSITORY / "configs" / "aurora-1.1b.yaml")
    assert flops_per_token(config.model, 2048) == pytest.approx(7.7e9, rel=0.02)
