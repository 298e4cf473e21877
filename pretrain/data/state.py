"""The saved position of a stream."""

from copy import deepcopy
from typing import Any, NotRequired, TypedDict, cast

from pretrain.data.documents import Cursor
from pretrain.data.errors import DataError
from pretrain.data.mixture import MixtureState
from pretrain.data.order import ReadPlan, Ring

STATE_VERSION = 2


class LaneState(TypedDict):
    """The first token of a lane that has not been a target yet."""

    epoch: int
    """May be earlier than the epoch of its source: a lane's tail waits until later epochs complete its sequence."""
    unit: int
    """Index among the units of the lane in that epoch."""
    row: int
    """Row of the unit, counted from 0; may be one past the last."""
    token: int
    """Index of the token in the document of that row. With best-fit packing, the position is the beginning of a window
    of documents, and this the number of its sequences that have been batched."""
    byte: NotRequired[int]
    """Where to look for the row in an uncompressed file of lines; see `Cursor`. Absent if it is not known."""


class SourceCounts(TypedDict):
    """What the sequences contained of one source."""

    tokens: int
    """Targets."""
    documents: int
    """Documents whose last token was a target, counted in each epoch."""
    text_bytes: int


class SourceState(TypedDict):
    """Position in one source."""

    epoch: int
    """Epochs that have been completed. A source with a limit has ended when it reaches it."""
    next_lane: int
    """The lane whose turn is next, counted from 0 in each source; 0 if all have left."""
    left: list[int]
    """Lanes that have left the ring in this epoch, ascending."""
    lanes: list[LaneState]
    sequences: int
    """Sequences that the source has given."""
    tokens: int
    """Targets in those sequences."""
    documents: int
    """Documents whose last token was a target, counted in each epoch."""
    text_bytes: int
    """UTF-8 bytes of the text in those sequences."""
    bad_rows: int
    """Rows that were skipped before those documents, in the first epoch."""
    cut_documents: NotRequired[int]
    """Documents that best-fit packing had to cut, counted in each epoch; absent if there are none."""
    of_sources: NotRequired[list[SourceCounts]]
    """Without a mixture, where several sources count as one: those of each, in the order of the config. Absent if
    there is a single one, or if they were not counted from the beginning of the run."""


class StreamState(TypedDict):
    """Position of a stream. JSON-serialisable; the same on every rank, for any number of ranks and workers."""

    version: int
    """Version of this format: 2. Version 1 had one ring of lanes for all sources together."""
    mixture: MixtureState
    sources: list[SourceState]
    """In the order of the config; without a mixture, all sources count as one."""
    sequences_emitted: int
    text_bytes: int
    """UTF-8 bytes of the text in those sequences."""


def initial_state(plan: ReadPlan) -> StreamState:
    """Return the position before the first sequence."""
    begin = LaneState(epoch=0, unit=0, row=0, token=0)
    sources = [
        SourceState(
            epoch=0,
            next_lane=0,
            left=[],
            lanes=[begin] * len(ring.lanes),
            sequences=0,
            tokens=0,
            documents=0,
            text_bytes=0,
            bad_rows=0,
        )
        for ring in plan.rings
    ]
    nothing = SourceCounts(tokens=0, documents=0, text_bytes=0)
    for source, ring in zip(sources, plan.rings, strict=True):
        if len(ring.units) > 1:
            source["of_sources"] = [nothing] * len(ring.units)
    mixture = MixtureState(stage=0, taken=[0] * len(sources))
    return StreamState(version=STATE_VERSION, mixture=mixture, sources=sources, sequences_emitted=0, text_bytes=0)


def read_state(saved: StreamState, plan: ReadPlan, sequence_length: int) -> StreamState:
    """Return a saved state in the present version.

    Raises:
        DataError: it has an unknown version, or belongs to another stream.

    """
    state: Any = saved
    if state["version"] == 1:
        state = _from_version_1(state, plan, sequence_length)
    if state["version"] != STATE_VERSION:
        raise DataError(f"the data state has version {state['version']}, this program reads {STATE_VERSION} and 1")
    if len(state["sources"]) != len(plan.rings):
        raise DataError(
            f"the data state was saved with {len(state['sources'])} sources and data.sources has {len(plan.rings)}: "
            "the sources decide the order of the text and cannot change within a run"
        )
    for ring, source in zip(plan.rings, state["sources"], strict=True):
        _check_lanes(ring, len(source["lanes"]), several=len(plan.rings) > 1)
    return cast(StreamState, state)


def _from_version_1(old: dict[str, Any], plan: ReadPlan, sequence_length: int) -> StreamState:
    if len(plan.rings) > 1:
        raise DataError(
            "the data state was saved by a version that knew no mixtures, which change the order of the text: remove "
            "data.mixture and data.stages to continue that run, or start a new one"
        )
    source = SourceState(
        epoch=old["epoch"],
        next_lane=old["next_lane"],
        left=old["left"],
        lanes=old["lanes"],
        sequences=old["sequences_emitted"],
        tokens=old["sequences_emitted"] * sequence_length,
        documents=0,  # were not counted
        text_bytes=old["text_bytes"],
        bad_rows=0,
    )
    return StreamState(
        version=STATE_VERSION,
        mixture=MixtureState(stage=0, taken=[old["sequences_emitted"]]),
        sources=[source],
        sequences_emitted=old["sequences_emitted"],
        text_bytes=old["text_bytes"],
    )


def _check_lanes(ring: Ring, saved: int, *, several: bool) -> None:
    if saved == len(ring.lanes):
        return
    key = f"{ring.name} now has {len(ring.lanes)} (data.lanes)" if several else f"data.lanes is {len(ring.lanes)}"
    raise DataError(
        f"the data state was saved with {saved} lanes and {key}: the number of lanes decides the order of the text and "
        "cannot change within a run"
    )


def lane_state(cursor: Cursor) -> LaneState:
    """Return the form in which the position of a lane is saved."""
    state = LaneState(epoch=cursor.epoch, unit=cursor.unit, row=cursor.row, token=cursor.token)
    if cursor.byte:
        state["byte"] = cursor.byte
    return state


def without_bytes(state: StreamState) -> StreamState:
    """Return a saved state that does not say where in their files the rows are, for files that have changed since."""
    copy: Any = deepcopy(state)
    for source in copy.get("sources", ()):
        for lane in source["lanes"]:
            lane.pop("byte", None)
    return cast(StreamState, copy)


def cursors_of(state: StreamState) -> list[Cursor]:
    """Return the position of every lane, in the numbering of the plan."""
    return [Cursor(**lane) for source in state["sources"] for lane in source["lanes"]]
