"""A preparation that is killed again and again ends in the same bytes as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError
from pretrain.data.prepared import plan
from pretrain.data.prepared.layout import is_prepared, load_index
from pretrain.data.prepared.plan import PrepareOptions
from pretrain.data.prepared.prepare import prepare
from tests.data.corpus import Setting, make_setting, make_texts, write_jsonl, write_parquet

OPTIONS = PrepareOptions(shard_tokens=3_000, remove_duplicates=True)
KILLS = 10


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_a_process(setting: Setting, folder: Path, seconds: float) -> bool:
    """Prepare in a forked process and kill it after some time; return whether it was finished before."""
    child = os.fork()
    if not child:
        code = 1
        try:
            prepare(setting.config, setting.tokenizer, folder, options=OPTIONS)
            code = 0
        finally:
            os._exit(code)
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
        with pytest.raises(DataError, match=r"about .* GB more are needed, and 0\.0 GB are free"):
            prepare(setting.config, setting.tokenizer, tmp_path / "to")
    assert len(list((tmp_path / "to" / "parts").glob("*.npz"))) == 1  # after the first of ten parts
    prepare(setting.config, setting.tokenizer, tmp_path / "to")


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
