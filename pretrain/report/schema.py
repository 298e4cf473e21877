"""The file of a report's figures (report.json), key by key.

Numbers are plain JSON numbers, shares are fractions between 0 and 1, losses nats per token. What is not known is null.
"""

from typing import Any, Literal, TypedDict

from pretrain.run.reader import State

SCHEMA_VERSION = 1


class Summary(TypedDict):
    """Numbers of several seeds."""

    # Their mean.
    mean: float
    # Of the 95 % t interval around it; null with one seed.
    half_width: float | None
    # seed -> number.
    values: dict[str, float]


class ClaimResult(TypedDict):
    """A claim and what became of it."""

    claim: str
    # Where the claim comes from; empty if not said.
    source: str
    # What was measured, in words, and at which scale.
    reading: str
    scale: str
    # Such as "above 0.05".
    criterion: str
    # Mean of the numbers and half-width of the 95 % t interval.
    mean: float | None
    half_width: float | None
    # seed -> its number; null where it has none, for the reason in the note.
    numbers: dict[str, float | None]
    # "holds" only if every seed's number and the whole interval lie on the right side of the threshold.
    verdict: Literal["holds", "does not hold", "not tested"]
    note: str


class FinalRow(TypedDict):
    """A series at its last step, over its finished runs (a single run: also unfinished)."""

    series: str
    labels: dict[str, str]
    # Jobs that enter, and jobs there are.
    runs: int
    jobs: int
    # Last step of each run that enters, smallest and largest.
    steps: list[int]
    validation_loss: Summary | None
    # Whether it is what others are compared with.
    is_baseline: bool
    # Validation loss less that of the baseline, paired by seed, and the baseline's name; null for a baseline.
    difference: Summary | None
    baseline: str | None
    starved: Summary | None
    leverage_dead: Summary | None
    activation_dead: Summary | None
    # Median over steps, of each undisturbed run.
    tokens_per_second: Summary | None
    # Seeds whose last validation loss was not finite.
    not_finite: list[str]


class TunedRow(TypedDict):
    """One value of the tuned keys that a series was tried with."""

    series: str
    # Dotted key -> value.
    tuned: dict[str, Any]
    # Last validation loss by seed, and the mean over the seeds that every value of the series has.
    losses: dict[str, float | None]
    mean: float | None
    steps: list[int]
    chosen: bool
    # Whether the series was tried with no other value.
    alone: bool
    # Keys whose chosen value is the smallest or largest of those tried.
    at_edge: list[str]
    # "done", or what some of its runs are instead.
    state: str


class TimingRow(TypedDict):
    """Seconds of a step by phase: medians over steps, then over the undisturbed runs."""

    series: str
    runs: int
    # "data", "forward_backward", "optimizer", "other"; null where no run tells.
    seconds: dict[str, float] | None
    # Run and reason of each run that is left out.
    left_out: list[str]


class JobRow(TypedDict):
    """One run."""

    # Its name; null while it waits for the runs that choose its values.
    run: str | None
    series: str
    seed: str
    state: State
    step: int
    total_steps: int | None
    chosen: bool
    # Why its times say little; empty if they can be used.
    disturbances: list[str]
    # Steps that changed nothing because their gradients were not finite.
    skipped_steps: int


class Provenance(TypedDict):
    """What the runs ran on; each list without repetitions."""

    machines: list[str]
    commits: list[str]
    versions: list[str]
    # First and last day of a launch, ISO 8601.
    dates: list[str]


class ReportResult(TypedDict):
    """The whole file."""

    schema_version: int
    kind: Literal["run", "sweep"]
    name: str
    title: str
    question: str
    # The experiment's file, and what was changed in it.
    source: str
    overrides: dict[str, Any]
    jobs: list[JobRow]
    provenance: Provenance
    claims: list[ClaimResult]
    final: list[FinalRow]
    tuned: list[TunedRow]
    timing: list[TimingRow]
