"""No secret of the environment, of URLs, of files or of the command line is stored with a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import Config, load_config
from pretrain.launch import train
from pretrain.processes.redaction import HIDDEN, holds_secret, is_secret_name, redact, redact_source
from pretrain.run import manifest
from pretrain.run.manifest import diff_of, environment
from tests.run.test_manifest import MODULE, committed, copied

MakeConfig = Callable[..., Config]
CANARY = "c4narybird"

# Each holds the canary where a secret is, and nothing of it may stay.
SECRET_TEXTS = [
    f"https://user:{CANARY}@host/a",
    f"https://user:p@{CANARY}@host/a",
    f"https://{CANARY}@host/a.git",
    f"postgres://u:{CANARY}@host:5432/db",
    f"https://bucket/a?X-Amz-Credential=x&X-Amz-Signature={CANARY}",
    f"https://account.blob/a?sv=1&sig={CANARY}",
    f"s3://bucket/a?token={CANARY}",
    f"https://hooks.slack.com/services/T00/B00/{CANARY}",
    f"https://discord.com/api/webhooks/123/{CANARY}",
    f"https://hooks.slack.com/triggers/{CANARY}/1",
    f"https://corp.webhook.office.com/webhookb2/{CANARY}",
    f"https://api.telegram.org/bot1:{CANARY}/send",
    f"Authorization: Bearer {CANARY}",
    f"hf_{CANARY}",
    f"ghp_{CANARY}{CANARY}",
    f"xoxb-1-{CANARY}",
    f"sk-proj-{CANARY}{CANARY}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
]
NAMED_TEXTS = [
    f"aurora train run.yaml --api-key {CANARY}",
    f"aurora train run.yaml --token={CANARY}",
    f"+    api_key: {CANARY}",
    f'+API_KEY = "{CANARY}"',
    f"+  password: '{CANARY}'",
    f"+export AWS_SECRET_ACCESS_KEY={CANARY}",
    f'+{{"webhook_url": "{CANARY}"}}',
    f'+{{"SecretAccessKey": "{CANARY}"}}',
    f"+export PGPASSWORD={CANARY}",
    f"+clientSecret: {CANARY}",
    f"+AccountName=x;AccountKey={CANARY};",
]
PLAIN_TEXTS = [
    "hf://datasets/org/name@main/data/*.parquet",
    "s3://bucket/part-?.jsonl",
    "gs://bucket/year=202?/month=*/part.jsonl",
    "https://host/path/file.jsonl",
    "--resume auto train.total_tokens=1000000 tokenizer.eos_token=<|endoftext|>",
    "+    token = self.tokenizer.token_to_id(eos)",
    "+def load(token: str, key: int) -> None:",
    "commit 0123456789abcdef0123456789abcdef01234567",
]


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_a_secret_is_removed_and_found(text: str) -> None:
    for found in (redact(text), redact_source(text), redact_source(f"+url: '{text}'\n")):
        assert CANARY not in found
    assert holds_secret(text)


@pytest.mark.parametrize("text", NAMED_TEXTS)
def test_the_value_of_a_telling_name_is_removed(text: str) -> None:
    found = redact_source(text)
    assert CANARY not in found
    assert found == text.replace(CANARY, HIDDEN)


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == redact_source(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize("part", ["a", "7", "f0", "ab_", "x-", "a.", "--a-"])
def test_a_long_line_of_a_diff_takes_no_time(part: str) -> None:
    """As in a notebook or a file of numbers; a search that begins at each letter would take hours."""
    begun = time.monotonic()
    text = "+" + part * (200_000 // len(part))
    assert redact_source(text) == text
    assert time.monotonic() - begun < 5


def test_names_of_secrets() -> None:
    secret = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_PASSWORD", "UCX_KEY", "SLACK_WEBHOOK_URL"]
    assert all(map(is_secret_name, secret))
    assert not any(map(is_secret_name, [*manifest.VARIABLES, "NCCL_SOCKET_IFNAME", "KMP_AFFINITY", "MONKEYS"]))


def test_no_file_of_a_run_holds_a_secret(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Canaries in the environment, URLs, comments of the YAML, .netrc, arguments and git; every file is searched."""
    pytest.importorskip("wandb")
    secret = f"{CANARY}-1-{CANARY}"
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {secret}\n")
    (tmp_path / ".netrc").chmod(0o600)
    variables = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / ".netrc"),
        "HF_ENDPOINT": f"https://user:{secret}@mirror",
        "HTTPS_PROXY": f"http://user:{secret}@proxy:1",
        "NCCL_TOKEN": secret,
        "UCX_URL": f"https://host/a?X-Amz-Signature={secret}",
        "NCCL_NET_PLUGIN": f"https://{secret}@host",
        "OMP_NUM_THREADS": "1",
        **dict.fromkeys(["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "SLACK_WEBHOOK"], secret),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "argv", ["aurora", "train", f"--token={secret}", f"https://hooks.slack.com/services/T/B/{secret}"]
    )
    monkeypatch.setattr(manifest, "git_diff", lambda: redact_source(f'+password = "{secret}"\n+lr = 1\n'))
    changes = {"wandb.mode": "offline", "train.total_tokens": 2 * 192, "train.global_batch_tokens": 192}
    config = tiny_config({**changes, "schedule": {"kind": "constant"}, "data.validation_fraction": 0.0})
    file = tmp_path / "run.yaml"
    file.write_text(f"# password {secret}\n{yaml.safe_dump(config.resolved())}")
    assert train(load_config(file)) == 0
    searched = [path for path in config.run_folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in searched)
    for path in searched:
        for form in (CANARY.encode(), CANARY.encode("utf-16-le")):
            assert form not in path.read_bytes(), path
    assert CANARY not in "".join(capfd.readouterr())
    (launch,) = json.loads((config.run_folder / "manifest.json").read_text())["launches"]
    assert launch["variables"]["HF_ENDPOINT"] == "https://mirror"
    assert launch["variables"]["OMP_NUM_THREADS"] == "1"
    assert launch["command"].startswith("aurora train ")
    assert "+lr = 1" in next(iter(json.loads((config.run_folder / "manifest.json").read_text())["git_diffs"].values()))


def test_the_environment_is_recorded_by_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, Any] = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"}
    for name, value in {**recorded, "ANYTHING_ELSE": "x", "NCCL_SECRET": "y", "SLURM_JOB_COMMENT": "z"}.items():
        monkeypatch.setenv(name, value)
    found = environment()["variables"]
    assert found.items() >= recorded.items()
    assert not found.keys() & {"ANYTHING_ELSE", "NCCL_SECRET", "SLURM_JOB_COMMENT", "PATH", "HOME"}


def test_the_difference_to_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = copied(tmp_path)
    committed(tmp_path)
    assert diff_of(module) == ""
    (tmp_path / MODULE).write_text(f'password = "{CANARY}"\nrate = 5\n')
    (tmp_path / "pyproject.toml").write_text("\n")
    found = diff_of(module) or ""
    assert "+rate = 5" in found
    assert "pyproject.toml" in found
    assert CANARY not in found
    monkeypatch.setattr(manifest, "_MOST_OF_A_DIFF", 100)
    assert (diff_of(module) or "").endswith(" more characters]")
