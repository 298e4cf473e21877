"""Why two results cannot be compared item by item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from eval.compare_schema import Metric
from eval.schema import EvalResult, ItemOutcome, TaskResult
from eval.scores import shots_of


def pair_problems(
    first_label: str,
    first: EvalResult,
    label: str,
    other: EvalResult,
    metrics: Mapping[str, Metric],
) -> Iterator[str]:
    """Yield why two results cannot be compared item by item.

    Args:
        first_label: what the messages call the first model.
        first: its result.
        label: what the messages call the other model.
        other: its result.
        metrics: what each task is compared by.
    """
    names = list(metrics)
    pair = f"{first_label} and {label}"
    yield from _shots_problems(pair, first, other, names)
    for name in names:
        one, two = first["tasks"][name], other["tasks"][name]
        if one["version"] != two["version"]:
            yield (
                f"{name}: {pair} differ in the version of the task: {one['version']} and {two['version']}; evaluate"
                " both with the same version of lm-eval"
            )
        if one["split"] != two["split"]:
            yield f"{name}: {pair} differ in the split: {one['split']} and {two['split']}; evaluate both on one split"
        yield from _settings_problems(f"{name}: {pair}", one, two)
        lacking = [who for who, task in ((first_label, one), (label, two)) if metrics[name] not in task]
        if lacking:
            verb, advice = ("lacks", "; --metric acc compares what both have") if len(lacking) == 1 else ("lack", "")
            yield f"{name}: {pair} cannot be compared by {metrics[name]}, which {' and '.join(lacking)} {verb}{advice}"
        yield from _item_problems(f"{name}: {pair}", one["items"], two["items"])


def _shots_problems(pair: str, first: EvalResult, other: EvalResult, names: Sequence[str]) -> Iterator[str]:
    differing: dict[tuple[int | None, int | None], list[str]] = {}
    for name in names:
        one, two = shots_of(first, name), shots_of(other, name)
        if one != two:
            differing.setdefault((one, two), []).append(name)
    for (one, two), tasks in differing.items():
        where = "" if len(tasks) == len(names) else f"{', '.join(tasks)}: "
        yield (
            f"{where}{pair} differ in the number of solved examples in the prompt: {one} and {two}; evaluate both with"
            " the same number"
        )


def _settings_problems(pair: str, one: TaskResult, two: TaskResult) -> Iterator[str]:
    # Results of earlier versions do not record their settings.
    if "settings" in one and "settings" in two:
        settings, others = dict(one["settings"]), dict(two["settings"])
        if max(one.get("num_fewshot", 0), two.get("num_fewshot", 0)) == 0:
            for found in (settings, others):
                found.pop("fewshot_seed", None)  # no example is chosen
        for key in sorted(settings.keys() & others.keys()):
            if settings[key] != others[key]:
                yield (
                    f"{pair} differ in the setting {key}: {settings[key]!r} and {others[key]!r}; evaluate both with the"
                    " same version of this program"
                )
    subsets, other_subsets = one.get("subsets", {}), two.get("subsets", {})
    for name in sorted(subsets.keys() & other_subsets.keys()):
        if subsets[name]["sha256"] != other_subsets[name]["sha256"]:
            yield f"{pair} have different subsets of the name {name!r}; mark both with the same file"


def _item_problems(pair: str, one: Sequence[ItemOutcome], two: Sequence[ItemOutcome]) -> Iterator[str]:
    keys, others = by_key(one), by_key(two)
    if keys.keys() != others.keys():
        both = len(keys.keys() & others.keys())
        yield (
            f"{pair} are not of the same items: {len(keys):,} and {len(others):,} items, {both:,} in both; evaluate"
            " both with the same --items, --limit and --selection"
        )
        return
    differing = sum(
        "source" in item and "source" in others[key] and item["source"] != others[key]["source"]
        for key, item in keys.items()
    )
    if differing:
        yield f"{pair} contradict each other: {differing:,} items have different sources; evaluate both again"


def by_key(items: Sequence[ItemOutcome]) -> dict[tuple[int, str], ItemOutcome]:
    """Return the items by what pairs those of two results."""
    return {(item["doc_id"], item["doc_hash"]): item for item in items}
