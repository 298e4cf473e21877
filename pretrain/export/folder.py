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

import html
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

from pretrain.files import publish_folder, sync
from pretrain.processes.errors import UserError

FORMAT = "aurora-export"
"""Value of `format` in aurora.json; it identifies a folder as an export."""

SCHEMA_VERSION = 1
DEFAULT_PAD_TOKEN = "<|padding|>"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPORTED_NAME = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|README\.md"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|aurora)\.json"
)


class ExportError(UserError):
    """The model cannot be exported as requested; the message says what was found and what to do."""


@dataclass(frozen=True)
class ModelCard:
    """The facts about a run that go into the README and aurora.json of its export."""

    run_name: str
    step: int
    """Optimizer steps taken."""
    tokens: int
    """Target tokens trained on."""
    train_loss: float | None
    """Last training loss, nats per token; None if unknown."""
    validation_loss: float | None
    """Last validation loss, nats per token; None if never measured."""
    bits_per_byte: float | None
    """Validation loss in bits per byte of text; None if never measured."""
    data_sources: Sequence[Mapping[str, Any]]
    """One mapping per source, with at least `name` and `licence`; any other keys become table columns."""
    config_yaml: str
    """The resolved config of the run."""
    git_commit: str | None
    """Commit of the training code; None outside a repository."""
    optimizer: str
    """Name of the optimizer that trained the matrices."""
    datasets: Sequence[str] = ()
    """The data sets of the Hub that it was trained on, as ``organisation/name``."""
    start: str | None = None
    """What the weights were at first, as in "the weights of run a at step 5"; None: random ones."""


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
) -> None:
    """Write the Hugging Face folder `out`.

    The folder appears only when it is complete: everything is written to `out` + ".tmp", synced and
    renamed. An earlier export at `out` is replaced once the new one is complete; any other existing
    folder is an error.

    Args:
        state_dict: weights with the names and shapes of `LlamaForCausalLM(config)`, all of the same
            dtype, which is kept. With tied embeddings the head may be missing.
        config: the architecture; its bos, eos and pad ids are replaced by the tokenizer's.
        tokenizer_file: a `tokenizers` JSON file.
        card: the facts about the run.
        out: the folder to write.
        eos_token: end-of-text token, also used as the beginning-of-text token.
        pad_token: None means `<|padding|>` if the vocabulary has it, and no padding token otherwise.
        max_shard_size: bytes, or a string such as "5GB".

    Raises:
        ExportError: weights and config disagree; the tokenizer cannot be read, lacks a token or has more
            ids than the model; `out` is not an earlier export; or the files cannot be written.
    """
    weights = _checked_weights(state_dict, config)
    tokenizer_json, special_tokens = _checked_tokenizer(tokenizer_file, config, eos_token, pad_token)
    out = Path(out).resolve()
    partial, replaced = (out.with_name(out.name + suffix) for suffix in (".tmp", ".old"))
    _refuse_foreign(out, partial, replaced)

    token_ids = {f"{key}_id": token_id for key, (_, token_id) in special_tokens.items()}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    documents = {
        "config.json": _config_json(config, dtype, token_ids),
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
        (partial / "README.md").write_text(_readme(card, config, weights), encoding="utf-8")
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            (partial / name).write_text(text + "\n", encoding="utf-8")
        for path in partial.iterdir():
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


def _parameters(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of parameters in total, and without the embedding and the head."""
    total = sum(tensor.numel() for tensor in weights.values())
    return total, total - sum(weights[name].numel() for name in (EMBEDDING, HEAD) if name in weights)


def _aurora_json(card: ModelCard, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    def known(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    total, body = _parameters(weights)
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
        "parameters": total,
        "parameters_without_embeddings": body,
        "data_sources": [{key: str(value) for key, value in row.items()} for row in card.data_sources],
    }


def _readme(card: ModelCard, config: LlamaConfig, weights: Mapping[str, Tensor]) -> str:
    total, body = _parameters(weights)
    front_matter = yaml.safe_dump(
        {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "model_name": card.run_name,
            "tags": ["aurora-pretrain", "llama", card.optimizer],
            **({"datasets": list(card.datasets)} if card.datasets else {}),
        },
        sort_keys=False,
        allow_unicode=True,
    )
    losses = {
        "training loss (nats per token)": card.train_loss,
        "validation loss (nats per token)": card.validation_loss,
        "validation bits per byte": card.bits_per_byte,
    }
    facts: dict[str, object] = {
        "parameters": f"{total:,} ({body:,} without embeddings)",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "MLP width": config.intermediate_size,
        "heads (key-value heads)": f"{config.num_attention_heads} ({config.num_key_value_heads})",
        "context length (tokens)": config.max_position_embeddings,
        "optimizer": card.optimizer,
        "steps": f"{card.step:,}",
        "tokens": f"{card.tokens:,}",
        **{name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None},
        "trainer commit": card.git_commit or "not known",
    }
    columns = list(dict.fromkeys(["name", "licence", *(key for row in card.data_sources for key in row)]))
    longest_fence = max((len(run) for run in re.findall(r"`+", card.config_yaml)), default=0)
    fence = "`" * max(3, longest_fence + 1)
    return "\n".join(
        [
            f"---\n{front_matter}---\n",
            f"# {_escaped(card.run_name)}\n",
            f"A Llama-architecture base language model pretrained {_escaped(_origin(card))} with aurora-pretrain."
            " It completes text; it has not been taught to follow instructions.\n",
            *_table(["", "value"], facts.items()),
            "\n## Training data\n",
            *_table(columns, ([_shown(row.get(column, "")) for column in columns] for row in card.data_sources)),
            f"\n## Config of the run\n\n{fence}yaml\n{card.config_yaml.rstrip()}\n{fence}\n",
        ]
    )


def _origin(card: ModelCard) -> str:
    return "from scratch" if card.start is None else f"from {card.start}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]


def _shown(value: object) -> str:
    """A cell of the table of sources: whole numbers with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(value: object) -> str:
    """Return one line of Markdown that renders as `value` literally, even inside a table cell."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


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
