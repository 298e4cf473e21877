"""Weights from Hugging Face folders: an exact copy, or one clear message for each thing that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config import Config, ConfigError
from pretrain.export.weights import FolderError, HuggingFaceWeights
from pretrain.launch.ancestor import check_ancestor, find_ancestor
from pretrain.model.build import build_model

MakeConfig = Callable[..., Config]
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


def write(
    folder: Path, *, shards: str = "10GB", dtype: torch.dtype = torch.float32, **changes: Any
) -> LlamaForCausalLM:
    """A model of transformers, saved by transformers itself; tied unless told otherwise."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an unsharded folder."""
    found = HuggingFaceWeights(folder)
    tensors = {name: found._tensor(name) for name in found.shapes}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def taken(make: MakeConfig, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights that a run would start from, after all checks."""
    config = make({"init": {"from": str(folder)}, **{f"model.{key}": value for key, value in changes.items()}})
    ancestor = find_ancestor(config.init, config.run_folder)
    assert ancestor is not None
    check_ancestor(ancestor, config)
    names = [name for name, _ in build_model(config.model, 0, device="meta").named_parameters()]
    return {name: ancestor.weights.read(name, "weight") for name in names}


@pytest.mark.parametrize("shards", ["10GB", "200KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_transformers_arrive_exactly(
    shards: str, tied: bool, dtype: torch.dtype, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    model = write(tmp_path, shards=shards, dtype=dtype, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "200KB")
    expected = dict(model.named_parameters())
    found = taken(tiny_config, tmp_path, tie_embeddings=tied)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], values.float()), name
    part = HuggingFaceWeights(tmp_path).read("model.layers.1.mlp.up_proj.weight", "weight", 5, 40)
    assert torch.equal(part, expected["model.layers.1.mlp.up_proj.weight"].detach().float().reshape(-1)[5:45])


def test_the_names_of_transformers_4_mean_the_same(tmp_path: Path, tiny_config: MakeConfig) -> None:
    write(tmp_path)
    edit(tmp_path / "config.json", rope_parameters=..., rope_theta=5e5, rope_scaling=None, num_key_value_heads=1)
    assert taken(tiny_config, tmp_path, rope_theta=5e5)
    with pytest.raises(ConfigError, match=r"model\.rope_theta: 500000\.0 in .*set model\.rope_theta=500000\.0"):
        taken(tiny_config, tmp_path)


def test_what_old_checkpoints_hold_in_addition_is_passed_over(tmp_path: Path, tiny_config: MakeConfig) -> None:
    write(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path, add)
    assert taken(tiny_config, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(FolderError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        taken(tiny_config, tmp_path)


def remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def replace(name: str, values: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: values})


NORM = "model.norm.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], list[str]]] = {
    "missing": (remove(NORM), [f"{NORM} is missing"]),
    "unknown": (replace("model.other", torch.ones(1)), ["model.other is not a weight of this model"]),
    "shape": (replace(NORM, torch.ones(33)), [f"{NORM} has shape [33], expected [32]"]),
    "two": (lambda tensors: tensors.update(x=tensors.pop(NORM)), [f"{NORM} is missing", "x is not a weight of this"]),
    "integers": (replace(NORM, torch.ones(32, dtype=torch.int8)), ["has dtype I8", "quantised weights"]),
    "nan": (replace(NORM, torch.full((32,), float("nan"))), [f"{NORM} holds values that are not finite"]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_named(name: str, tmp_path: Path, tiny_config: MakeConfig) -> None:
    change, messages = TENSORS[name]
    write(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises((ConfigError, FolderError)) as caught:
        taken(tiny_config, tmp_path)
    text = str(caught.value)
    assert all(message in text for message in messages)
    assert len(text.splitlines()) == (2 if name == "two" else 1)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gpt2"}, "expected model_type 'llama', got 'gpt2'"),
    "no model": ({"model_type": ...}, "expected model_type 'llama', got None"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    "head size": ({"head_dim": 64}, "head_dim is 64, expected hidden_size / num_attention_heads = 16"),
    "scaled positions": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling has type 'linear'"),
    "llama 3 positions": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has type 'llama3'"),
    "no number": ({"hidden_size": "many"}, "not the config of a Llama"),
    "layers": ({"num_hidden_layers": 3}, "model.num_layers: 3 in"),
    "heads": ({"num_attention_heads": 4, "head_dim": 8}, "model.num_heads: 4 in"),
    "vocabulary": ({"vocab_size": 8000}, "model.vocab_size: 8000 in"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit_is_named(name: str, tmp_path: Path, tiny_config: MakeConfig) -> None:
    changes, message = CONFIGS[name]
    write(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises((ConfigError, FolderError)) as caught:
        taken(tiny_config, tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, tiny_config: MakeConfig) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(FolderError, match=message):
            taken(tiny_config, folder)

    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    write(whole)
    write(sharded, shards="200KB")
    index = sharded / "model.safetensors.index.json"
    known = index.read_text()
    for files, message in (
        ({NORM: "../../secret.safetensors"}, "expected the name of a .safetensors file"),
        ({NORM: "weights.bin"}, "expected the name of a .safetensors file"),
        ({NORM: 5}, "expected the name of a .safetensors file"),
        ({NORM: "gone.safetensors"}, r"gone\.safetensors: missing"),
        ({}, "expected a mapping weight_map"),
    ):
        edit(index, weight_map={**json.loads(known)["weight_map"], **files} if files else {})
        refused(sharded, message)
    names = json.loads(known)["weight_map"]
    edit(index, weight_map={**names, "more": names[NORM]})
    refused(sharded, "more is not in the file that the index names")
    edit(index, weight_map={name: file for name, file in names.items() if name != NORM})
    refused(sharded, f"{NORM} is not listed for this file")
    content = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(whole, r"model\.safetensors: damaged")
    (whole / "model.safetensors").unlink()
    (whole / "pytorch_model.bin").write_bytes(b"")
    refused(whole, "can run code and are not read")
    (whole / "config.json").write_text("[1]")
    refused(whole, "expected a mapping, got list")
    (whole / "config.json").unlink()
    (whole / "config.json").symlink_to("/dev/zero")
    refused(whole, "is not a regular file")
