"""Weights from a Hugging Face folder: an export of this program, or any other Llama in safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig

from pretrain.config import identity_hash
from pretrain.config.model import ModelConfig
from pretrain.export.folder import EMBEDDING, HEAD
from pretrain.files import file_sha256, read_limited
from pretrain.processes.errors import UserError

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"

FLOATS = {"F64", "F32", "F16", "BF16"}
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
"""Our name of each key of the architecture -> that in config.json."""

# Old checkpoints hold the rotary frequencies of every layer, which follow from the config.
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_MOST_SHOWN = 8


class FolderError(UserError):
    """A Hugging Face folder that cannot be read, or whose model is not one that this program trains."""


def is_hugging_face(folder: Path) -> bool:
    """Return whether a folder holds a model of transformers."""
    return (folder / CONFIG).exists()


class HuggingFaceWeights:
    """Reads the weights of a folder.

    Args:
        folder: with `config.json` and safetensors, in one file or in several with an index.

    Attributes:
        folder: the folder.
        shapes: of each tensor, except those that follow from the config.
        model: the keys of our section `model` that its config determines.

    Raises:
        FolderError: with every problem found: a file is missing or damaged, or the model is not a Llama.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _json(folder / CONFIG)
        problems = list(_foreign(self._config))
        if problems:
            raise FolderError("\n".join(f"{folder / CONFIG}: {problem}" for problem in problems))
        self.model = self._read_model()
        self._files = self._find_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            self._read_header(file)
        if missing := self._files.keys() - self.shapes.keys():
            raise FolderError(
                f"{folder / SHARDS}: {_some(missing)} {'is' if len(missing) == 1 else 'are'} not in the file that the "
                "index names"
            )
        self.shapes = {name: shape for name, shape in self.shapes.items() if not _FREQUENCIES.fullmatch(name)}

    def _read_model(self) -> dict[str, Any]:
        try:
            found = LlamaConfig.from_dict(dict(self._config))
            rope = dict(found.rope_parameters or {})
            return {ours: getattr(found, theirs) for ours, theirs in _KEYS.items()} | {"rope_theta": rope["rope_theta"]}
        except Exception as error:  # transformers raises its own and huggingface_hub's errors
            text = " ".join(str(error).split())
            raise FolderError(f"{self.folder / CONFIG}: not the config of a Llama: {text}") from None

    def _find_files(self) -> dict[str, str]:
        """Tensor -> the file that holds it; for a single file only its name is known yet."""
        single, index = self.folder / WEIGHTS, self.folder / SHARDS
        if single.is_file():
            return dict.fromkeys(self._names(WEIGHTS), WEIGHTS)
        if not index.exists():
            pickled = " (PyTorch's .bin files can run code and are not read)" if self._pickled() else ""
            raise FolderError(f"{self.folder}: holds neither {WEIGHTS} nor {SHARDS}{pickled}: save it as safetensors")
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise FolderError(f"{index}: expected a mapping weight_map of tensors to files")
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise FolderError(f"{index}: {name}: expected the name of a .safetensors file, got {file!r}")
        return files

    def _pickled(self) -> bool:
        return any(self.folder.glob("*.bin"))

    def _names(self, file: str) -> list[str]:
        with self._open(file) as opened:
            return list(opened.keys())

    def _read_header(self, file: str) -> None:
        """Note the shapes of the tensors of a file; refuse what is not a floating-point tensor."""
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                if self._files.get(name) != file:
                    raise FolderError(f"{self.folder / file}: {name} is not listed for this file in {SHARDS}")
                if part.get_dtype() not in FLOATS:
                    raise FolderError(
                        f"{self.folder / file}: {name} has dtype {part.get_dtype()}, expected {_some(FLOATS)}: "
                        "quantised weights cannot be trained"
                    )
                self.shapes[name] = tuple(part.get_shape())

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            if not path.is_file():
                raise FolderError(f"{path}: missing")
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise FolderError(f"{path}: damaged: {error}") from None

    def problems(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return what does not fit a model: a message for each key that differs, or else for each tensor.

        Args:
            config: the section `model`.
            shapes: of the model's parameters.
        """
        if config.architecture != "llama":
            return [f"model.architecture: expected llama, whose weights {self.folder} holds, got {config.architecture}"]
        if found := model_problems(self.model, config, self.folder / CONFIG):
            return found
        expected, found_shapes = dict(shapes), dict(self.shapes)
        if config.tie_embeddings:
            found_shapes.pop(HEAD, None)  # some write it twice; see `read`
        problems = [f"{name} is missing" for name in expected.keys() - found_shapes.keys()]
        problems += [f"{name} is not a weight of this model" for name in found_shapes.keys() - expected.keys()]
        problems += [
            f"{name} has shape {list(found_shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if found_shapes.get(name, shape) != shape
        ]
        lines = [f"{self.folder}: {problem}" for problem in sorted(problems)]
        more = [f"{self.folder}: and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
        return lines[:_MOST_SHOWN] + more

    def read(self, name: str, slot: str = "weight", start: int = 0, length: int | None = None) -> Tensor:
        """Return elements [start, start + length) of a flattened weight in fp32; all of it in its shape by default.

        Raises:
            FolderError: the file cannot be read, or a weight is not finite.
            KeyError: the weight does not exist, or the slot is not ``weight``.
        """
        if slot != "weight":
            raise KeyError(slot)
        values = self._tensor(name)
        is_both = name == EMBEDDING and self.model["tie_embeddings"] and HEAD in self.shapes
        if is_both and not torch.equal(values, self._tensor(HEAD)):
            raise FolderError(
                f"{self.folder}: the config ties the embeddings, but {HEAD} and {EMBEDDING} differ: set "
                "tie_word_embeddings to false there, and model.tie_embeddings=false"
            )
        return values if length is None else values.reshape(-1)[start : start + length]

    def _tensor(self, name: str) -> Tensor:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, framework="pt") as opened:
                values: Tensor = opened.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise FolderError(f"{path}: {name} cannot be read: {error}") from None
        if not values.isfinite().all():
            raise FolderError(f"{path}: {name} holds values that are not finite")
        return values

    def sha256(self) -> str:
        """Return a digest of the config and the weights.

        Raises:
            FolderError: a file cannot be read.
        """
        names = [CONFIG, *sorted(set(self._files.values()))]
        try:
            return identity_hash({name: file_sha256(self.folder / name) for name in names})
        except OSError as error:
            raise FolderError(f"{self.folder}: cannot be read: {error}") from None


def model_problems(found: Mapping[str, Any], config: ModelConfig, where: Path) -> list[str]:
    """Return a message for each key by which the same weights would be another function.

    The context may differ, since no weight depends on it, and where it grows the rotary base may grow with it.

    Args:
        found: keys of the section `model`, as they were for the weights.
        config: the section `model` now.
        where: where `found` is from.
    """
    wanted = {key: getattr(config, key) for key in found}
    free = {"context_length"}
    if wanted["context_length"] > found["context_length"] and wanted["rope_theta"] > found["rope_theta"]:
        free.add("rope_theta")
    return [
        f"model.{key}: {value!r} in {where}, {wanted[key]!r} in the config: set model.{key}={_yaml(value)}"
        for key, value in found.items()
        if key not in free and value != wanted[key]
    ]


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _foreign(config: Mapping[str, Any]) -> Iterator[str]:
    """What makes a model another one than the Llama of this program."""
    if config.get("model_type") != "llama":
        yield f"expected model_type 'llama', got {config.get('model_type')!r}"
        return
    if "quantization_config" in config:
        yield "the weights are quantised, so they cannot be trained"
    for key, expected in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
        if (value := config.get(key, expected)) != expected:
            yield f"{key} is {value!r}; the Llama of this program has {expected!r}"
    heads, size, head = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if head is not None and isinstance(heads, int) and isinstance(size, int) and head * heads != size:
        yield f"head_dim is {head}, expected hidden_size / num_attention_heads = {size / max(1, heads):g}"
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, dict) else repr(rope)
        if kind != "default":
            yield f"{key} has type {kind!r}; this program has no scaled rotary positions"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_limited(path))
    except FileNotFoundError:
        raise FolderError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise FolderError(f"{path}: expected a mapping, got {type(found).__name__}")
    return found


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_MOST_SHOWN]) + ("" if len(ordered) <= _MOST_SHOWN else ", ...")
