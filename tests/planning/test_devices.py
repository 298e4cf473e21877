"""The utilisation is against the right peak, or absent."""

from __future__ import annotations

import pytest
import torch

from pretrain.planning.devices import DEVICES, device_of, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI250X", 191.5e12),  # one of the card's two dies
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
    assert device_of("CPU") is None


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GH200 480GB", "h200")],
)
def test_a_device_is_found_by_its_name_in_torch(name: str, key: str) -> None:
    assert device_of(name) is DEVICES[key]


def test_every_device_of_the_table_is_found_by_its_own_name() -> None:
    for key, device in DEVICES.items():
        if key not in ("cpu", "a100-40gb"):
            assert device_of(f"Vendor {device.name}") is device
