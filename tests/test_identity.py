"""What a resumed run may change, and what a sweep tells apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint.store import newest_intact
from pretrain.cli import main
from pretrain.config import Config, parse_config
from pretrain.files import file_sha256
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.identity import Identity
from pretrain.sweep import load_sweep, plan_jobs
from tests.conftest import REPOSITORY, SMALL_VOCABULARY, TINY, merged
from tests.warm import warm_workers

MakeConfig = Callable[..., Config]
SHORT = SMALL_VOCABULARY | {"train.total_tokens": 6 * 768, "schedule.warmup_tokens": 0}
OLD = Path(__file__).parent / "config" / "index_fb900ae.json"


def weights(config: Config) -> dict[str, Any]:
    reader, _ = newest_intact(RunFolder(config.run_folder).checkpoints)
    assert reader is not None
    return {name: values.tolist() for name, values in reader.weights().items()}


def index(config: Config) -> dict[str, Any]:
    reader, _ = newest_intact(RunFolder(config.run_folder).checkpoints)
    assert reader is not None
    return dict(reader.index)


def test_a_run_is_resumed_with_its_files_elsewhere_and_its_licence_corrected(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mount in ("a", "b"):
        (tmp_path / mount / "text").mkdir(parents=True)
        for name in ("moby_dick.parquet", "sotu.parquet"):
            shutil.copyfile(REPOSITORY / "assets/corpus" / name, tmp_path / mount / "text" / name)
        shutil.copyfile(REPOSITORY / "assets/tokenizer/tokenizer-2048.json", tmp_path / mount / "t.json")

    def on(mount: str, name: str, licence: str) -> Config:
        source = {"path": str(tmp_path / mount / "text"), "licence": licence}
        files = {"data.sources": [source], "tokenizer.path": str(tmp_path / mount / "t.json")}
        return tiny_config({**SHORT, **files, "run.name": name})

    assert train(on("a", "moved", "unknown"), stop_at=3) == 75
    assert train(on("b", "moved", "CC0"), stop_at=4) == 75
    shutil.rmtree(tmp_path / "a")
    assert train(on("b", "moved", "CC0")) == 0
    assert "warning" not in capsys.readouterr().err
    straight = on("b", "straight", "CC0")
    assert train(straight) == 0
    assert weights(on("b", "moved", "CC0")) == weights(straight)
    moved = RunFolder(on("b", "moved", "CC0").run_folder).metrics.read()
    assert [line["batch_sha256"] for line in moved] == [
        line["batch_sha256"] for line in RunFolder(straight.run_folder).metrics.read()
    ]
    assert index(on("b", "moved", "CC0"))["config"]["data"]["sources"][0]["licence"] == "CC0"


def test_files_in_another_order_are_other_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("x.jsonl", "y.jsonl"):
        lines = [json.dumps({"text": f"{name} {i} " * 60}) for i in range(60)]
        (tmp_path / name).write_text("\n".join(lines))
    changes = {**SHORT, "data.sources": [{"path": f"{tmp_path}/*.jsonl", "split_units": 2}]}
    assert train(tiny_config(changes), stop_at=1) == 75
    (tmp_path / "x.jsonl").rename(tmp_path / "z.jsonl")
    with pytest.raises(RunError, match=r"data\.sources\.0 contents: '2 files"):
        train(tiny_config(changes))


def mixed(tmp_path: Path, **data: Any) -> dict[str, Any]:
    """Two sources; the small one is read once in about two steps."""
    texts = {"web": 400, "code": 12}
    for name, count in texts.items():
        lines = [json.dumps({"text": f"{name} {number} said the whale " * 9}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [{"path": f"{tmp_path}/{name}.jsonl", "split_units": 3, "max_epochs": None} for name in texts]
    return {**SHORT, "data.sources": sources, **{f"data.{key}": value for key, value in data.items()}}


def test_a_run_of_a_mixture_resumes_and_says_when_epochs_begin(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"mixture": {"web": 1, "code": 2}, "until_tokens": 1500}, {"mixture": {"web": 0.3, "code": 0.7}}]
    changes = mixed(tmp_path, stages=stages)
    straight = tiny_config({**changes, "run.name": "straight"})
    assert train(straight) == 0
    said = capsys.readouterr().out
    assert "source code: epoch 2 begins at step" in said
    assert "stage 2 of the mixture has been reached at step 2" in said
    assert train(tiny_config(changes), stop_at=2) == 75
    assert train(tiny_config(changes), stop_at=4) == 75
    assert train(tiny_config(changes)) == 0
    assert weights(tiny_config(changes)) == weights(straight)
    state = index(straight)["data_state"]
    assert sum(source["sequences"] for source in state["sources"]) == state["sequences_emitted"] == 6 * 768 // 32


def test_a_limit_of_epochs_is_part_of_a_run_only_where_it_ends_a_source(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    changes = mixed(tmp_path, mixture={"web": 0.9, "code": 0.1})
    web, code = ({**source, "max_epochs": 4} for source in changes["data.sources"])
    changes["data.sources"], unlimited = [web, code], [web, {**code, "max_epochs": None}]
    assert train(tiny_config(changes), stop_at=1) == 75
    assert train(tiny_config({**changes, "data.sources": unlimited}), stop_at=2) == 75
    with pytest.raises(RunError, match=r"data\.mixture: \{'web': 0\.9, 'code': 0\.1\} in the run"):
        train(tiny_config({**changes, "data.mixture": {"web": 0.8, "code": 0.2}}))
    ending = {**changes, "data.past_max_epochs": "end_source", "run.name": "ending"}
    with pytest.raises(RunError, match=r"data\.past_max_epochs: None in the run, 'end_source' now"):
        train(tiny_config({**ending, "run.name": "tiny"}))
    assert train(tiny_config(ending), stop_at=1) == 75
    with pytest.raises(RunError, match=r"data\.sources\.1\.max_epochs: 4 in the run, 'no limit' now"):
        train(tiny_config({**ending, "data.sources": unlimited}))
    assert train(tiny_config(ending)) == 0


@pytest.mark.parametrize("steps", [4, 9])
def test_a_run_is_shortened_or_extended_with_a_warning(
    steps: int, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(SHORT), stop_at=3)
    capsys.readouterr()
    config = tiny_config({**SHORT, "train.total_tokens": steps * 768})
    assert train(config) == 0
    captured = capsys.readouterr()
    assert f"train.total_tokens was 4,608, now {steps * 768:,}" in captured.out + captured.err
    folder = RunFolder(config.run_folder)
    assert folder.finished
    records = folder.metrics.read()
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert records[-1]["lr"] < records[0]["lr"]  # the decay is that of the new end


def test_a_finished_run_is_extended(tiny_config: MakeConfig) -> None:
    assert train(tiny_config(SHORT)) == 0
    longer = tiny_config({**SHORT, "train.total_tokens": 8 * 768})
    assert train(longer) == 0
    assert [record["step"] for record in RunFolder(longer.run_folder).metrics.read()] == list(range(1, 9))


def test_a_run_does_not_end_before_where_it_is(tiny_config: MakeConfig) -> None:
    train(tiny_config(SHORT), stop_at=3)
    before = weights(tiny_config(SHORT))
    with pytest.raises(RunError, match=r"expected at least the 2,304 tokens trained on, got 1,536"):
        train(tiny_config({**SHORT, "train.total_tokens": 2 * 768}))
    assert weights(tiny_config(SHORT)) == before


def test_a_constant_schedule_is_extended_without_a_warning(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {**SHORT, "schedule.kind": "constant"}
    train(tiny_config(constant), stop_at=2)
    assert train(tiny_config({**constant, "train.total_tokens": 8 * 768})) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.out + captured.err


def test_other_arithmetic_is_announced_and_used(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config({**SHORT, "optimizer.polar": "gram"}), stop_at=3)
    changed = {"optimizer.adamw.fused": True, "optimizer.polar_dtype": "bf16", "train.micro_batch_sequences": 12}
    config = tiny_config({**SHORT, "optimizer.polar": "gram", **changed})
    assert train(config) == 0
    captured = capsys.readouterr()
    (warning,) = [line for line in (captured.out + captured.err).splitlines() if "numerics changed" in line]
    assert "optimizer.adamw.fused: False in the run, True now" in warning
    assert "optimizer.polar_dtype: 'auto' in the run, 'bf16' now" in warning
    assert "train.micro_batch_sequences: 6 in the run, 12 now" in warning
    groups = index(config)["optimizer_groups"]
    assert [group["fused"] for group in groups if group["kind"] == "adamw"] == [True, True]
    assert [group["polar_dtype"] for group in groups if group["kind"] == "matrix"] == ["bf16"]


def test_the_resumed_step_uses_the_new_kernel(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    train(tiny_config(SHORT), stop_at=3)
    calls: list[int] = []
    fused = torch._fused_adamw_

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    assert train(tiny_config(SHORT), stop_at=4) == 75
    assert calls == []
    assert train(tiny_config({**SHORT, "optimizer.adamw.fused": True}), stop_at=5) == 75
    assert calls


def test_what_is_free_is_free(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(SHORT), stop_at=2)
    capsys.readouterr()
    free = {"data.workers": 1, "checkpoint.keep_last": 1, "train.activation_checkpointing": "full"}
    with warm_workers():
        assert train(tiny_config({**SHORT, **free, "logging.every_steps": 1, "validation.every_steps": 5})) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.out + captured.err


def test_a_run_whose_config_is_gone_is_not_overwritten(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=1)
    (config.run_folder / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"its config\.yaml or manifest\.json cannot be used"):
        train(config)


def test_a_run_that_does_not_say_what_it_was_trained_on_is_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=1)
    path = config.run_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["data"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="the digests of its data and tokenizer are missing"):
        train(config)


# --- checkpoints of before


def old_index() -> dict[str, Any]:
    """What commit fb900ae wrote: a flat identity with paths and licences, and options without effect in the config."""
    read: dict[str, Any] = json.loads(OLD.read_text())
    return read


def old_config(**changes: Any) -> Config:
    """The config of that checkpoint as a person may write it now."""
    data = old_index()["config"]
    del data["validation"], data["schedule"]["final_fraction"], data["train"]["loss_chunk_tokens"]
    del data["telemetry"]["reference_step"], data["telemetry"]["activation_sequences"]
    del data["checkpoint"]["keep_every_steps"]
    return parse_config(merged(data, changes))


def as_now(config: Config, old: dict[str, Any]) -> Identity:
    return Identity.of(config, old["provenance"]["data"], old["identity"]["tokenizer contents"])


def test_the_identity_of_an_old_checkpoint_is_that_of_its_config_today() -> None:
    old = old_index()
    assert old["identity"]["data.sources.0.licence"] == "public domain"
    saved = Identity.of_checkpoint(old)
    assert as_now(old_config(), old).check(saved, Path("run"), old["step"]) == []
    moved = old_config(**{"tokenizer.path": "b.json"})
    assert as_now(moved, old).check(saved, Path("run")) == []


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.lr", 0.01), ("model.rope_theta", 5e4), ("data.seed", 4), ("schedule.kind", "linear")]
)
def test_an_old_checkpoint_is_not_resumed_as_another_run(key: str, value: Any) -> None:
    old = old_index()
    changes = {key: value}
    data = old_config().resolved()
    if key == "schedule.kind":
        del data["schedule"]["decay_fraction"]
    config = parse_config(merged(data, changes))
    with pytest.raises(RunError, match=key.replace(".", r"\.")):
        as_now(config, old).check(Identity.of_checkpoint(old), Path("run"))


def test_an_old_checkpoint_of_other_files_is_not_resumed() -> None:
    old, other = old_index(), old_index()
    other["provenance"]["data"]["sources"][0]["files"][0]["sha256"] = "0" * 64
    with pytest.raises(RunError, match=r"data\.sources\.0 contents"):
        as_now(old_config(), other).check(Identity.of_checkpoint(old), Path("run"))
    with pytest.raises(RunError, match="tokenizer contents"):
        Identity.of(old_config(), old["provenance"]["data"], "0" * 64).check(Identity.of_checkpoint(old), Path("run"))


def test_a_checkpoint_records_its_identity(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=1)
    recorded = index(config)["identity"]
    tokenizer = file_sha256(Path(config.tokenizer.path))
    manifest = RunFolder(config.run_folder).manifest()
    assert manifest is not None
    assert recorded == Identity.of(config, manifest["data"], tokenizer).record()
    assert recorded["tokenizer contents"] == tokenizer
    assert not any("path" in key or "licence" in key for key in recorded)
    assert manifest["identity"] == recorded


# --- sweeps


def runs(tmp_path: Path, axis: dict[str, dict[str, Any]]) -> list[str]:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(merged(TINY, {})))
    sweep = {"name": "s", "base": "base.yaml", "root": str(tmp_path / "runs"), "axes": {"axis": axis}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return [job.run.path.name for job in plan_jobs(load_sweep(tmp_path / "sweep.yaml"))]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("train.precision", "fp32", "bf16"),
        ("train.compile", False, True),
        ("train.micro_batch_sequences", 6, 12),
        ("train.loss_chunk_tokens", None, 64),
        ("engine.kind", "plain", "deepspeed"),
        ("optimizer.adamw.fused", False, True),
        ("data.workers", 0, 1),
        ("data.sources.0.path", "a", "b"),
        ("train.total_tokens", 30720, 15360),
    ],
)
def test_a_sweep_gives_each_setting_a_run_of_its_own(tmp_path: Path, key: str, first: Any, second: Any) -> None:
    one, other = runs(tmp_path, {"one": {key: first}, "other": {key: second}})
    assert one != other


@pytest.mark.parametrize("key", ["wire_dtype", "communication_dtype", "reduce_bucket_elements"])
def test_so_does_every_key_of_the_engine(tmp_path: Path, key: str) -> None:
    zero = {"engine.kind": "deepspeed", "train.precision": "bf16", "engine.zero_stage": 2}
    value = 1000 if key == "reduce_bucket_elements" else "fp32" if key == "wire_dtype" else "bf16"
    one, other = runs(tmp_path, {"one": zero, "other": {**zero, f"engine.{key}": value}})
    assert one != other


def test_a_sweep_shares_the_runs_that_compute_the_same(tmp_path: Path) -> None:
    online = {"run.seed": 1, "wandb.mode": "offline"}
    one, other = runs(tmp_path, {"one": online, "other": {**online, "wandb.project": "mine"}})
    assert one == other


def test_a_run_without_validation_data_is_exported(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config({**SHORT, "data.validation_fraction": 0})
    assert train(config, stop_at=2) == 75
    assert main(["export", str(config.run_folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
