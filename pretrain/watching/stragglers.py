"""Ranks that are slower than the others.

The whole step takes equally long on every rank, since they wait for each other. What tells them apart is the time of
the forward passes, in which (but for ZeRO 3, which gathers weights there) no rank waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.watching.heartbeat import Heartbeat


def stragglers(beats: Mapping[int, Heartbeat], factor: float) -> dict[int, str]:
    """Return the ranks whose forward passes take more than `factor` times the median over the ranks, with a line each.

    With two ranks the median is the faster one: either could be the normal one, and the other one waits.
    """
    seconds = {rank: beat.forward_seconds for rank, beat in beats.items() if beat.forward_seconds}
    if len(seconds) < 2:
        return {}
    usual = sorted(seconds.values())[(len(seconds) - 1) // 2]
    return {
        rank: f"{beats[rank].name} is slow: its forward passes take {found:.3g} s a step, {found / usual:.1f} times as "
        f"long as those of the median rank ({usual:.3g} s)"
        for rank, found in sorted(seconds.items())
        if found > factor * usual
    }
