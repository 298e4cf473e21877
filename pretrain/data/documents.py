"""The documents of a lane, in order, each with its position."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config.data import DataConfig
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.catalog import Catalog, make_catalog, require_text
from pretrain.data.formats import read_places, read_unit
from pretrain.data.order import ReadPlan, make_plan
from pretrain.data.prepared.reading import TokenBytes, holds_tokens, read_runs
from pretrain.data.prepared.runs import TokenRun


class Cursor(NamedTuple):
    """A position in the text of a lane."""

    epoch: int
    unit: int
    """Index among the units that the lane reads in this epoch."""
    row: int
    """Row of the unit, counted from 0, including rows of the other split and rows without text."""
    token: int
    """Index among the document's tokens, including its separator."""
    byte: int = 0
    """Where in an uncompressed file of lines the row can be looked for: behind the previous row of the unit. 0: not
    known. Only saves reading what comes before it."""


@dataclass(frozen=True, slots=True)
class Document:
    """A non-empty text of the chosen split and the position of its first token."""

    position: Cursor
    end: Cursor
    """The beginning of the next row."""
    text: str
    text_bytes: int
    """Length in UTF-8."""
    skipped: tuple[BadRow, ...] = ()
    """Bad rows between the previous document of the lane and this one, in the first epoch."""


class Tokenized(NamedTuple):
    """Consecutive documents of prepared data, the position of the first token and of what follows the last."""

    position: Cursor
    end: Cursor
    run: TokenRun


def lane_documents(
    plan: ReadPlan,
    lane: int,
    start: Cursor,
    last_epoch: int,
    batch_bytes: int,
    skipped: list[BadRow],
    token_bytes: TokenBytes,
) -> Iterator[Document | Tokenized]:
    """Yield the documents of a lane from the row of `start` to the end of `last_epoch`.

    Args:
        plan: what the lane reads.
        lane: the lane.
        start: where to begin.
        last_epoch: where to end.
        batch_bytes: see `read_unit`.
        skipped: bad rows that no document has told of yet; holds those after the last document at the end.
        token_bytes: see `read_runs`.

    Raises:
        DataError: see `read_unit` and `read_runs`; or an epoch has more bad rows than `plan` allows.

    """
    for epoch in range(start.epoch, last_epoch + 1):
        budget = BadRowBudget(plan.max_bad_rows)
        for index, unit in enumerate(plan.lane_units(epoch, lane)):
            if (epoch, index) < start[:2]:
                continue
            first_row, first_byte = (start.row, start.byte) if (epoch, index) == start[:2] else (0, 0)
            if holds_tokens(unit.file.path):
                for run in read_runs(unit, first_row, plan.validation_fraction, plan.split, token_bytes):
                    begin = Cursor(epoch, index, run.first_row, 0)
                    yield Tokenized(begin, begin._replace(row=run.first_row + len(run.ends)), run)
                continue
            for row, text, begin_byte, end_byte in read_places(unit, first_row, first_byte, batch_bytes):
                if isinstance(text, BadRow):
                    budget.spend(text)
                    if epoch == 0:  # they come again in every epoch
                        skipped.append(text)
                    continue
                encoded = text.encode()
                if encoded and plan.selects(encoded):
                    begin = Cursor(epoch, index, row, 0, begin_byte)
                    end = Cursor(epoch, index, row + 1, 0, end_byte)
                    yield Document(begin, end, text, len(encoded), tuple(skipped))
                    skipped.clear()


def validation_text(config: DataConfig, catalog: Catalog | None = None) -> str:
    """Return the text of the validation split: its documents in the order of validation, with nothing between them.

    Raises:
        DataError: see `lane_documents`; or a source holds tokens instead of text.

    """
    catalog = catalog or make_catalog(config)
    require_text(catalog)
    plan = make_plan(config, "validation", 1, catalog)
    budget, chosen = BadRowBudget(plan.max_bad_rows), []
    for unit in plan.lane_units(0, 0):
        for _, text in read_unit(unit, 0, batch_bytes=1 << 20):
            if isinstance(text, BadRow):
                budget.spend(text)
            elif plan.selects(text.encode()):
                chosen.append(text)
    return "".join(chosen)
