"""Where the model to be evaluated is: in a folder or on the Hub. Loads neither torch nor transformers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eval.errors import EvalError
from eval.hub import check_available, find_snapshot

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is."""

    kind: Literal["folder", "hub"]
    name: str
    """Absolute path, or id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None for its main branch."""


def locate_model(model: str | Path, revision: str | None = None) -> ModelSource:
    """Decide whether `model` is a Hugging Face folder or a Hub id, without using the network.

    Args:
        model: a folder, NAME on the Hub, or NAME@REVISION.
        revision: branch, tag or commit on the Hub.

    Raises:
        EvalError: it is neither, the folder does not contain a model, or the revisions contradict each other.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EvalError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        if revision is not None:
            raise EvalError(
                f"{folder} is a folder, which has no revision {revision!r}; only models on the Hub have revisions"
            )
        return ModelSource("folder", str(folder.resolve()))
    hub_id = _HUB_ID.fullmatch(str(model))
    if folder.exists() or not hub_id:
        raise EvalError(f"no model at {model}: neither a Hugging Face folder nor a valid Hub id")
    name, in_name = hub_id.groups()
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise EvalError(f"no model at {model}: neither a Hugging Face folder nor a valid Hub id: {error}") from error
    if revision is not None and in_name is not None and revision != in_name:
        raise EvalError(f"{model} names another revision than the one given, {revision!r}; give one of them")
    return ModelSource("hub", name, revision or in_name)


def check_model(source: ModelSource) -> None:
    """Check that a model of the Hub can be had, before more is done for it.

    Raises:
        EvalError: it does not exist, access is not granted, or it is neither in the cache nor can it be had now.
    """
    if source.kind == "hub":
        check_available(source.name, source.revision)


def find_commit(source: ModelSource, *, with_code: bool) -> str | None:
    """Return the commit of a model of the Hub, whose files are then in the Hugging Face cache; None for a folder.

    Args:
        source: where the model is.
        with_code: whether its Python code is needed as well.

    Raises:
        EvalError: the model is not available.
    """
    return find_snapshot(source.name, source.revision, with_code=with_code).commit if source.kind == "hub" else None
