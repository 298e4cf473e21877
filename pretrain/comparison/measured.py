"""What was measured, as the page needs it: plain data, filled in by the command, which alone knows the evaluation."""

from typing import NotRequired, TypedDict


class MeasuredTask(TypedDict):
    """The score of a model on a task."""

    metric: str
    # Mean outcome, and its 95 % interval over items (over their sources, where these are known).
    score: float
    low: float
    high: float
    num_items: int
    num_items_in_split: int
    split: str
    # Solved examples in the prompt.
    shots: int
    # How the items differ from those of published scores. Absent if they do not, or if that is unknown.
    note: NotRequired[str]


class MeasuredModel(TypedDict):
    """A model of the config that was run."""

    # By task name.
    tasks: dict[str, MeasuredTask]
    # Of the weights that were loaded; tied ones count once.
    parameters: int
    # Absent in results of earlier versions.
    parameters_without_embeddings: NotRequired[int]
    # Tokens that the run has seen, if the weights carry its record.
    tokens: NotRequired[int]
    # Where the weights come from, with the revision if there is one.
    origin: str
    dtype: str
    # What stands before each text: "none" or the token. Absent in results of earlier versions.
    bos: NotRequired[str]
    # Name of a held-out text -> bits per byte. Absent if none was measured.
    bits_per_byte: NotRequired[dict[str, float]]
    context_length: int
    # "packaged" or "hub".
    items: str
    # Day of the evaluation.
    date: str


class PairedRows(TypedDict):
    """The paired differences of one model to the baseline, as text."""

    title: str
    heads: list[str]
    rows: list[list[str]]


class Measured(TypedDict):
    """Everything that was measured."""

    # Label -> where the model is, for every model of the config, in its order.
    models: dict[str, str]
    # Label -> results. A model that was not run is absent.
    results: dict[str, MeasuredModel]
    pairs: list[PairedRows]
    # How to read the pairs.
    explanations: list[str]
    # For each claim of the facts: task -> verdict on subject against reference. Empty unless both were run; with an
    # empty task if they cannot be compared.
    verdicts: list[dict[str, str]]
    # What a reader should know: results that cannot be compared, models that differ from the config's.
    notes: list[str]
