"""The layout of report.json, key by key.

Numbers are plain JSON numbers, shares are fractions between 0 and 1, losses are in nats per token. Unknown values are
null.
"""

from typing import Any, Literal, NotRequired, TypedDict

from pretrain.run.reader import State

SCHEMA_VERSION = 1


class Summary(TypedDict):
    """Values of several seeds."""

    # Mean over the seeds.
    mean: float
    # Half-width of the 95 % t interval around the mean; null with one seed.
    half_width: float | None
    # seed -> value.
    values: dict[str, float]


class ClaimResult(TypedDict):
    """A claim and its verdict."""

    claim: str
    # Where the claim comes from; empty if not given.
    source: str
    # What was measured, in words, and at which scale.
    reading: str
    scale: str
    # Such as "above 0.05".
    criterion: str
    # Mean over the seeds and half-width of the 95 % t interval.
    mean: float | None
    half_width: float | None
    # seed -> its value; null if there is none, with the reason in the note.
    numbers: dict[str, float | None]
    # "holds" only if every seed's value and the whole interval lie on the right side of the threshold.
    verdict: Literal["holds", "does not hold", "not tested"]
    note: str


class FinalRow(TypedDict):
    """A series at its last step, over its finished runs; a report on a single run also includes an unfinished one."""

    series: str
    labels: dict[str, str]
    # Number of runs included, and number of jobs in the series.
    runs: int
    jobs: int
    # Smallest and largest last step of the runs included.
    steps: list[int]
    validation_loss: Summary | None
    # Whether other series are compared with this one.
    is_baseline: bool
    # Validation loss minus that of the baseline, paired by seed, and the baseline's name; null for a baseline.
    difference: Summary | None
    baseline: str | None
    starved: Summary | None
    leverage_dead: Summary | None
    activation_dead: Summary | None
    # Median over steps, for each run with usable timings.
    tokens_per_second: Summary | None
    # Seeds whose last validation loss was not finite.
    not_finite: list[str]


class TunedRow(TypedDict):
    """One combination of tuned values that was tried for a series."""

    series: str
    # Dotted key -> value.
    tuned: dict[str, Any]
    # Last validation loss by seed, and the mean over the seeds that were run with every combination.
    losses: dict[str, float | None]
    mean: float | None
    steps: list[int]
    chosen: bool
    # Whether this is the only combination tried.
    alone: bool
    # Keys whose chosen value is the smallest or largest of those tried.
    at_edge: list[str]
    # "done" if all of its runs are done, otherwise the states of the others.
    state: str


class TimingRow(TypedDict):
    """Seconds per step by phase: medians over steps, then over the runs with usable timings."""

    series: str
    runs: int
    # "data", "forward_backward", "optimizer", "other"; null if no run recorded them.
    seconds: dict[str, float] | None
    # Name of each excluded run and why it was excluded.
    left_out: list[str]


class JobRow(TypedDict):
    """One run."""

    # The run's name; null while the job waits for the runs that choose its values.
    run: str | None
    series: str
    seed: str
    state: State
    step: int
    total_steps: int | None
    chosen: bool
    # Why its timings are not usable; empty if they are.
    disturbances: list[str]
    # Number of steps skipped because the gradients were not finite.
    skipped_steps: int


class Provenance(TypedDict):
    """The hardware and software that the runs used; each list without duplicates."""

    machines: list[str]
    commits: list[str]
    versions: list[str]
    # Dates of the first and the last launch, ISO 8601.
    dates: list[str]


class ScoreRow(TypedDict):
    """The score of a run on an evaluation task."""

    run: str
    # Path of the result file in the run folder.
    file: str
    task: str
    # "acc_norm" where the task has it, otherwise "acc".
    metric: str
    score: float
    # Standard error over items; null for a single item.
    stderr: float | None
    num_items: int
    num_items_in_split: int


class SeriesRow(TypedDict):
    """The score of one checkpoint of a run on an evaluation task, by run, series, task and step."""

    run: str
    # Folder of the checkpoints' results in the folder eval/ of the run; "." for eval/ itself.
    series: str
    # Of the checkpoint.
    step: int
    # Target tokens trained on; null if the result does not say.
    tokens: int | None
    task: str
    # As in ScoreRow.
    metric: str
    score: float
    # 95 % interval over items (Wilson's score interval).
    low: float
    high: float
    num_items: int


class DifferenceRow(TypedDict):
    """Two runs on the items of one task; a difference is the run's score minus the baseline's."""

    run: str
    # The first run that has a result of this name.
    baseline: str
    task: str
    metric: str
    num_items: int
    difference: float
    # 95 % interval over items.
    low: float
    high: float
    # Items that only the run gets right, and that only the baseline gets right.
    won: int
    lost: int
    outcome: Literal["different", "equivalent", "undecided"]
    # The outcome in words, such as "muon-1 is better".
    verdict: str


class Evaluations(TypedDict):
    """The evaluation results in the folders of the runs."""

    scores: list[ScoreRow]
    # Every checkpoint that has a result in a folder step-N; scores and differences have the newest ones.
    series: list[SeriesRow]
    differences: list[DifferenceRow]
    # Results that cannot be read or compared, and why.
    notes: list[str]
    # Differences below this one count as none in the tests of equivalence.
    margin: float
    # What the verdicts cover.
    scope: str


class ReportResult(TypedDict):
    """The whole file."""

    schema_version: int
    kind: Literal["run", "sweep"]
    name: str
    title: str
    question: str
    # The sweep file, and its overrides of the base config.
    source: str
    overrides: dict[str, Any]
    jobs: list[JobRow]
    provenance: Provenance
    claims: list[ClaimResult]
    final: list[FinalRow]
    tuned: list[TunedRow]
    timing: list[TimingRow]
    # Absent if no run has a result in its folder eval/.
    evaluations: NotRequired[Evaluations]
