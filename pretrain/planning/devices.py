"""Devices: memory, peak rate and link speeds. The trainer reads its peak for the MFU here, the plan everything else."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A kind of device. None means that a figure is unknown; it is never guessed."""

    name: str
    pattern: str
    """Regular expression that is found in torch's name of the device."""
    memory: int | None = None
    """Bytes."""
    peak: float | None = None
    """Dense bf16 rate without sparsity, in FLOP/s."""
    within: float | None = None
    """Bytes per second that one device can receive from the others of its node."""
    between: float | None = None
    """Bytes per second that one device can receive from other nodes."""

    @property
    def kind(self) -> str:
        """The device type in torch."""
        return "cpu" if self.name == "CPU" else "cuda"


def _gpu(
    name: str, pattern: str, gigabytes: int, teraflops: float, within: float | None = None, between: float | None = None
) -> Device:
    links = (None if link is None else link * 1e9 for link in (within, between))
    return Device(name, pattern, gigabytes * 10**9, teraflops * 1e12, *links)


DEVICES = {
    "b200": _gpu("B200", r"\bB200\b", 180, 2250, within=900, between=50),
    "h200": _gpu("H200", r"\bGH200\b|\bH200\b", 141, 989, within=450, between=50),
    "h100-pcie": _gpu("H100 PCIe", r"\bH100\b.*PCIe", 80, 756),
    "h100-nvl": _gpu("H100 NVL", r"\bH100\b.*NVL", 94, 835),
    "h100": _gpu("H100", r"\bH100\b", 80, 989, within=450, between=50),
    "a100-40gb": _gpu("A100", r"\bA100\b.*40GB", 40, 312, within=300, between=25),
    "a100": _gpu("A100", r"\bA100\b|\bA800\b", 80, 312, within=300, between=25),
    "l40s": _gpu("L40S", r"\bL40S\b", 48, 362),
    "a10g": _gpu("A10G", r"\bA10G\b", 24, 70),
    "mi300x": _gpu("MI300X", r"\bMI300X\b", 192, 1307, within=448, between=50),
    # A card has two dies; torch sees each as a device of its own.
    "mi250x": _gpu("MI250X", r"\bMI250X\b", 64, 191.5),
    "mi250": _gpu("MI250", r"\bMI250\b", 64, 181),
    "rtx4090": _gpu("RTX 4090", r"RTX 4090", 24, 165),
    "cpu": Device("CPU", r"(?!)"),
}
"""By the name for the command line; for a name from torch the first pattern that matches wins.

Memory and peaks are those of the vendors' data sheets. `within` is half of the data sheet's NVLink or Infinity Fabric
bandwidth, which counts both directions: 1800 GB/s on a B200, 900 on an H100 and H200, 600 on an A100, 896 on an MI300X.
`between` assumes one adapter for each GPU, as in NVIDIA's DGX: 400 Gb/s InfiniBand, 200 Gb/s with A100s. PCIe cards
have no usual interconnect.
"""


def device_of(name: str) -> Device | None:
    """The device with this name in torch, None if it is not in the table."""
    return next((device for device in DEVICES.values() if re.search(device.pattern, name)), None)


def peak_flops(device: torch.device, bf16: bool, peak_tflops: float | None) -> float | None:
    """Peak rate of one device in FLOP/s: the configured value, or else that of the table, or else None.

    Args:
        device: where the model runs.
        bf16: whether the matrix products are in bf16. The table holds bf16 peaks, so at another precision only a
            configured peak counts.
        peak_tflops: `train.peak_tflops`.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda" or not bf16:
        return None
    found = device_of(torch.cuda.get_device_name(device))
    return None if found is None else found.peak
