"""Which rank hangs, judged from the heartbeats of all ranks.

The ranks of a run wait for each other in every step, so one that hangs soon stops all of them. A run hangs when no rank
has made progress for the time that the phase of the rank at fault allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pretrain.watching.heartbeat import Heartbeat, is_here, process_state

SHOWN = 16
"""Ranks of which a verdict tells the place; more would hide the first line."""


def suspects(beats: Mapping[int, Heartbeat], silent: Collection[int]) -> list[Heartbeat]:
    """Return the ranks for which the others wait.

    Args:
        beats: the last heartbeat of each rank.
        silent: ranks whose heartbeat is not written any more, so that their process is stopped or gone.

    Returns:
        The silent ranks if there are any; else the ranks that have entered the fewest phases; among equals those that
        do not wait for other ranks. All of them where nothing sets one apart.
    """
    found = [beat for rank, beat in sorted(beats.items()) if rank in silent]
    if found:
        return found
    fewest = min(beat.marks for beat in beats.values())
    found = [beat for _, beat in sorted(beats.items()) if beat.marks == fewest]
    return [beat for beat in found if not beat.waiting] or found


def verdict(own: Heartbeat, beats: Mapping[int, Heartbeat], silent: Collection[int]) -> str | None:
    """Return what hangs, for people; None if the run makes progress or may still take its time.

    Args:
        own: this rank's heartbeat as it is now.
        beats: the last heartbeat of each rank.
        silent: see `suspects`.
    """
    others = [beat for rank, beat in beats.items() if rank not in silent and rank != own.rank]
    for other in others:
        if other.verdict:
            return other.verdict  # all ranks give the same reason
    beats = {**beats, own.rank: own}
    found = suspects(beats, silent)
    limit = max(_stopped_limit(beat, own) if beat.rank in silent else beat.limit for beat in found)
    # A heartbeat that was read is up to one interval old, and was up to one interval behind when it was written.
    if own.stalled < limit or any(beat.stalled < limit - 3 * beat.every_seconds for beat in others):
        return None
    return "\n".join([_headline(found, silent, beats, limit), *_places(beats, silent)])


def _stopped_limit(beat: Heartbeat, own: Heartbeat) -> float:
    """Return how long a silent rank may take: it may have come farther than it says, like this one."""
    if beat.step < own.step:
        return own.stopped_limit  # its last heartbeat is from before this step, which it has begun as well
    return max(beat.stopped_limit, own.stopped_limit)  # one from before a save says nothing of the save


def _headline(found: list[Heartbeat], silent: Collection[int], beats: Mapping[int, Heartbeat], limit: float) -> str:
    first = found[0]
    where = f"phase {first.phase} of step {first.step}" if first.step else f"phase {first.phase}"
    progress = f"no progress for {limit:g} seconds"
    if len(found) == len(beats) > 1:
        return f"all ranks hang in {where}: {progress}"
    names = ", ".join(beat.name for beat in found[:SHOWN])
    names += f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    verb = "hang" if len(found) > 1 else "hangs"
    if first.rank in silent:  # the heartbeat may be some steps old
        return f"{names} {verb}, last seen in {where}; {_process(first)}: {progress}"
    return f"{names} {verb} in {where}: {progress}"


def _process(beat: Heartbeat) -> str:
    """Return what is known of the process of a rank whose heartbeat has stopped."""
    if not beat.boot or not is_here(beat):
        return "its process shows no sign of life"
    state = process_state(beat.pid)
    states = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "D": "waits for a device"}
    return f"its process {states.get(state, 'shows no sign of life')}"


def _places(beats: Mapping[int, Heartbeat], silent: Collection[int]) -> list[str]:
    lines = []
    for rank, beat in sorted(beats.items())[:SHOWN]:
        place = "no sign of life" if rank in silent else beat.where or "?"
        waiting = ", waits for other ranks" if beat.waiting and rank not in silent else ""
        lines.append(f"  rank {rank} on {beat.host}: step {beat.step}, {beat.phase}, {place}{waiting}")
    if len(beats) > SHOWN:
        lines.append(f"  and {len(beats) - SHOWN} other ranks")
    return lines
