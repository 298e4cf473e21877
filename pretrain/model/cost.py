"""FLOPs of training, peak rates of known devices, and the model FLOPs utilisation (MFU) that follows."""

from __future__ import annotations

import re

import torch

from pretrain.config.model import ModelConfig

# Dense bf16 peaks without sparsity, in FLOP/s, from the vendors' data sheets; first match wins.
_BF16_PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b|\bH200\b", 989e12),
    (r"\bH100\b.*PCIe", 756e12),
    (r"\bH100\b.*NVL", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bA10G\b", 70e12),
    (r"\bMI300X\b", 1307e12),
    (r"\bMI250X?\b", 383e12),
    (r"RTX 4090", 165e12),
)


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: `embedding`, `head` (with its bias; 0 if tied), `blocks` (the matrices of all layers),
    `biases` (of all layers), `norms`, `total`."""
    if config.architecture == "speedrun":
        return _speedrun_parameters(config)
    h, m = config.hidden_size, config.intermediate_size
    kv = h // config.num_heads * config.num_kv_heads
    blocks = config.num_layers * (2 * h * h + 2 * h * kv + 3 * h * m)
    norms = (2 * config.num_layers + 1) * h
    embedding = config.vocab_size * h
    head = 0 if config.tie_embeddings else embedding
    return _with_total({"embedding": embedding, "head": head, "blocks": blocks, "biases": 0, "norms": norms})


def _speedrun_parameters(config: ModelConfig) -> dict[str, int]:
    """q, k, v, o, up and down with biases; norms before each half of a block, after the embedding, before the head."""
    h, m, layers, vocabulary = config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size
    parts = {
        "embedding": vocabulary * h,
        "head": vocabulary * (h + 1),
        "blocks": layers * (4 * h * h + 2 * h * m),
        "biases": layers * (5 * h + m),
        "norms": (2 * layers + 2) * h,
    }
    return _with_total(parts)


def _with_total(parts: dict[str, int]) -> dict[str, int]:
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of the model for one token.

    6 for each weight that is multiplied (all matrices of the blocks and the head; the embedding is a look-up),
    plus causal attention: scores and values cost 2 * hidden FLOPs each per attended token, of which there are
    length / 2 on average, three times for forward and backward: 6 * layers * hidden * length.
    """
    multiplied = parameter_count(config)["blocks"] + config.vocab_size * config.hidden_size
    return 6.0 * multiplied + 6.0 * config.num_layers * config.hidden_size * sequence_length


def peak_flops(device: torch.device, bf16: bool, peak_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device: the configured figure, else the table's, else None (never a guess).

    The table is for bf16: at another precision only a configured peak counts.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda" or not bf16:
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name, None if it is not in the table."""
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, name)), None)
