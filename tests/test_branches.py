"""A new run takes over weights, optimizer or everything from another one, and a run is extended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.store import CheckpointReader, newest_intact
from pretrain.cli import main
from pretrain.config import Config, ConfigError, parse_config
from pretrain.export.run import export_checkpoint
from pretrain.launch import train
from pretrain.launch.ancestor import ancestry_of
from pretrain.run.folder import RunError, RunFolder
from pretrain.training.schedule import lr_factor
from pretrain.training.start_validation import StartValidation
from tests.conftest import TINY, merged

BATCH = 192
STABLE = {"kind": "constant", "warmup_tokens": 2 * BATCH}
DECAY = {"kind": "wsd", "warmup_tokens": 2 * BATCH, "decay_start_tokens": 5 * BATCH}
EXACT = ("step", "tokens", "loss", "lr", "adamw_lr", "grad_norm", "batch_sha256")
Make = Callable[..., Config]


def config_in(root: Path, name: str, **changes: Any) -> Config:
    """A run of 8 steps in `root`; `section__key=value`."""
    short = {"run.root": str(root), "run.name": name, "train.total_tokens": 8 * BATCH, "checkpoint.save_every_steps": 2}
    small = {"train.global_batch_tokens": BATCH, "checkpoint.keep_last": 9, "optimizer.polar": "gram"}
    source = {"path": str(root / "text.jsonl"), "split_units": 4, "max_epochs": None}
    data = {"data": {"sources": [source], "lanes": 4, "validation_fraction": 0.1}, "schedule": STABLE}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(TINY, short | small | data | dotted))


def write_texts(file: Path, word: str) -> None:
    texts = [{"text": f"{word} {number * number} said the whale " * 9} for number in range(120)]
    file.write_text("\n".join(map(json.dumps, texts)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the run `parent`, stopped after step 4 of a stable phase, and `export`, that of its checkpoint."""
    root = tmp_path_factory.mktemp("branches")
    write_texts(root / "text.jsonl", "so")
    assert train(config_in(root, "parent", schedule=STABLE), stop_at=4) == 75
    export_checkpoint(root / "parent", root / "export")
    return root


@pytest.fixture
def make(root: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes configs of runs that are deleted after the test."""
    made = []

    def config(name: str, **changes: Any) -> Config:
        made.append(config_in(root, name, **changes))
        return made[-1]

    yield config
    for one in made:
        shutil.rmtree(one.run_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    """A finished run of 8 steps in the stable phase."""
    config = config_in(root, "stable-whole")
    assert train(config) == 0
    return config


def init(root: Path, what: str, take: str = "weights") -> dict[str, str]:
    return {"from": str(root / what), "take": take}


def newest(config: Config) -> CheckpointReader:
    reader, _ = newest_intact(RunFolder(config.run_folder).checkpoints)
    assert reader is not None
    return reader


def tensors(config: Config) -> dict[str, list[float]]:
    reader = newest(config)
    saved = reader.index["parameters"]
    return {f"{name}:{slot}": reader.read(name, slot).tolist() for name in saved for slot in saved[name]}


def lines(config: Config) -> list[list[Any]]:
    return [[record[key] for key in EXACT] for record in RunFolder(config.run_folder).metrics.read()]


def manifest(config: Config) -> dict[str, Any]:
    return RunFolder(config.run_folder).manifest() or {}


def test_a_decay_equals_a_run_that_had_its_schedule_from_the_start(root: Path, make: Make) -> None:
    """Also after the branch was stopped, and its parent deleted."""
    whole = make("whole", schedule=DECAY)
    assert train(whole) == 0
    shutil.copytree(root / "parent", root / "moved")
    branch = make("branch", schedule=DECAY, init=init(root, "moved", "all"))
    assert train(branch, stop_at=6) == 75
    shutil.rmtree(root / "moved")
    assert train(branch) == 0
    assert lines(branch) == lines(whole)[4:]
    assert lines(branch)[-1][3] < lines(branch)[0][3]  # it has decayed
    assert tensors(branch) == tensors(whole)
    for key in ("data_state", "optimizer_groups"):
        assert newest(branch).index[key] == newest(whole).index[key]  # type: ignore[literal-required]
    (ancestor,) = manifest(branch)["ancestry"]
    assert ancestor.items() >= {"run": "parent", "step": 4, "tokens": 4 * BATCH, "take": "all"}.items()
    assert newest(branch).index["provenance"]["ancestry"] == [ancestor]
    assert [launch["from_step"] for launch in manifest(branch)["launches"]] == [4, 6]


def test_a_branch_of_a_branch_knows_both_and_a_longer_run_is_one(root: Path, make: Make, whole: Config) -> None:
    longer = make("longer", schedule=STABLE, train__total_tokens=12 * BATCH, init=init(root, "parent", "all"))
    assert train(longer, stop_at=6) == 75
    second = make("second", schedule=STABLE, init=init(root, "longer/checkpoints/step-00000006", "all"))
    assert train(second) == 0
    assert [one["run"] for one in manifest(second)["ancestry"]] == ["longer", "parent"]
    assert [line[0] for line in lines(second)] == [7, 8]
    assert lines(second) == lines(whole)[6:]


def test_other_rates_in_the_past_and_other_settings_are_warned_of(
    root: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {"kind": "wsd", "decay_start_tokens": 2 * BATCH}
    branch = make("branch", schedule=early, optimizer__lr=0.01, init=init(root, "parent", "all"))
    assert train(branch, stop_at=5) == 75
    said = capsys.readouterr().out
    assert "its factor was 1 at the last step and would have been 0.833333" in said
    assert "optimizer.lr: 0.02 in the run, 0.01 now" in said
    assert lines(branch)[0][3] == pytest.approx(0.01 * lr_factor(branch.schedule, 4 * BATCH, BATCH, 8 * BATCH))


@pytest.mark.parametrize("take", ["weights", "weights+optimizer"])
def test_a_new_run_takes_weights_and_begins_the_data_anew(take: str, root: Path, make: Make) -> None:
    """At rate zero, which shows what was taken; other data, another schedule, another batch."""
    still = {"optimizer__lr": 0.0, "optimizer__adamw": {"lr": 0.0}, "train__global_batch_tokens": 384}
    branch = make("branch", **still, run__seed=7, data__seed=5, init=init(root, "parent", take))
    assert train(branch, stop_at=1) == 75
    before, after = CheckpointReader(root / "parent/checkpoints/step-00000004"), newest(branch)
    assert after.index["counters"]["tokens"] == 384
    for name in before.index["parameters"]:
        assert torch.equal(after.read(name, "weight"), before.read(name, "weight")), name
        steps = before.read(name, "step").item() if take != "weights" else 0
        assert after.read(name, "step").item() == steps + 1
    assert [line[0] for line in lines(branch)] == [1]


@pytest.mark.parametrize("what", ["parent", "export"])
def test_what_a_run_starts_from_is_validated_before_its_first_step(
    what: str, root: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = make("warm", run__seed=7, init=init(root, what))
    assert train(branch, stop_at=2) == 75
    first, second = RunFolder(branch.run_folder).metrics.read()
    out = capsys.readouterr().out
    assert f"before the first step: validation loss {first['start_validation_loss']:.4f}" in out
    assert "start_validation_loss" not in second
    assert "validation_loss" not in first
    # It is that of the weights which were taken over, and the training is the same to the bit without it.
    rates = {"optimizer__lr": 0.0, "optimizer__adamw": {"lr": 0.0}, "schedule": {"kind": "constant"}}
    still = make("still", train__total_tokens=BATCH, init=init(root, what), **rates)
    assert train(still) == 0
    [record] = RunFolder(still.run_folder).metrics.read()
    assert record["validation_loss"] == record["start_validation_loss"] == first["start_validation_loss"]
    assert record["validation_bits_per_byte"] == record["start_validation_bits_per_byte"]
    before, after = tensors(branch), lines(branch)
    shutil.rmtree(branch.run_folder)
    monkeypatch.setattr(StartValidation, "measure", lambda self, context: None)
    assert train(branch, stop_at=2) == 75
    assert (tensors(branch), lines(branch)) == (before, after)


@pytest.mark.parametrize("take", [None, "all"])
def test_a_run_with_a_position_of_its_own_is_not_validated_before_its_first_step(
    take: str | None, root: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(make("cold", **({"init": init(root, "parent", take)} if take else {})), stop_at=5) == 75
    assert "before the first step" not in capsys.readouterr().out


def test_an_export_taken_back_has_the_same_validation_loss(root: Path, make: Make) -> None:
    def loss_of(name: str, what: str) -> float:
        still = {"optimizer__lr": 0.0, "optimizer__adamw": {"lr": 0.0}, "train__total_tokens": BATCH}
        config = make(name, schedule={"kind": "constant"}, **still, init=init(root, what))
        assert train(config) == 0
        return float(RunFolder(config.run_folder).metrics.read()[-1]["validation_loss"])

    assert loss_of("a", "export") == loss_of("b", "parent")
    assert manifest(make("a"))["ancestry"][0]["kind"] == "huggingface"
    export_checkpoint(root / "a", root / "again")
    assert "pretrained from the weights of export with" in (root / "again/README.md").read_text()
    assert "pretrained from scratch" in (root / "export/README.md").read_text()


# What a run with `init` may not change, and a part of the message.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("weights", {"model__num_heads": 4}, "model.num_heads: 2 in"),
    "rotary base": ("weights", {"model__rope_theta": 5e4}, "model.rope_theta: 10000.0 in"),
    "norm": ("weights", {"model__norm_eps": 1e-6}, "set model.norm_eps=1e-05"),
    "untied": ("weights", {"model__tie_embeddings": False}, "set model.tie_embeddings=true"),
    "another optimizer": (
        "weights+optimizer",
        {"optimizer": {"name": "adamw"}},
        "is momentum, step in",
    ),
    "batch": ("all", {"train__global_batch_tokens": 384}, "train.global_batch_tokens: 192 in the earlier run, 384"),
    "order of the data": ("all", {"data__seed": 5}, "data.seed: 0 in the earlier run, 5 now"),
    "mixture": ("all", {"data__mixture": {"text": 1}}, "data.mixture or data.stages"),
    "nothing left": ("all", {"train__total_tokens": 4 * BATCH}, "train.total_tokens: expected more than the 768"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    name: str, root: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    take, changes, message = REFUSED[name]
    config = make("branch", **changes, init=init(root, "parent", take))
    file = root / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["check", str(file)]) == 2
    checked = capsys.readouterr().err
    assert checked.startswith("error: init.from: ")
    assert message in checked
    assert len(checked.splitlines()) == 1
    assert main(["train", str(file)]) == 2
    assert capsys.readouterr().err == checked
    assert not (config.run_folder / "manifest.json").exists()


def test_the_context_and_with_it_the_rotary_base_may_grow(root: Path, make: Make) -> None:
    longer = {"model__context_length": 64, "model__rope_theta": 5e4, "train__micro_batch_sequences": 3}
    assert train(make("branch", **longer, init=init(root, "parent")), stop_at=1) == 75


def test_a_last_stage_of_the_data_may_follow(root: Path, make: Make, tmp_path: Path) -> None:
    for name in ("web", "code"):
        write_texts(tmp_path / f"{name}.jsonl", name)
    sources = [{"path": f"{tmp_path}/{name}.jsonl", "split_units": 4, "max_epochs": None} for name in ("web", "code")]
    first = {"data__sources": sources, "data__mixture": {"web": 1, "code": 3}, "schedule": STABLE}
    assert train(make("mixed", **first), stop_at=2) == 75
    stages = [{"mixture": {"web": 0.25, "code": 0.75}, "until_tokens": 2 * BATCH}, {"mixture": {"web": 1}}]
    staged = {"data__sources": sources, "data__stages": stages, "schedule": STABLE}
    branch, whole = make("branch", **staged, init=init(root, "mixed", "all")), make("whole", **staged)
    assert train(branch, stop_at=4) == train(whole, stop_at=4) == 75
    assert lines(branch) == lines(whole)[2:]
    stages[0]["until_tokens"] = BATCH
    with pytest.raises(ConfigError, match=r"within the 384 tokens that it has read"):
        train(make("other", data__sources=sources, data__stages=stages, init=init(root, "mixed", "all")))


@pytest.mark.parametrize(
    ("source", "take", "message"),
    [
        ("nothing", "weights", "no such folder"),
        ("n" * 5000, "weights", "no such folder"),
        ("empty", "weights", "expected a run folder, a checkpoint or a Hugging Face folder"),
        ("export", "all", "init.take: expected weights"),
        ("branch/checkpoints", "weights", "belongs to this run itself"),
    ],
)
def test_a_source_that_is_none_is_refused(source: str, take: str, message: str, root: Path, make: Make) -> None:
    (root / "empty").mkdir(exist_ok=True)
    config = make("branch", init=init(root, source, take))
    if source.startswith("branch"):
        (root / source).mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        train(config)


def test_a_damaged_parent_is_refused_and_a_changed_one_after_a_start_as_well(root: Path, make: Make) -> None:
    shutil.copytree(root / "parent", root / "copy")
    state = root / "copy/checkpoints/step-00000004/state-00000.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    config = make("branch", schedule=STABLE, init=init(root, "copy/checkpoints/step-00000004", "all"))
    assert train(config, stop_at=5) == 75
    shutil.rmtree(config.run_folder / "checkpoints")  # as if it had died before its first one
    state.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        train(config)
    shutil.rmtree(state.parent)
    shutil.copytree(root / "parent/checkpoints/step-00000002", state.parent)
    with pytest.raises(ConfigError, match="has changed since the run was started from it"):
        train(config)


@pytest.mark.parametrize("ancestry", [[{"path": "runs/a"}], ["runs/a"], {"path": "runs/a"}, 3])
def test_a_damaged_record_of_the_parent_is_one_message(ancestry: Any, tmp_path: Path, make: Make) -> None:
    folder = RunFolder(tmp_path)
    folder.write_manifest({"ancestry": ancestry})
    with pytest.raises(RunError, match=r"manifest\.json: damaged: its ancestry"):
        ancestry_of(make("branch", **{"init.from": "runs/a"}), folder)


def test_another_parent_is_another_run(root: Path, make: Make) -> None:
    assert train(make("branch", init=init(root, "parent")), stop_at=1) == 75
    shutil.copytree(root / "parent", root / "renamed")
    assert train(make("branch", init=init(root, "renamed")), stop_at=2) == 75  # the same contents
    with pytest.raises(RunError, match=r"init\.from contents"):
        train(make("branch", init=init(root, "export")))
    with pytest.raises(RunError, match=r"init\.take: 'weights' in the run, None now"):
        train(make("branch"))


def test_a_finished_run_is_extended_and_equals_a_longer_one(
    make: Make, whole: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(make("stable", train__total_tokens=5 * BATCH)) == 0
    extended = make("stable")
    assert train(extended, extend=True) == 0
    assert train(extended, extend=True) == 0
    assert "to extend it, raise train.total_tokens" in capsys.readouterr().out
    assert lines(extended) == lines(whole)
    assert tensors(extended) == tensors(whole)
    assert manifest(extended)["launches"][1]["changed_budget"] == {"train.total_tokens": [5 * BATCH, 8 * BATCH]}
    assert "finished" in manifest(extended)


def test_the_decay_moves_with_the_end_of_a_run_that_is_extended(make: Make, whole: Config) -> None:
    first, moved = make("run", schedule=DECAY), DECAY | {"decay_start_tokens": 7 * BATCH}
    with pytest.raises(RunError, match="there is none here"):
        train(first, extend=True)
    assert train(first, stop_at=4) == 75
    with pytest.raises(RunError, match=r"schedule\.decay_start_tokens: 960 in the run, 1344 now"):
        train(make("run", schedule=moved))
    with pytest.raises(RunError, match=r"optimizer\.lr"):
        train(make("run", schedule=moved, optimizer__lr=0.5), extend=True)
    with pytest.raises(RunError, match=r"schedule\.decay_start_tokens"):
        train(make("run", schedule=DECAY | {"decay_start_tokens": 4 * BATCH}), extend=True)
    with pytest.raises(RunError, match=r"--extend expects at least the 1,536 tokens"):
        train(make("run", schedule=DECAY, train__total_tokens=6 * BATCH), extend=True)
    longer = make("run", schedule=moved, train__total_tokens=9 * BATCH)
    assert train(longer, stop_at=6, extend=True) == 75
    assert lines(longer) == lines(whole)[:6]  # not decayed yet


def test_extend_contradicts_resume_never(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "none.yaml", "--extend", "--resume", "never"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
