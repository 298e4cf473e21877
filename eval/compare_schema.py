"""The JSON of `aurora compare`, key by key. Scores and differences are fractions between 0 and 1."""

from typing import Literal, NotRequired, TypedDict

SCHEMA_VERSION = 1
SCOPE = "Verdicts cover the choice of items, not training seeds: the same recipe with another seed may differ by more."

Outcome = Literal["different", "equivalent", "undecided"]
Metric = Literal["acc", "acc_norm"]


class ComparedModel(TypedDict):
    """One of the compared results."""

    # Unique among the models; the tables name the model so.
    label: str
    # As in the result file.
    name: str
    # The result file, as given.
    file: str
    parameters: int
    dtype: str


class TaskComparison(TypedDict):
    """One model against the first one, on one task. A difference is the model's score minus the first one's."""

    # Or a group of tasks, over the items of all of them.
    task: str
    # Names of the tasks of a group. Absent for a task.
    tasks: NotRequired[list[str]]
    metric: Metric
    # Label of the model, and of the first one.
    model: str
    baseline: str
    # Mean outcome of each.
    score: float
    baseline_score: float
    difference: float
    # 95 % interval of the difference, not corrected for the number of comparisons. Paired bootstrap over sources, or
    # exact where few items are discordant.
    interval: tuple[float, float]
    interval_method: Literal["bootstrap", "exact"]
    # Items compared, items of the whole split, and groups of items that were made from one source (num_items if the
    # items have no sources).
    num_items: int
    num_items_in_split: int
    num_sources: int
    # Items that only the model gets right, and that only the first one gets right.
    won: int
    lost: int
    # McNemar's exact test and its mid-P version, on items. They ignore sources.
    mcnemar_p: float
    mcnemar_mid_p: float
    # P value of "no difference" that the verdict rests on: McNemar's exact test or, with sources of several items, its
    # version that flips sources as a whole. Then corrected for the number of comparisons.
    difference_p: float
    difference_p_corrected: float
    # P value of "a difference of `margin` or more" (two one-sided tests), then corrected.
    equivalence_p: float
    equivalence_p_corrected: float
    # Smallest true difference that a set like this finds with a probability of 80 %, uncorrected.
    smallest_difference: float
    # different: the corrected difference_p is at most 0.05. equivalent: it is not, and the corrected equivalence_p is.
    # undecided: neither.
    outcome: Outcome
    # Label of the better model. Present if the outcome is "different".
    better: NotRequired[str]
    # Whether the difference is shown to be less than the margin; it may be so for a "different" pair, too.
    within_margin: bool


class PartComparison(TaskComparison):
    """The same on some items of a task; P values are corrected for the number of these comparisons alone."""

    # "without overlap" (items that share text with the training data of neither model, as far as it was looked for), or
    # the name of a subset.
    part: str


class BitsComparison(TypedDict):
    """One model against the first one, by bits per byte on a held-out text, paired by document. Fewer are better."""

    # Name of the text.
    text: str
    model: str
    baseline: str
    # Bits per byte of each. A difference is the model's minus the first one's.
    score: float
    baseline_score: float
    difference: float
    # 95 % interval by bootstrap over documents. Null for fewer than 10 documents.
    interval: tuple[float, float] | None
    num_documents: int
    # Documents for which the model needs fewer bits than the first one, and more.
    won: int
    lost: int
    # P value of "no difference" (t test of the ratio of sums; 1 for a single document), then corrected for the number
    # of these comparisons.
    difference_p: float
    difference_p_corrected: float
    # different: the corrected difference_p is at most 0.05.
    outcome: Literal["different", "undecided"]
    # Label of the better model. Present if the outcome is "different".
    better: NotRequired[str]


class ChoiceView(TypedDict):
    """One choice of a flipped item."""

    text: str
    correct: bool
    # Log-likelihood with each model; null in results of earlier versions.
    baseline_log_likelihood: float | None
    log_likelihood: float | None


class Flip(TypedDict):
    """An item that exactly one of two models gets right."""

    task: str
    model: str
    # Whether the model gets it right; the first one does otherwise.
    won: bool
    doc_id: int
    prompt: str
    choices: list[ChoiceView]


class Comparison(TypedDict):
    """The whole file."""

    schema_version: int
    # The first one is the baseline.
    models: list[ComparedModel]
    # A difference below it is held to be none, as far as equivalence is concerned.
    margin: float
    # By model, then by task.
    comparisons: list[TaskComparison]
    # The same on each task of the groups; P values are corrected for the number of these comparisons alone. Absent if
    # no group is compared.
    members: NotRequired[list[TaskComparison]]
    # The same on parts of the items. Absent if no result has marked items or subsets.
    parts: NotRequired[list[PartComparison]]
    # By model, then by text. Absent if the results share no text.
    bits_per_byte: NotRequired[list[BitsComparison]]
    # What a reader should know: tasks left out, cut texts, different dtypes, tokens before a text, sources of the
    # items or versions of lm-eval.
    notes: list[str]
    # What the verdicts cover.
    scope: str
    # Present with --examples.
    flips: NotRequired[list[Flip]]
