"""The model card of an export: README.md, with front matter that the Hub reads."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor
from transformers import LlamaConfig

from pretrain.text_tables import markdown_row

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class CardScore:
    """The score of the exported checkpoint on one evaluation task."""

    task: str
    metric: str
    value: float
    """A fraction for accuracies."""
    interval: tuple[float, float] | None
    """95 % interval over items; None if not known."""
    shots: int
    """Number of solved examples in the prompt."""
    split: str
    """Of the data set."""
    items: str
    """How many, and of what, for people: "500 of 10,042 (validation, from the Hub)"."""


@dataclass(frozen=True)
class ModelCard:
    """The facts about a run that go into the README and aurora.json of its export."""

    run_name: str
    step: int
    """Optimizer steps taken."""
    tokens: int
    """Target tokens trained on."""
    train_loss: float | None
    """Last training loss, nats per token; None if unknown."""
    validation_loss: float | None
    """Last validation loss, nats per token; None if never measured."""
    bits_per_byte: float | None
    """Validation loss in bits per byte of text; None if never measured."""
    data_sources: Sequence[Mapping[str, Any]]
    """One mapping per source, with at least `name` and `licence`; any other keys become table columns."""
    config_yaml: str
    """The resolved config of the run."""
    git_commit: str | None
    """Commit of the training code; None outside a repository."""
    optimizer: str
    """Name of the optimizer that trained the matrices."""
    datasets: Sequence[str] = ()
    """The data sets of the Hub that it was trained on, as ``organisation/name``."""
    start: str | None = None
    """What the weights were at first, as in "the weights of run a at step 5"; None: random ones."""
    licence: str | None = None
    """Of the weights, as the Hub writes it, such as ``apache-2.0``; None: not chosen."""
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    """What to show of the config, by name."""
    scores: Sequence[CardScore] = ()
    """Of the exported checkpoint."""
    checkpoint_sha256: str | None = None
    """Digest of the index of the exported checkpoint."""


def parameter_counts(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of parameters in total, and without the embedding and the head."""
    total = sum(tensor.numel() for tensor in weights.values())
    return total, total - sum(weights[name].numel() for name in (EMBEDDING, HEAD) if name in weights)


def readme(card: ModelCard, config: LlamaConfig, weights: Mapping[str, Tensor], eos_token: str) -> str:
    """Return README.md: front matter for the Hub, and what people want to know.

    Args:
        card: the facts about the run.
        config: the architecture.
        weights: as exported.
        eos_token: the token between documents.
    """
    columns = list(dict.fromkeys(["name", "licence", *(key for row in card.data_sources for key in row)]))
    fence = _fence(card.config_yaml)
    licence = card.licence or "not stated; those of the training data are below"
    parts = [
        f"---\n{_front_matter(card)}---\n",
        f"# {_escaped(card.run_name)}\n",
        f"A Llama-architecture base language model pretrained {_escaped(_origin(card))} with aurora-pretrain."
        " It completes text; it has not been taught to follow instructions.\n",
        *_table(["", "value"], [("licence", licence), *_facts(card, config, weights).items()]),
        "\n## How to load it\n",
        _loading(eos_token),
    ]
    if card.scores:
        parts += [
            "\n## Evaluation\n",
            *_table(["task", "shots", "metric", "score", "95 % interval", "items"], map(_score_row, card.scores)),
            "\nThe intervals cover the choice of items, not training seeds.",
        ]
    if card.hyperparameters:
        parts += ["\n## Hyperparameters\n", *_table(["", "value"], card.hyperparameters.items())]
    parts += [
        "\n## Training data\n",
        *_table(columns, ([_shown(row.get(column, "")) for column in columns] for row in card.data_sources)),
        f"\n## Config of the run\n\n{fence}yaml\n{card.config_yaml.rstrip()}\n{fence}\n",
    ]
    return "\n".join(parts)


def _front_matter(card: ModelCard) -> str:
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model_name": card.run_name,
        **({"license": card.licence} if card.licence else {}),
        "tags": ["aurora-pretrain", "llama", card.optimizer],
        **({"datasets": list(card.datasets)} if card.datasets else {}),
        **({"model-index": [_model_index(card)]} if card.scores else {}),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _model_index(card: ModelCard) -> dict[str, Any]:
    """The scores as the Hub reads them."""
    return {
        "name": card.run_name,
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": score.task, "type": score.task, "split": score.split},
                "metrics": [
                    {"type": score.metric, "value": score.value, "name": f"{score.metric}, {score.shots}-shot"}
                ],
            }
            for score in card.scores
        ],
    }


def _facts(card: ModelCard, config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, object]:
    total, body = parameter_counts(weights)
    losses = {
        "training loss (nats per token)": card.train_loss,
        "validation loss (nats per token)": card.validation_loss,
        "validation bits per byte": card.bits_per_byte,
    }
    return {
        "parameters": f"{total:,} ({body:,} without embeddings)",
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "MLP width": config.intermediate_size,
        "heads (key-value heads)": f"{config.num_attention_heads} ({config.num_key_value_heads})",
        "context length (tokens)": config.max_position_embeddings,
        "optimizer": card.optimizer,
        "steps": f"{card.step:,}",
        "tokens": f"{card.tokens:,}",
        **{name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None},
        "trainer commit": card.git_commit or "not known",
    }


def _loading(eos_token: str) -> str:
    """How to use the folder."""
    prompt = f"{eos_token}Once upon a time"
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
"""
    fence = _fence(code)
    return (
        f"{fence}python\n{code}{fence}\n\nIn training, {_escaped(eos_token)} stood before every document, so it belongs"
        " before a prompt that begins a text; the tokenizer does not add it."
    )


def _score_row(score: CardScore) -> list[object]:
    interval = "not known" if score.interval is None else "{:.4f} to {:.4f}".format(*score.interval)
    return [score.task, score.shots, score.metric, f"{score.value:.4f}", interval, score.items]


def _origin(card: ModelCard) -> str:
    return "from scratch" if card.start is None else f"from {card.start}"


def _fence(code: str) -> str:
    """Backticks that enclose a block of code, whatever backticks are in it."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [markdown_row(map(_escaped, line)) for line in lines]


def _shown(value: object) -> str:
    """A cell of the table of sources: whole numbers with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(value: object) -> str:
    """Return one line of Markdown that renders as `value` literally, even inside a table cell."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
