"""Heartbeats for tests."""

from __future__ import annotations

from typing import Any

from pretrain.watching.heartbeat import Heartbeat


def beat(rank: int = 0, **changes: Any) -> Heartbeat:
    """A heartbeat of a rank on a machine that does not exist, in the backward pass of step 7, with changes."""
    known: dict[str, Any] = {
        "launch": "one",
        "rank": rank,
        "world_size": 3,
        "host": f"node{rank}",
        "boot": "elsewhere",
        "pid": 1000 + rank,
        "started": 1,
        "time": 0.0,
        "every_seconds": 1.0,
        "beats": 9,
        "phase": "backward",
        "step": 7,
        "marks": 70,
        "stalled": 20.0,
        "limit": 10.0,
        "stopped_limit": 10.0,
        "where": "pretrain/engine/plain.py:1 in backward",
        "waiting": True,
        "forward_seconds": None,
    }
    return Heartbeat(**known | changes)
