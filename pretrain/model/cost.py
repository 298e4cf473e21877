"""Parameters of a model and FLOPs of its training."""

from __future__ import annotations

from pretrain.config.model import ModelConfig


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
