"""Values that no config should hold end in one clear line before anything is trained: never a traceback, never late."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from pretrain.cli import main
from pretrain.config import ConfigError, load_config, parse_config
from pretrain.config.data import DataConfig, SourceConfig
from pretrain.config.yaml_text import parse_yaml
from pretrain.data import DataError, check_sources, load_tokenizer
from pretrain.run.inputs import check_inputs
from tests.conftest import TINY, merged

TAGS = [
    "bool",
    "timestamp",
    "map",
    "seq",
    "int",
    "float",
    "binary",
    "set",
    "omap",
    "pairs",
    "merge",
    "value",
    "python/x",
]
VALUES = ["x", "[1]", "{a: b}", "''", "2020-01-01"]
GOOD = {("map", "{a: b}"), ("seq", "[1]")}


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A file without an end must not be read to its end."""

    def fail(*_: Any) -> None:
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_on_something_else_is_not_yaml(tag: str, file: Path) -> None:
    for value in VALUES:
        if (tag, value) in GOOD:
            continue
        text = f"!!{tag} {value}"
        with pytest.raises(ConfigError, match=r"^run\.seed: the value .* is not valid YAML$"):
            load_config(file, [f"run.seed={text}"])
        with pytest.raises((yaml.YAMLError, ValueError)):
            parse_yaml(f"a: {text}")


def test_tags_that_fit_are_read() -> None:
    text = "{a: !!int 1_0, b: !!bool True, c: !!float 1, d: !!str 1, e: !!null '', f: !!map {}, g: !!seq [1]}"
    assert parse_yaml(text)[0] == {"a": 10, "b": True, "c": 1.0, "d": "1", "e": None, "f": {}, "g": [1]}


BAD: dict[str, tuple[str, str]] = {
    "seed of 64 bits": ("run.seed=18446744073709551616", "run.seed: expected a whole number below 2^63"),
    "seed of 63 bits": ("data.seed=9223372036854775808", "data.seed: expected a whole number below 2^63"),
    "whole float": ("run.seed=1e300", "run.seed: input should be a valid integer"),
    "layers": ("model.num_layers=1e9", "model.num_layers: expected at most 4,096"),
    "width": ("model.hidden_size=4611686018427387904", "model.hidden_size: expected at most"),
    "workers": ("data.workers=100000", "data.workers: input should be less than or equal to 1024"),
    "window": (
        "guards.spike_window=1000000000000",
        "guards.spike_window: input should be less than or equal to 100000",
    ),
    "temperature": ("samples.temperature=1e-300", "samples.temperature: input should be greater than"),
    "surrogate": ('samples={every_steps: 1, prompts: ["ab\\ud800"]}', "samples.prompts.0: is not text: character 3"),
    "bytes of the command line": ("run.root=a\udcff", "run.root: is not text"),
    "surrogate in a key": ('data.mixture={"\\ud800": 1}', "data.mixture: is not text"),
    "NUL": ('run.root="a\\0b"', "run.root: holds the character NUL"),
    "within itself": ("run.seed=&a [*a]", "run.seed: the value"),
    "deep": ("run.seed=" + "[" * 40 + "]" * 40, "run.seed: the value"),
    "deep path": (".".join("a" * 100) + "=1", "expected an override of the form"),
    "number as key": ("run={1: 2}", "run.1: keys should be strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_once(name: str, file: Path) -> None:
    override, message = BAD[name]
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    (problem,) = [one for one in caught.value.problems if not one.startswith("run.name: required")]
    assert message in problem
    problem.encode()


def test_the_largest_numbers_are_seeds() -> None:
    largest = parse_config(merged(TINY, {"run.seed": 2**63 - 1, "data.seed": 2**63 - 1}))
    assert parse_config(yaml.safe_load(largest.to_yaml())) == largest


def test_plain_data_from_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^run\.name: expected text, a number, a boolean or null, got a set"):
        parse_config(merged(TINY, {"run.name": {1}}))
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="nested in more than 32 levels"):
        parse_config(merged(TINY, {"run.name": None}) | {"samples": {"prompts": endless}})


SECRETS = [
    "https://user:hunter2hunter2@host/x",
    "https://host/x?X-Amz-Signature=hunter2hunter2",
    "https://hooks.slack.com/services/T0/B0/hunter2hunter2",
    "hf_hunter2hunter2hunter2",
    "Bearer hunter2hunter2",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_refused_and_not_repeated(secret: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("data.mirror", "run.root", "run.name", "samples.prompts", "wandb.project", "nothing.key", "init.from"):
        value = f'["{secret}"]' if key == "samples.prompts" else secret
        assert main(["check", str(file), f"{key}={value}"]) == 2
        assert "hunter2" not in "".join(capsys.readouterr())
    file.write_text(yaml.safe_dump(merged(TINY, {"data.cache_dir": secret})))
    assert main(["check", str(file)]) == 2
    assert "hunter2" not in "".join(capsys.readouterr())


def test_conditions_on_urls_are_no_secrets() -> None:
    where = 'url == "https://host/page?id=5" or url == "s3://bucket/a?b"'
    assert parse_config(merged(TINY, {"data.sources": [{"path": "x", "where": where}]}))


def test_files_without_an_end_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "including.yaml").write_text("include: /dev/zero\n")
    (tmp_path / "bomb.yaml").write_text(
        "a: &a [1,2,3,4,5,6,7,8,9]\n"
        + "".join(
            f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        )
    )
    names = [*(str(tmp_path / f"{name}.yaml") for name in ("pipe", "zero", "including", "bomb"))]
    for name in [*names, "/dev/zero", "/proc/self/mem", "/proc/kmsg", "/proc", "/dev/null", "a\0b"]:
        assert main(["check", name]) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert "regular file" in line or "is a folder" in line or "100,000 values" in line or "null" in line


@pytest.mark.parametrize("path", ["/dev/zero", "/proc", "/sys", "/dev", "/proc/*/x.jsonl"])
def test_the_kernel_is_no_data(path: str) -> None:
    (problem,) = check_sources(DataConfig(sources=(SourceConfig(path=path),), lanes=1))
    assert path.partition("*")[0] in problem


def test_the_kernel_is_no_tokenizer_and_no_lock(file: Path) -> None:
    for path in ("/dev/zero", "/proc/self/environ"):
        with pytest.raises(DataError, match=f"tokenizer.path {path}: (no such file|is not a regular file)"):
            load_tokenizer(load_config(file, [f"tokenizer.path={path}"]).tokenizer)


def test_a_prompt_that_cannot_be_encoded_or_continued_is_found_at_the_start(tmp_path: Path) -> None:
    vocabulary = {"said": 1, "whale": 7}  # with a gap
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])  # with the id 8
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "said whale"}\n' * 30)
    prompts = ["said", "unknown", "said " * 31, "said " * 30]
    changes = {
        "tokenizer.path": str(tmp_path / "words.json"),
        "data": {
            "sources": [{"path": str(tmp_path / "text.jsonl"), "max_epochs": None}],
            "lanes": 1,
            "validation_fraction": 0.0,
        },
        "samples": {"every_steps": 5, "prompts": prompts},
        "model.vocab_size": 9,
    }
    config = parse_config(merged(TINY, changes))
    with pytest.raises(ConfigError) as caught:
        check_inputs(config, load_tokenizer(config.tokenizer))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "samples.prompts.1",
        "samples.prompts.2",
    ]
    config = parse_config(merged(TINY, changes | {"model.vocab_size": 7, "samples": {}}))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: expected at least 8"):
        check_inputs(config, load_tokenizer(config.tokenizer))
