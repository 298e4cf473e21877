"""The layout of report.json, key by key.

Numbers are plain JSON numbers, shares are fractions between 0 and 1, losses are in nats per token. Unknown values are
null.
"""

from typing import Any, Literal, NotRequired, TypedDict

from pretrain.report.judgement import Outcome
from pretrain.run.reader import State

SCHEMA_VERSION = 2
"""2: claims have the verdict "undecided", and are judged by pretrain/report/judgement.py."""


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
    # By the rules of pretrain/report/judgement.py; "not tested" if no seed has a value.
    verdict: Outcome
    # Why it is undecided, contradicted or not tested; seeds without a value, and why.
    note: str
    # Why the values decide nothing, whichever side they lie on: points that are true by construction, tuned values at
    # the edge of those tried.
    reservations: list[str]


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
    # Number of steps that did not change the weights, and how many of them for which reason.
    skipped_steps: int
    skipped_because: dict[str, int]
    # Number of steps whose loss was a spike, skipped or not.
    loss_spikes: int


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
    # The task's main metric: "acc_norm" where the task has it, otherwise "acc".
    metric: str
    score: float
    # Standard error over items; null for a single item.
    stderr: float | None
    num_items: int
    num_items_in_split: int
    # Number of solved examples in the prompt.
    num_fewshot: int
    # The suite that was asked for; null if the tasks were named one by one.
    suite: str | None
    # The group that the task is one of, such as "mmlu" for its subjects; null without one. A group has a row as well.
    group: str | None
    # How the items differ from those of published scores; empty if they do not, or if that is unknown.
    note: str
    # The task's other figures, by name: metrics such as "perplexity" and, after a colon, scores on some of the items,
    # such as "acc_norm: without overlap".
    other: dict[str, float]


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
    # 95 % interval, by the methods of `aurora compare`: over the sources of the items where these are known.
    low: float
    high: float
    num_items: int


class BitsRow(TypedDict):
    """Bits per byte of a run on a held-out text."""

    run: str
    # Path of the result file in the run folder.
    file: str
    # Step of the checkpoint; null if the file is not that of a checkpoint of a series.
    step: int | None
    # Name of the text.
    text: str
    bits_per_byte: float
    # Standard error over documents; null if it is not known.
    stderr: float | None
    # 95 % interval over documents; null for a text of few documents, and for results that are not of a series.
    low: float | None
    high: float | None
    bytes: int
    documents: int


class DifferenceRow(TypedDict):
    """Two runs on one task or held-out text; a difference is the run's figure minus the baseline's."""

    run: str
    # The first run that has a result of this name.
    baseline: str
    # The task, with a part of its items after a colon ("hellaswag: without overlap"), or the name of the text.
    task: str
    # "bits per byte" for a text, of which fewer are better.
    metric: str
    # Of a text, its documents.
    num_items: int
    difference: float
    # 95 % interval over items; null for a text of few documents.
    low: float | None
    high: float | None
    # Items that only the run gets right, and that only the baseline gets right; documents of which it needs fewer bits,
    # and more.
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
    # Of every result, also of the older checkpoints.
    bits_per_byte: list[BitsRow]
    differences: list[DifferenceRow]
    # Results that cannot be read or compared, and why.
    notes: list[str]
    # Differences below this one count as none in the tests of equivalence.
    margin: float
    # What the verdicts cover.
    scope: str


class SampleRow(TypedDict):
    """Text that the model wrote during training."""

    step: int
    prompt: str
    text: str


class ReportResult(TypedDict):
    """The whole file."""

    schema_version: int
    kind: Literal["run", "runs", "sweep"]
    name: str
    title: str
    question: str
    # The sweep file, and its overrides of the base config.
    source: str
    overrides: dict[str, Any]
    jobs: list[JobRow]
    provenance: Provenance
    claims: list[ClaimResult]
    # Config keys that differ between the seeds of every series, and what the intervals over seeds therefore cover, in
    # words. Empty if no series has two runs.
    varied_keys: list[str]
    intervals_cover: str
    final: list[FinalRow]
    tuned: list[TunedRow]
    timing: list[TimingRow]
    # What a single run wrote, oldest first; absent for a sweep and for a run that wrote nothing.
    samples: NotRequired[list[SampleRow]]
    # Absent if no run has a result in its folder eval/.
    evaluations: NotRequired[Evaluations]
