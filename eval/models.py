"""Load the model to be evaluated, from a folder or the Hub, and record exactly which one it is."""

import hashlib
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.utils import resolve_max_length
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME as _COPIED_CODE

from eval.errors import EvalError, first_line
from eval.hub import CODE_FILES, TOKENIZER_FILES, WEIGHTS, find_snapshot, weight_files
from eval.items import say
from eval.schema import ModelIdentity, Provenance
from eval.sources import ModelSource
from pretrain.files import file_sha256

DType = Literal["float32", "bfloat16", "float16", "auto"]

# Architectures that predict a token from both sides, or no token at all. Others are found out by `_probe`.
_NOT_CAUSAL = re.compile(
    r"\w+For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice"
    r"|NextSentencePrediction)"
)
# Constants that older versions of transformers saved with the weights.
_OLD_CONSTANTS = re.compile(r".+\.(masked_bias|inv_freq|position_ids)")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def load_model(
    source: ModelSource, *, dtype: DType, device: torch.device, trust_remote_code: bool, progress: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelIdentity]:
    """Load a model in evaluation mode to `device`, with its tokenizer and its identity.

    A folder is read without using the network. The Hub is the one at `$HF_ENDPOINT`.

    Args:
        source: where the model is.
        dtype: of the weights; "auto" means the one in the model's config.
        device: where to put the model.
        trust_remote_code: whether Python code that comes with the model may run.
        progress: whether to print on standard error which model it is.

    Raises:
        EvalError: the model does not exist, cannot be loaded exactly as it was saved, or does not read from left to
            right.
    """
    name, folder = source.name, Path(source.name)
    identity: ModelIdentity = {"source": source.kind, "name": name, "parameters": 0, "context_length": 0}
    if source.kind == "hub":
        snapshot = find_snapshot(name, source.revision, with_code=trust_remote_code)
        folder, identity["revision"] = snapshot.folder, snapshot.commit
        if snapshot.note:
            say(progress, f"{name} comes from the Hugging Face cache, since {snapshot.note}")
    _check_config(name, folder)
    model, tokenizer = _load(name, folder, dtype, trust_remote_code)
    try:
        model.to(device)
        sees_ahead, is_flat = _probe(model, min(16, resolve_max_length(model.config, tokenizer)))
    except torch.OutOfMemoryError as error:
        gigabytes = model.num_parameters() * model.dtype.itemsize / 1e9
        raise EvalError(
            f"{name} does not fit into the memory of {device}: its weights take {gigabytes:.1f} GB as"
            f" {_plain(model.dtype)}; use a narrower --dtype or another --device"
        ) from error
    except Exception as error:  # models raise anything
        raise EvalError(f"cannot run the model {name} on {device}: {first_line(error)}") from error
    if sees_ahead:
        raise EvalError(
            f"{name} is not a causal language model: what it predicts for a token depends on later ones"
            f" ({type(model).__name__}, an encoder); only models that read from left to right can be evaluated"
        )
    if is_flat:
        # All answers would be equally likely, and the first one would win.
        raise EvalError(f"{name} gives every token the same probability; its weights may be damaged")
    identity = _identify(identity, folder, model, tokenizer, trust_remote_code)
    say(progress, _description(identity, device))
    return model, tokenizer, identity


def _description(identity: ModelIdentity, device: torch.device) -> str:
    """What decides about the scores of a model, in two lines."""
    where = f" at {identity['revision'][:12]}" if "revision" in identity else ""
    before = "no BOS token" if identity["bos"] == "none" else f"{identity['bos']} before each text"
    return (
        f"model: {identity['name']}{where}, SHA-256 {identity['sha256'][:12]}\n"
        f"  {identity['parameters'] / 1e6:,.1f}M parameters"
        f" ({identity['parameters_without_embeddings'] / 1e6:,.1f}M without embeddings), {identity['dtype']} on"
        f" {device}, context of {identity['context_length']:,} tokens, {before}"
    )


def _check_config(name: str, folder: Path) -> None:
    """Refuse what transformers would load as something else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        named = config.get("architectures") or []
        if not isinstance(named, list):
            raise ValueError(f"architectures is {named!r}, expected a list")
    except (OSError, ValueError, RecursionError) as error:
        raise EvalError(f"cannot load the model {name}: config.json: {error}") from error
    if (folder / "adapter_config.json").is_file():
        raise EvalError(f"{name} contains only an adapter; merge it into its base model and evaluate the merged folder")
    if config.get("transformers_weights") is not None:
        raise EvalError(
            f"the config.json of {name} names a file of weights, in transformers_weights; rename the file to"
            f" {WEIGHTS[0]}, and remove the key"
        )
    if not weight_files(folder):
        raise EvalError(f"cannot load the model {name}: it has no weights: none of {', '.join(WEIGHTS)}")
    architectures = [str(kind) for kind in named]
    refused = next((kind for kind in architectures if _NOT_CAUSAL.fullmatch(kind)), None)
    if refused or config.get("is_encoder_decoder"):
        raise EvalError(
            f"{name} is not a causal language model: its config.json names"
            f" {refused or 'an encoder with a decoder'}; only models that read from left to right can be evaluated"
        )


def _load(
    name: str, folder: Path, dtype: DType, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Trusted code may lie in another repository of the Hub.
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, with the name of the weight
            **options,
        )
        rows = model.get_input_embeddings().weight.shape[0]
        highest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # loaders of models raise anything
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise EvalError(
                f"{name} can only be loaded by running Python code that comes with it; none of it was run. Read that"
                " code, then pass --trust-remote-code (trust_remote_code: true in a config)"
            ) from error
        raise EvalError(f"cannot load the model {name}: {_why_not(folder, error)}") from error
    _check_weights(name, model, info)
    if highest >= rows:
        raise EvalError(
            f"the tokenizer of {name} has tokens up to number {highest:,}, but the model knows only {rows:,}; the"
            " tokenizer may belong to another model"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise EvalError(
            f"the tokenizer of {name} has neither a BOS nor an EOS token, which lm-eval puts before an empty context;"
            " set eos_token in its tokenizer_config.json"
        )
    return model.eval(), tokenizer


def _why_not(folder: Path, error: Exception) -> str:
    """Why a model cannot be loaded, where the library says it in many lines or with bad advice."""
    if not any(path for kind in _VOCABULARIES for path in folder.glob(kind)):
        return "it has no tokenizer: no tokenizer.json, nor a vocabulary in another form"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are damaged, or would run code when read (none was run); convert them to safetensors"
    return first_line(error)


def _check_weights(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    # transformers fills these with random numbers and carries on.
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise EvalError(
            f"the weights of {name} are incomplete: {len(absent)} missing or of another shape than in its config, for"
            f" example {absent[0]}"
        )
    # These it ignores.
    surplus = sorted(key for key in info["unexpected_keys"] if not _OLD_CONSTANTS.fullmatch(key))
    if surplus:
        raise EvalError(
            f"the weights of {name} contain {len(surplus)} tensors that the model in config.json does not have, for"
            f" example {surplus[0]}; the config may belong to another model"
        )
    # It keeps these apart when it loads a model, but lm-eval ties them, and so loses one of the two.
    apart = sorted(model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys())
    if apart:
        raise EvalError(
            f"the config.json of {name} says that weights are tied, but {apart[0]} has values of its own; set"
            " tie_word_embeddings to false, or remove that weight"
        )


@torch.inference_mode()
def _probe(model: PreTrainedModel, length: int) -> tuple[bool, bool]:
    """Return whether the logits of the first of `length` tokens depend on those behind it, and whether they are flat.

    The former is true of encoders, the latter of damaged weights.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    first = torch.full((1, length), rows // 2, device=model.device)
    behind = torch.arange(1, length, device=model.device)
    one, other = (model(first.index_fill(1, behind, token)).logits[0, 0].float() for token in (0, rows - 1))
    # Sums in another order make a difference on some devices.
    tolerance = max(1e-5, 4 * torch.finfo(model.dtype).eps) * float(one.abs().max())
    return float((one - other).abs().max()) > tolerance, bool((one == one[0]).all())


def _identify(
    identity: ModelIdentity,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool,
) -> ModelIdentity:
    weights = {name: file_sha256(folder / name) for name in weight_files(folder)}
    kinds = ("config.json", *TOKENIZER_FILES, *(CODE_FILES if trust_remote_code else ()))
    others = {path for kind in kinds for path in folder.glob(kind) if path.is_file()}
    if trust_remote_code and identity["source"] == "folder":
        others |= {path for kind in CODE_FILES for path in folder.rglob(kind) if path.is_file()}
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in others} | weights
    digests |= {name: file_sha256(path) for name, path in _code_elsewhere(model, tokenizer).items()}
    identity["sha256"] = hashlib.sha256(
        "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()
    identity["parameters"] = model.num_parameters()
    identity["parameters_without_embeddings"] = _parameters_without_embeddings(model)
    identity["context_length"] = resolve_max_length(model.config, tokenizer)
    identity["dtype"] = _plain(model.dtype)
    identity["bos"] = _bos(tokenizer)
    if identity["source"] == "folder":
        identity["weights_sha256"] = weights
    if (folder / "aurora.json").is_file():
        identity["provenance"] = _provenance(folder / "aurora.json")
    return identity


def _code_elsewhere(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """The files of code that was loaded with a model, by module: transformers runs copies of them.

    They may come from another repository, so that a model's own files do not say what its code is.
    """
    modules = {type(one).__module__ for one in (model, model.config, tokenizer)}
    packages = {name.rpartition(".")[0] + "." for name in modules if name.startswith(f"{_COPIED_CODE}.")}
    return {
        f"code {name.removeprefix(package)}": Path(file)
        for package in sorted(packages)
        for name, module in list(sys.modules.items())
        if name.startswith(package) and (file := getattr(module, "__file__", None))
    }


def _parameters_without_embeddings(model: PreTrainedModel) -> int:
    """Number of parameters outside embeddings (of tokens and positions) and the output layer."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    excluded = {id(parameter) for module in tables for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in excluded)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before each text, or "none"."""
    plain, tokens = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    start = next((start for start in range(len(tokens)) if tokens[start : start + len(plain)] == plain), 0)
    return "".join(tokenizer.convert_ids_to_tokens(tokens[:start])) or "none"


def _provenance(file: Path) -> Provenance:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found: Provenance = {
            "run_name": str(content["run_name"]),
            "step": int(content["step"]),
            "tokens": int(content["tokens"]),
        }
        if "checkpoint_sha256" in content:
            found["checkpoint_sha256"] = str(content["checkpoint_sha256"])
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvalError(f"{file} is not a valid record of an export: {error!r}") from error


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
