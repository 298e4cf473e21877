"""Load the model to be evaluated, from a folder or the Hub, and record exactly which one it is."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from lm_eval.models.utils import resolve_max_length
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval.errors import EvalError
from eval.schema import ModelIdentity, Provenance
from pretrain.files import file_sha256

DType = Literal["float32", "bfloat16", "auto"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is."""

    kind: Literal["folder", "hub"]
    name: str
    """Absolute path, or id on the Hub."""


def locate_model(model: str | Path) -> ModelSource:
    """Decide whether `model` is a Hugging Face folder or a Hub id, without using the network.

    Raises:
        EvalError: it is neither, or the folder does not contain a model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EvalError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        return ModelSource("folder", str(folder.resolve()))
    if folder.exists() or not _HUB_ID.fullmatch(str(model)):
        raise EvalError(f"no model at {model}: neither a Hugging Face folder nor a valid Hub id")
    return ModelSource("hub", str(model))


def load_model(
    source: ModelSource, *, dtype: DType, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelIdentity]:
    """Load a model in evaluation mode to `device`, with its tokenizer and its identity.

    A folder is read without using the network. The Hub is the one at `$HF_ENDPOINT`.

    Args:
        source: where the model is.
        dtype: of the weights; "auto" means the one in the model's config.
        device: where to put the model.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        EvalError: the model does not exist or cannot be loaded completely.
    """
    name = source.name
    offline = source.kind == "folder" or not _hub_answers(name)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, with the name of the weight
            **options,
        )
    except Exception as error:  # loaders of models raise anything
        if source.kind == "hub" and offline:
            raise EvalError(
                f"{name} is not a local folder, is not in the Hugging Face cache, and the Hub at"
                f" {constants.ENDPOINT} cannot be reached; check the path or the network"
            ) from error
        raise EvalError(f"cannot load the model {name}: {_first_line(error)}") from error
    # transformers fills these with random numbers and carries on.
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise EvalError(
            f"the weights of {name} are incomplete: {len(absent)} missing or of another shape than in its config, for"
            f" example {absent[0]}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise EvalError(f"the tokenizer of {name} has {len(tokenizer)} entries, but the model only {rows}")
    return model.eval().to(device), tokenizer, _identity(source, model, tokenizer)


def _hub_answers(name: str) -> bool:
    """Return whether the Hub is reachable: one short request instead of a minute of retries.

    Raises:
        EvalError: the Hub says that the model does not exist, or that we have no access to it.
    """
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise EvalError(
            f"{name} is neither a local folder nor a model on the Hub at {constants.ENDPOINT}"
            " (or it is private and no token is set)"
        ) from error
    except Exception:  # offline mode, no route, a time-out, a broken proxy
        return False
    return True


def _identity(source: ModelSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    identity: ModelIdentity = {
        "source": source.kind,
        "name": source.name,
        "parameters": model.num_parameters(),
        "context_length": resolve_max_length(model.config, tokenizer),
    }
    if source.kind == "hub":
        # <cache>/models--<owner>--<name>/snapshots/<commit>/config.json
        cached = try_to_load_from_cache(source.name, "config.json")
        if isinstance(cached, str):
            identity["revision"] = Path(cached).parent.name
        return identity
    folder = Path(source.name)
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    identity["weights_sha256"] = {path.name: file_sha256(path) for path in files}
    if (folder / "aurora.json").is_file():
        identity["provenance"] = _provenance(folder / "aurora.json")
    return identity


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{file} is not a valid record of an export: {error!r}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
