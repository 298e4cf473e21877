"""Write a trained model as a Hugging Face folder that transformers 4.57 and 5 both read correctly.

The two major versions use different key names, and each silently ignores the other's: given only
`rope_parameters`, version 4 uses a RoPE base of 10,000 whatever the model was trained with. So
`config.json` contains both sets of keys, and the tokenizer files are written here instead of by
`save_pretrained`, which records a tokenizer class that version 4 does not have.

    OUT/model.safetensors         weights; sharded with an index above 5 GB
    OUT/config.json               architecture, with both sets of keys
    OUT/generation_config.json    the bos, eos and pad token ids for generation
    OUT/tokenizer.json            byte-for-byte copy of the run's tokenizer
    OUT/tokenizer_config.json, OUT/special_tokens_map.json
    OUT/README.md                 model card
    OUT/aurora.json               where the model comes from; marks the folder as an export
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

from pretrain.export.card import EMBEDDING, HEAD, ModelCard, parameter_counts, readme
from pretrain.files import publish_folder, sync
from pretrain.processes.errors import UserError

__all__ = ["EMBEDDING", "FORMAT", "HEAD", "ExportError", "ModelCard", "export_folder"]

FORMAT = "aurora-export"
"""Value of `format` in aurora.json; it identifies a folder as an export."""

SCHEMA_VERSION = 1
DEFAULT_PAD_TOKEN = "<|padding|>"
_EXPORTED_NAME = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|README\.md"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|aurora)\.json"
)


class ExportError(UserError):
    """The model cannot be exported as requested; the message says what was found and what to do."""


def export_folder(
    state_dict: Mapping[str, Tensor],
    config: LlamaConfig,
    tokenizer_file: Path,
    card: ModelCard,
    out: Path,
    *,
    eos_token: str = "<|endoftext|>",
    pad_token: str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the Hugging Face folder `out`.

    The folder appears only when it is complete: everything is written to `out` + ".tmp", synced and
    renamed. An earlier export at `out` is replaced once the new one is complete; any other existing
    folder is an error.

    Args:
        state_dict: weights with the names and shapes of `LlamaForCausalLM(config)`, all of the same
            dtype. With tied embeddings the head may be missing.
        config: the architecture; its bos, eos and pad ids are replaced by the tokenizer's.
        tokenizer_file: a `tokenizers` JSON file.
        card: the facts about the run.
        out: the folder to write.
        eos_token: end-of-text token, also used as the beginning-of-text token.
        pad_token: None means `<|padding|>` if the vocabulary has it, and no padding token otherwise.
        max_shard_size: of a weights file: bytes, or a string such as "5GB".
        dtype: of the exported weights; None: as they are.

    Raises:
        ExportError: weights and config disagree, or a weight exceeds the range of `dtype`; the tokenizer cannot be
            read, lacks a token or has more ids than the model; `out` is not an earlier export; or the files cannot be
            written.
    """
    weights = _converted(_checked_weights(state_dict, config), dtype)
    tokenizer_json, special_tokens = _checked_tokenizer(tokenizer_file, config, eos_token, pad_token)
    out = Path(out).resolve()
    partial, replaced = (out.with_name(out.name + suffix) for suffix in (".tmp", ".old"))
    _refuse_foreign(out, partial, replaced)

    token_ids = {f"{key}_id": token_id for key, (_, token_id) in special_tokens.items()}
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    documents = {
        "config.json": _config_json(config, stored, token_ids),
        "generation_config.json": {**token_ids, "transformers_version": transformers_version},
        "tokenizer_config.json": _tokenizer_config(tokenizer_json, config, special_tokens),
        "special_tokens_map.json": {key: token for key, (token, _) in special_tokens.items()},
        "aurora.json": _aurora_json(card, weights),
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_torch_state_dict(weights, partial, max_shard_size=max_shard_size, metadata={"format": "pt"})
        (partial / "tokenizer.json").write_bytes(tokenizer_json)
        (partial / "README.md").write_text(readme(card, config, weights, eos_token), encoding="utf-8")
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            (partial / name).write_text(text + "\n", encoding="utf-8")
        mode = (partial / "README.md").stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # safetensors lets nobody else read its files, whatever the umask
            sync(path)
        publish_folder(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"cannot write the export to {out}: {error}") from error


def _checked_weights(state_dict: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Return the tensors to store: checked, on the CPU, and without shared memory."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weights = dict(state_dict)
    if config.tie_word_embeddings:
        head = weights.pop(HEAD, None)
        del expected[HEAD]
        if head is not None and EMBEDDING in weights and not torch.equal(head, weights[EMBEDDING]):
            raise ExportError(
                f"the config ties the embeddings, but {HEAD} and {EMBEDDING} differ in the weights;"
                " export with tie_word_embeddings=False"
            )
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is not a weight of this model" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ExportError(f"the weights do not fit the model's config ({len(problems)} problems): {listed}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) > 1:
        raise ExportError(f"the weights mix dtypes {sorted(map(str, dtypes))}; convert them to one")
    storages = [tensor.untyped_storage().data_ptr() for tensor in weights.values()]
    return {
        name: (tensor.detach().clone() if storages.count(pointer) > 1 else tensor.detach()).cpu().contiguous()
        for (name, tensor), pointer in zip(weights.items(), storages, strict=True)
    }


def _converted(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors in another dtype."""
    if dtype is None:
        return weights
    found = {name: tensor.to(dtype) for name, tensor in weights.items()}
    lost = [name for name, tensor in found.items() if weights[name].isfinite().all() and not tensor.isfinite().all()]
    if lost:
        name, more = str(dtype).removeprefix("torch."), f" and {len(lost) - 1} more weights" if len(lost) > 1 else ""
        raise ExportError(
            f"{lost[0]}{more}: values beyond {torch.finfo(dtype).max:g}, the largest {name}; export as bfloat16 or "
            "float32"
        )
    return found


def _checked_tokenizer(
    tokenizer_file: Path, config: LlamaConfig, eos_token: str, pad_token: str | None
) -> tuple[bytes, dict[str, tuple[str, int]]]:
    """Return the contents of the tokenizer file and its special tokens: {"bos_token": (token, id), ...}."""
    try:
        content = Path(tokenizer_file).read_bytes()
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises plain Exception
        raise ExportError(f"cannot read the tokenizer {tokenizer_file}: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise ExportError(
            f"the tokenizer {tokenizer_file} has ids up to {largest}, but the model's vocabulary ends at"
            f" {config.vocab_size - 1}; this is not the tokenizer that the model was trained with"
        )
    if pad_token is None and tokenizer.token_to_id(DEFAULT_PAD_TOKEN) is not None:
        pad_token = DEFAULT_PAD_TOKEN
    named = {"bos_token": eos_token, "eos_token": eos_token, "pad_token": pad_token}
    special = {}
    for key, token in named.items():
        if token is None:
            continue
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise ExportError(f"the tokenizer {tokenizer_file} has no token {token!r} (needed as {key})")
        special[key] = (token, token_id)
    return content, special


def _config_json(config: LlamaConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        **config.to_diff_dict(),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **token_ids,
        "architectures": [LlamaForCausalLM.__name__],
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Training turns the key-value cache off; generation needs it.
        "use_cache": True,
        "dtype": dtype,
        "rope_parameters": rope,
        # The same settings under the names of transformers 4.
        "torch_dtype": dtype,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if rope.get("rope_type", "default") != "default" else None,
        "transformers_version": transformers_version,
    }


def _tokenizer_config(
    tokenizer_json: bytes, config: LlamaConfig, special_tokens: Mapping[str, tuple[str, int]]
) -> dict[str, Any]:
    tokenizer_config = {
        **{key: token for key, (token, _) in special_tokens.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    # Transformers overwrites the pre-tokenizer's own setting with this key, or with False if the key is missing.
    pre_tokenizer = json.loads(tokenizer_json).get("pre_tokenizer") or {}
    if "add_prefix_space" in pre_tokenizer:
        tokenizer_config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return tokenizer_config


def _aurora_json(card: ModelCard, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    def known(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    total, body = parameter_counts(weights)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "run_name": card.run_name,
        "step": card.step,
        "tokens": card.tokens,
        "train_loss": known(card.train_loss),
        "validation_loss": known(card.validation_loss),
        "bits_per_byte": known(card.bits_per_byte),
        "optimizer": card.optimizer,
        "git_commit": card.git_commit,
        **({"started_from": card.start} if card.start else {}),
        **({"checkpoint_sha256": card.checkpoint_sha256} if card.checkpoint_sha256 else {}),
        "parameters": total,
        "parameters_without_embeddings": body,
        "data_sources": [{key: str(value) for key, value in row.items()} for row in card.data_sources],
    }


def _refuse_foreign(out: Path, *leftovers: Path) -> None:
    """Raise unless `out` is missing, empty or an earlier export, and `leftovers` contain only exported files."""
    for folder in (out, *leftovers):
        if not folder.exists():
            continue
        if not folder.is_dir():
            raise ExportError(f"{folder} exists and is not a folder; choose another path for the export")
        foreign = sorted(p.name for p in folder.iterdir() if not _EXPORTED_NAME.fullmatch(p.name))
        if foreign:
            raise ExportError(
                f"{folder} exists and contains files that are not part of an export ({', '.join(foreign[:3])});"
                " choose another folder or move it away"
            )
    if out.exists() and any(out.iterdir()) and not _is_export(out):
        raise ExportError(f"{out} exists and is not an earlier export; choose another folder or move it away")


def _is_export(folder: Path) -> bool:
    try:
        content = json.loads((folder / "aurora.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
