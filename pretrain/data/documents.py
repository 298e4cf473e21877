"""The documents of a lane, in order, each with its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config.data import DataConfig
from pretrain.data.formats import read_unit
from pretrain.data.order import ReadPlan, make_plan


class Cursor(NamedTuple):
    """A place in the text of a lane."""

    epoch: int
    unit: int
    """Index among the units that the lane reads in this epoch."""
    row: int
    """Row of the unit, from 0; rows of the other split and rows without text count as well."""
    token: int
    """Index among the document's tokens, its separator included."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the chosen split, not empty, and the place of its first token."""

    place: Cursor
    text: str
    text_bytes: int
    """Length in UTF-8."""


def lane_documents(plan: ReadPlan, lane: int, start: Cursor, last_epoch: int, batch_bytes: int) -> Iterator[Document]:
    """Yield the documents of a lane from the row of `start` to the end of `last_epoch`.

    Raises:
        DataError: see `read_unit`.

    """
    for epoch in range(start.epoch, last_epoch + 1):
        for index, unit in enumerate(plan.lane_units(epoch, lane)):
            if (epoch, index) < start[:2]:
                continue
            first_row = start.row if (epoch, index) == start[:2] else 0
            for row, text in read_unit(unit, first_row, batch_bytes):
                encoded = text.encode()
                if encoded and plan.selects(encoded):
                    yield Document(Cursor(epoch, index, row, 0), text, len(encoded))


def validation_text(config: DataConfig) -> str:
    """The text of the validation split, documents in the order in which they are validated on, nothing between them.

    Raises:
        DataError: see `read_unit`.

    """
    plan = make_plan(config, "validation", 1)
    documents = lane_documents(plan, 0, Cursor(0, 0, 0, 0), last_epoch=0, batch_bytes=1 << 20)
    return "".join(document.text for document in documents)
