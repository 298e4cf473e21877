"""The code blocks of our Markdown pages, and how the tests run them.

Blocks of bash and Python run one after the other in one empty folder per page; blocks of YAML must be valid parts of a
config. A comment on the line before a block changes this; a reader of the rendered page does not see it:

    <!-- test: skip REASON -->          not run; the files it names must exist, and the options of `aurora` must parse
    <!-- test: lines FILE -->           not run; its lines are lines of this file, which other tests run
    <!-- test: long -->                 run only by ./scripts/test --all
    <!-- test: overrides KEY=VALUE -->  added to `train configs/quickstart.yaml`
    <!-- test: file NAME -->            written to this file, for the blocks after it

A block of nothing but commands of `aurora` is run without a shell, by processes that have their imports: it is the
wheel's test that shows the program `aurora` to start. `train configs/quickstart.yaml` trains the model of `SMALL` for
as many steps as the page says.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import REPOSITORY

SMALL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.context_length=64",
    "train.global_batch_tokens=512",
    "train.micro_batch_sequences=4",
    "train.total_tokens=30720",
    "schedule.warmup_tokens=5120",
    "validation.max_tokens=1024",
    "samples.max_new_tokens=2",
)
LANGUAGES = ("bash", "python", "yaml")
DIRECTIVES = ("skip", "lines", "long", "overrides", "file")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, for messages.
        directives: by name, with what follows the name.
    """

    page: Path
    line: int
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether a test runs it, at least the long one."""
        return not {"skip", "lines"} & self.directives.keys()

    def commands(self) -> list[str]:
        """Logical lines of a bash block, without comments."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        return [line for line in (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in lines) if line]

    def small_commands(self) -> list[str]:
        """The commands, with the model of `SMALL`."""
        added = shlex.join([*SMALL, *self.directives.get("overrides", "").split()])
        return [re.sub(r"\btrain configs/quickstart\.yaml", f"\\g<0> {added}", command) for command in self.commands()]

    def verbs(self) -> list[list[str]] | None:
        """The words behind `aurora` of each command, if the block has nothing else in it."""
        commands = self.small_commands()
        if any(not command.startswith("aurora ") or re.search(r"[$`|&;<>*?(){}~\\]", command) for command in commands):
            return None
        return [shlex.split(command)[1:] for command in commands]

    def script(self) -> str:
        """The block as a bash script that stops at the first command that fails."""
        # 75: stopped as asked, with a checkpoint saved
        lines = [f"{line} || [ $? = 75 ]" if "--stop-at" in line else line for line in self.small_commands()]
        return "\n".join(["set -eu", *lines]) + "\n"


def pages() -> list[Path]:
    """Every page that people write by hand."""
    found = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "optimizers/README.md"]
    return sorted([*found, REPOSITORY / "assets/README.md"])


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of bash, Python and YAML on a page, in order.

    Raises:
        ValueError: a directive is unknown, lacks its reason or name, or stands before something else than a block.
    """
    found: list[Block] = []
    directives: dict[str, str] = {}
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    position = 0
    while position < len(lines):
        line = lines[position].strip()
        position += 1
        if match := re.fullmatch(r"<!-- test: (\w+)(?: (.+))? -->", line):
            name, value = match[1], match[2] or ""
            if name not in DIRECTIVES or (not value and name != "long"):
                raise ValueError(f"{page}:{position}: expected one of {', '.join(DIRECTIVES)} with its text")
            directives[name] = value
        elif line.startswith("```"):
            start = position
            while not lines[position].strip().startswith("```"):
                position += 1
            if line[3:] in LANGUAGES:
                code = "\n".join(lines[start:position]) + "\n"
                found.append(Block(page, start + 1, line[3:], code, directives))
            position, directives = position + 1, {}
        elif line and directives:
            raise ValueError(f"{page}:{position}: a test comment stands before something other than a block")
    return found
