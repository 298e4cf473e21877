"""The models that ``aurora eval`` is given: runs and checkpoints become Hugging Face folders for as long as needed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from eval.config import ModelSection
from eval.errors import EvalError
from eval.held_folder import held_folder
from eval.items import default_cache
from eval.sharing import Team
from eval.sources import ModelSource, locate_model
from pretrain.checkpoint.format import INDEX
from pretrain.export.run import export_checkpoint, is_run_or_checkpoint, open_checkpoint


def locate(model: ModelSection) -> ModelSource | None:
    """Decide where a model is, without using the network; None for a run or a checkpoint.

    Raises:
        UserError: it is nowhere, or has a revision although it is not on the Hub.
    """
    if not is_run_or_checkpoint(Path(model.model)):
        return locate_model(model.model, model.revision)
    check_no_revision(model)
    return None


def check_no_revision(model: ModelSection) -> None:
    """Check that a run or a checkpoint is given without a revision.

    Raises:
        EvalError: it has one.
    """
    if model.revision is not None:
        raise EvalError(
            f"{model.model} is a run or a checkpoint, which has no revision {model.revision!r}; only models of the Hub"
            " have"
        )


@contextlib.contextmanager
def as_model(source: str, team: Team) -> Iterator[str]:
    """Yield a name that `eval.sources.locate_model` understands: for a run or checkpoint, the folder of an export.

    The export lies in the cache. It is deleted when no process uses it any more; if all of them are killed, the next
    evaluation uses it, or deletes it.

    Raises:
        UserError: the run or checkpoint cannot be exported.
    """
    # One process decides for all: a run may save a newer checkpoint at any moment.
    found = team.on_first(lambda: _checkpoint_of(Path(source)))
    if found is None:
        yield source
        return
    checkpoint, name = found
    if team.ranks.rank == 0 and checkpoint != Path(source).resolve():
        print(f"evaluating {checkpoint}", flush=True)
    exports = default_cache().expanduser() / "eval-exports"
    held = held_folder(exports, name, lambda out: _export(checkpoint, out))
    with contextlib.ExitStack() as stack:
        yield str(team.together(lambda: stack.enter_context(held)))


def _export(checkpoint: Path, out: Path) -> None:
    try:
        export_checkpoint(checkpoint, out)
    except OSError as error:
        cure = (
            "set AURORA_CACHE to a writable folder with enough room"
            if (checkpoint / INDEX).exists()
            else "the checkpoint has been deleted meanwhile; evaluate another one"
        )
        raise EvalError(f"cannot export {checkpoint} to {out.parent}: {error}; {cure}") from error


def _checkpoint_of(source: Path) -> tuple[Path, str] | None:
    """The checkpoint to export and a name for its content; None if `source` is neither a run nor a checkpoint."""
    if not is_run_or_checkpoint(source):
        return None
    checkpoint = open_checkpoint(source).folder.resolve()
    try:
        index = (checkpoint / INDEX).read_bytes()
    except OSError as error:
        raise EvalError(f"cannot read the checkpoint {checkpoint}: {error.strerror}: {INDEX}") from error
    return checkpoint, hashlib.sha256(str(checkpoint).encode() + b"\n" + index).hexdigest()[:32]
