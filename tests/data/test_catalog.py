"""The catalog describes the data once: what it holds, how often files are opened, and what it is good for later."""

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import DataError, check_sources, fingerprint, make_catalog, survey
from pretrain.data.units import TextRecipe
from pretrain.processes.exit_codes import STOPPED
from tests.conftest import REPOSITORY
from tests.data.corpus import Setting, drain, make_setting, make_texts, rows, write_jsonl, write_parquet

pytestmark = pytest.mark.usefixtures("warm")

TEXTS = make_texts(51, 40)


class Opens:
    """Counts how often files below a folder are opened by this process, while switched on."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._see)  # stays for the life of the process

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder and event == "open" and Path(str(arguments[0])).is_relative_to(self.folder):
            self.counts[Path(str(arguments[0])).name] += 1

    def during(self, folder: Path, work: Callable[[], object]) -> dict[str, int]:
        self.folder, self.counts = folder, Counter()
        try:
            work()
        finally:
            self.folder = None
        return dict(self.counts)


OPENS = Opens()


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """Three files in two sources: five row groups, each read in two parts, and two files of JSON lines."""
    (tmp_path / "corpus").mkdir()
    first = write_parquet(tmp_path / "corpus" / "a.parquet", TEXTS, 8)
    second = write_jsonl(tmp_path / "corpus" / "b.jsonl.gz", TEXTS)
    write_jsonl(tmp_path / "corpus" / "c.jsonl", TEXTS)
    return make_setting(tokenizer, first, second.parent, lanes=3, epochs=1, validation_fraction=0.2, split_units=2)


def test_the_catalog_opens_each_file_once_and_so_does_the_survey(setting: Setting, tmp_path: Path) -> None:
    once = {"a.parquet": 2, "b.jsonl.gz": 1, "c.jsonl": 1}  # the first file belongs to both sources
    assert OPENS.during(tmp_path, lambda: make_catalog(setting.config)) == once
    assert OPENS.during(tmp_path, lambda: survey(setting.config)) == once
    assert OPENS.during(tmp_path, lambda: fingerprint(setting.config)) == once


def test_with_a_catalog_a_file_is_opened_only_to_read_its_units(setting: Setting, tmp_path: Path) -> None:
    catalog = make_catalog(setting.config)
    assert OPENS.during(tmp_path, lambda: fingerprint(setting.config, catalog)) == {}
    assert OPENS.during(tmp_path, lambda: setting.open(catalog=catalog)) == {}
    units = {"a.parquet": 2 * 5 * 2, "b.jsonl.gz": 2, "c.jsonl": 2}
    assert OPENS.during(tmp_path, lambda: drain(setting.open(catalog=catalog), 4)) == units


def test_the_survey_and_the_catalog_agree(setting: Setting) -> None:
    assert survey(setting.config) == (make_catalog(setting.config), [])


def test_the_catalog_crosses_processes_and_gives_the_same_stream(setting: Setting) -> None:
    catalog = make_catalog(setting.config)
    copy = pickle.loads(pickle.dumps(catalog))
    assert copy == catalog
    expected = rows(drain(setting.open(), 4))
    assert rows(drain(setting.open(catalog=copy), 4)) == expected
    workers = setting.open(workers=1, catalog=copy)
    assert rows(drain(workers, 4)) == expected
    workers.close()


def test_a_catalog_of_other_sources_is_an_error_of_the_program(setting: Setting, tmp_path: Path) -> None:
    other = DataConfig(sources=[SourceConfig(path=str(tmp_path / "corpus" / "a.parquet"))], lanes=1)
    with pytest.raises(ValueError, match="other sources") as error:
        setting.open(catalog=make_catalog(other))
    assert not isinstance(error.value, DataError)


@pytest.mark.parametrize("name", ["a.parquet", "b.jsonl", "b.jsonl.gz", "b.jsonl.zst"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changed_since_it_was_listed_is_noticed_when_it_is_opened(
    tmp_path: Path, tokenizer: TokenizerConfig, name: str, workers: int
) -> None:
    """Otherwise a run would continue with different text, and its checkpoints would name the old one."""

    def write(texts: list[str]) -> Path:
        path = tmp_path / name
        return write_parquet(path, texts, 8) if path.suffix == ".parquet" else write_jsonl(path, texts)

    setting = make_setting(tokenizer, write(TEXTS), lanes=1, epochs=1)
    catalog = make_catalog(setting.config)
    before = (tmp_path / name).stat().st_size
    write([*TEXTS, "one more document"])
    after = (tmp_path / name).stat().st_size
    stream = setting.open(workers=workers, catalog=catalog)
    with pytest.raises(DataError, match=rf"{name}: has {after} bytes, but had {before} when the run was started"):
        stream.next_batch(1)
    stream.close()
    setting.open().next_batch(1)  # a catalog of its own is of the new file


def test_a_file_that_vanished_is_named(setting: Setting, tmp_path: Path) -> None:
    catalog = make_catalog(setting.config)
    (tmp_path / "corpus" / "c.jsonl").unlink()
    with pytest.raises(DataError, match=r"c\.jsonl: cannot be read"):
        drain(setting.open(catalog=catalog), 4)


def test_every_file_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("?")
    (tmp_path / "b.parquet").write_text("?")
    config = DataConfig(sources=[SourceConfig(path=path) for path in (str(tmp_path), str(tmp_path / "gone"))], lanes=1)
    with pytest.raises(DataError) as error:
        make_catalog(config)
    assert str(error.value).splitlines() == check_sources(config)
    assert [name in line for name, line in zip(("a.par", "b.par", "gone"), check_sources(config), strict=True)]


# In every Python process of a launch, this writes down each file of the corpus that is opened, and by which program.
COUNT_OPENS = """
import os, sys
def see(event, arguments):
    if event == "open" and str(arguments[0]).startswith({corpus!r}):
        who = "worker" if sys.argv[0] == "-c" else os.environ.get("RANK", "?")
        log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{{who}} {{os.path.basename(arguments[0])}}\\n".encode())
        os.close(log)
sys.addaudithook(see)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[[dict[str, Any]], Counter[str]]:
    """Starts a run of two ranks with a worker each and returns who opened what how often."""

    def start(config: dict[str, Any]) -> Counter[str]:
        log = tmp_path / "opens"
        (tmp_path / "sitecustomize.py").write_text(COUNT_OPENS.format(corpus=str(tmp_path / "corpus"), log=str(log)))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            [sys.executable, "-m", "pretrain", "train", "run.yaml", "--processes", "2", "--stop-at", "1"],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == STOPPED, done.stderr
        return Counter(log.read_text().splitlines())

    return start


@pytest.mark.long
def test_a_launch_opens_each_file_a_few_times_and_each_unit_once(
    tmp_path: Path, tokenizer: TokenizerConfig, launch: Callable[[dict[str, Any]], Counter[str]]
) -> None:
    """Check, fingerprint and each stream on each rank once listed and opened all files again: 57 opens of 3 files."""
    # A worker reads ahead, but not to the end of an epoch of so much text.
    texts = make_texts(61, 1600, longest=200)
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus" / "a.parquet", texts, 800)
    write_jsonl(tmp_path / "corpus" / "b.jsonl", texts[:800])
    write_jsonl(tmp_path / "corpus" / "c.jsonl", texts[800:])
    model = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1}
    opened = launch(
        {
            "run": {"name": "counted"},
            "model": {**model, "num_kv_heads": 1, "context_length": 8},
            "tokenizer": {"path": tokenizer.path},
            "data": {"sources": [{"path": str(tmp_path / "corpus")}], "lanes": 4, "workers": 1},
            "optimizer": {"name": "adamw", "adamw": {"lr": 1e-3}},
            "train": {"total_tokens": 320, "global_batch_tokens": 32, "micro_batch_sequences": 2},
            "validation": {"every_steps": 1},
        }
    )
    # Rank 0 makes the catalog, counting the text while it reads it, and reads the validation split, which has a single
    # lane; workers read for training.
    units = {"a.parquet": 2, "b.jsonl": 1, "c.jsonl": 1}
    expected = {f"0 {name}": 1 + count for name, count in units.items()}
    assert opened == expected | {f"worker {name}": count for name, count in units.items()}


def test_units_are_counted_without_making_them_and_share_one_recipe(setting: Setting, tmp_path: Path) -> None:
    sources = [
        SourceConfig(path=str(write_parquet(tmp_path / "x.parquet", TEXTS, 7)), split_units=3),
        SourceConfig(path=str(write_jsonl(tmp_path / "y.jsonl", TEXTS)), split_units=2),
        *setting.config.sources,
    ]
    config = DataConfig(sources=sources, lanes=1)
    catalog = make_catalog(config)
    units = catalog.units(config)
    assert catalog.count_units(config) == [len(of_source) for of_source in units]
    assert catalog.count_units(config)[:2] == [18, 2]
    for of_source in units:  # pickled once with all units of a lock with 100,000 files
        assert len({id(unit.recipe) for unit in of_source}) == 1
        assert of_source[0].recipe == TextRecipe()
