"""A preparation that is killed again and again ends in the same bytes as one that was left alone."""

import functools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError
from pretrain.data.prepared import parts, plan
from pretrain.data.prepared import prepare as module
from pretrain.data.prepared.layout import is_prepared, load_index
from pretrain.data.prepared.plan import PrepareOptions
from pretrain.data.prepared.prepare import prepare
from tests.data.corpus import (
    Setting,
    die_at_change,
    fork,
    forked,
    make_setting,
    make_texts,
    write_jsonl,
    write_parquet,
)

OPTIONS = PrepareOptions(shard_tokens=3_000, remove_duplicates=True)
KILLS = 10


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_a_process(setting: Setting, folder: Path, seconds: float) -> bool:
    """Prepare in a forked process and kill it after some time; return whether it was finished before."""
    child = fork(lambda: prepare(setting.config, setting.tokenizer, folder, options=OPTIONS))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_killed_ten_times_it_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    texts = make_texts(1, 900)
    setting = make_setting(
        tokenizer, write_parquet(tmp_path / "a.parquet", texts, 15), write_jsonl(tmp_path / "b.jsonl", texts[::7])
    )
    begin = time.perf_counter()
    prepare(setting.config, setting.tokenizer, tmp_path / "undisturbed", options=OPTIONS)
    whole = time.perf_counter() - begin
    expected = contents(tmp_path / "undisturbed")
    rng = random.Random(3)
    stages = set()
    for _ in range(KILLS):
        finished = in_a_process(setting, tmp_path / "killed", rng.uniform(0.05, 0.3) * whole)
        files = {Path(name).name for name in contents(tmp_path / "killed")}
        stages.add(len(files))
        if not finished and is_prepared(str(tmp_path / "killed" / "a")):
            assert load_index(str(tmp_path / "killed" / "a")).documents
    assert len(stages) > 3  # it was killed at different places
    prepare(setting.config, setting.tokenizer, tmp_path / "killed", options=OPTIONS)
    assert contents(tmp_path / "killed") == expected


@pytest.mark.parametrize("most", [16, pytest.param(1000, marks=pytest.mark.long)], ids=["start", "all"])
def test_killed_before_any_of_its_changes_it_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """An attempt dies at its first change of the folder, one at its second, and so on to the end of the work."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = make_texts(1, 40)
    paths = [write_parquet(tmp_path / "a.parquet", texts, 30), write_jsonl(tmp_path / "b.jsonl", [*texts[::7], "x"])]
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes() + b"[]\n")
    setting = make_setting(tokenizer, *paths, max_bad_rows=1)

    def work(folder: Path, changes: int | None = None) -> None:
        if changes is not None:
            die_at_change(folder, changes)
        prepare(setting.config, setting.tokenizer, folder, options=OPTIONS)

    work(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    deaths = 0
    while deaths < most and (code := forked(functools.partial(work, tmp_path / str(deaths), deaths))) != 0:
        assert code == -signal.SIGKILL
        folder = tmp_path / str(deaths)
        left = sorted(contents(folder))
        work(folder)
        assert contents(folder) == expected, left
        deaths += 1
    assert deaths >= 16


def test_what_was_not_completed_cannot_be_read(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", make_texts(1, 30)), lanes=1)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("pretrain.data.prepared.prepare.replace_text", fail)  # the index
        with pytest.raises(OSError, match="no space"):
            prepare(setting.config, setting.tokenizer, tmp_path / "to")
    assert (tmp_path / "to" / "shard-00000.tokens").is_file()
    reading = setting.changed(sources=[{"path": str(tmp_path / "to")}])
    with pytest.raises(DataError, match="was not prepared completely"):
        reading.open()
    prepare(setting.config, setting.tokenizer, tmp_path / "to")
    reading.open()


def test_a_disk_that_is_too_small_is_noticed_early(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(1, 100), 10), lanes=1)

    class Usage:
        free = 10

    with monkeypatch.context() as small:
        small.setattr("pretrain.data.prepared.prepare.shutil.disk_usage", lambda path: Usage)
        with pytest.raises(DataError, match=r"about .* MB more are needed, and 0\.0 MB are free"):
            prepare(setting.config, setting.tokenizer, tmp_path / "to")
    assert len(list((tmp_path / "to" / "parts").glob("*.npz"))) == 1  # after the first of ten parts
    prepare(setting.config, setting.tokenizer, tmp_path / "to")


@pytest.mark.parametrize("dies_after", [False, True], ids=["before", "after"])
def test_killed_around_renames_it_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, dies_after: bool
) -> None:
    """Attempts die in turn around their second to fifth rename: a part takes up to three of them, a shard three."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    texts = make_texts(1, 120)
    paths = [write_parquet(tmp_path / "a.parquet", texts, 30), write_jsonl(tmp_path / "b.jsonl", [*texts[::7], "x"])]
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes() + b"[]\n")
    setting = make_setting(tokenizer, *paths, max_bad_rows=1)
    prepare(setting.config, setting.tokenizer, tmp_path / "undisturbed", options=OPTIONS)
    attempts = renames = 0

    def work() -> None:
        rename = Path.replace

        def dying(path: Path, target: Path) -> None:
            nonlocal renames
            renames += 1
            last = renames == 2 + attempts % 4
            if last and not dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(path, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = dying  # type: ignore[assignment, method-assign]
        prepare(setting.config, setting.tokenizer, tmp_path / "killed", options=OPTIONS)

    while (code := forked(work)) != 0:
        assert code == -signal.SIGKILL
        attempts += 1
        assert attempts < 100
    expected = contents(tmp_path / "undisturbed")
    assert attempts > 6
    assert contents(tmp_path / "killed") == expected
    assert load_index(str(tmp_path / "killed" / "b")).bad_rows == {str(tmp_path / "b.jsonl"): 1}


def test_a_full_disk_ends_with_the_cure_and_what_was_written_is_used(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are limited in size, which fails in the same places as a disk without space."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(1, 400), 50), lanes=1)
    options = PrepareOptions(shard_tokens=100_000)
    prepare(setting.config, setting.tokenizer, tmp_path / "undisturbed", options=options)
    expected = contents(tmp_path / "undisturbed")
    largest = len(expected["shard-00000.tokens"])

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(DataError, match="File too large: make room and repeat the command, which continues"):
            prepare(setting.config, setting.tokenizer, tmp_path / "to", options=options)

    for size in (100, 2_000, largest // 4, largest - 1):  # in the plan, in parts, and twice in the shard
        assert forked(lambda size=size: limited(size)) == 0  # type: ignore[misc]
    assert sorted(path.name for path in (tmp_path / "to" / "parts").glob("*.npz"))[-1] == "00007.npz"
    prepare(setting.config, setting.tokenizer, tmp_path / "to", options=options)
    assert contents(tmp_path / "to") == expected


def test_a_worker_that_dies_is_one_error_and_the_work_continues(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(1, 200), 20), lanes=1)
    started: list[Any] = []
    start = module._start_worker

    def and_kill() -> Any:
        process = start()
        started.append(process)
        if len(started) == 2:
            process.kill()
        return process

    with monkeypatch.context() as deadly:
        deadly.setattr(module, "_start_worker", and_kill)
        with pytest.raises(RuntimeError, match=r"a worker \(process \d+\) ended unexpectedly: signal 9"):
            prepare(setting.config, setting.tokenizer, tmp_path / "to", workers=2)
    assert [process.poll() is None for process in started] == [False, False]
    prepare(setting.config, setting.tokenizer, tmp_path / "to")
    prepare(setting.config, setting.tokenizer, tmp_path / "undisturbed")
    assert contents(tmp_path / "to") == contents(tmp_path / "undisturbed")


def test_a_worker_that_waits_ends_with_the_process_that_started_it() -> None:
    """Here it waits for its first part, on a pipe that stays open, as it might for a server."""
    work, answers = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        worker = os.fork()
        if not worker:
            sys.stdin = os.fdopen(work[0])
            parts.main()
        os.write(answers[1], f"{worker}\n".encode())
        time.sleep(600)
        os._exit(1)
    worker = int(os.read(answers[0], 20))
    time.sleep(1)
    assert Path(f"/proc/{worker}").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
        time.sleep(0.05)  # for ever, if it does not end
    for pipe in (*work, *answers):
        os.close(pipe)


def test_parts_that_were_divided_differently_are_not_used(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of parts would stand for other rows."""
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(1, 60), 10), lanes=1)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(plan, "_PART_BYTES", 1)
        interrupted.setattr(module, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(setting.config, setting.tokenizer, tmp_path / "to")
    with pytest.raises(DataError, match="was begun by a version of this program that divides the work differently"):
        prepare(setting.config, setting.tokenizer, tmp_path / "to")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", make_texts(1, 20)), lanes=1)
    for folder in (tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "to"):
        with pytest.raises(DataError, match=r"a\.jsonl.*: choose another folder for --to"):
            prepare(setting.config, setting.tokenizer, folder)


@pytest.mark.long
def test_the_command_with_workers_killed_at_random_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    """Workers notice that the command is gone and end as well."""
    texts = make_texts(1, 40_000)
    write_parquet(tmp_path / "a.parquet", texts, 1000)
    write_jsonl(tmp_path / "b.jsonl.zst", texts[::3])
    config = {
        "tokenizer.path": tokenizer.path,
        "data.sources": f"[{{path: {tmp_path}/a.parquet}}, {{path: {tmp_path}/b.jsonl.zst}}]",
    }
    repository = Path(__file__).parents[2]
    program = (
        "from pretrain.data.prepared import plan; plan._PART_BYTES = 100_000; from pretrain.cli import main; main({})"
    )
    results = []
    for kills in (0, KILLS):
        folder = tmp_path / f"to-{kills}"
        words = ["data", "prepare", "configs/speedrun-3175.yaml", "--to", str(folder), "--workers", "2"]
        words += [
            "--shard-tokens",
            "50000",
            "--remove-duplicates",
            *(f"{key}={value}" for key, value in config.items()),
        ]
        rng = random.Random(5)
        for attempt in range(kills + 1):
            process = subprocess.Popen([sys.executable, "-c", program.format(words)], cwd=repository)
            if attempt < kills:
                time.sleep(rng.uniform(2, 12))
                process.kill()
            process.wait(timeout=300)
        results.append(contents(folder))
    assert results[0] == results[1]
    assert len([name for name in results[0] if name.endswith(".tokens")]) > 5
