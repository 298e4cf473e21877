"""``aurora data inspect``: what the sources of a config hold."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from pretrain.cli.arguments import add_config
from pretrain.cli.data.sources import open_sources

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs
    from pretrain.data.budget import SourceBudget
    from pretrain.data.quantity import SourceEstimate

_EXAMPLE_CHARACTERS = 200


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "inspect",
        help="show what the sources of a config hold",
        description="Show what each source holds: files, documents, bytes, tokens with their standard error, "
        "characters per token, licences, the shares of repeated and of empty documents in a sample, how often the run "
        "would read it, and a few documents. Reads a bounded sample, spread over all files; small sources are read in "
        "full.",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="choose another sample (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the sources hold."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.data import DataError, load_tokenizer, tokenizer_problems
    from pretrain.data.budget import source_budgets
    from pretrain.data.estimate import TO_INSPECT, estimate_sources
    from pretrain.data.hub_tokenizer import fetch

    config, catalog = open_sources(options)
    located = fetch(config.tokenizer)
    tokenizer = load_tokenizer(located)
    if problems := tokenizer_problems(catalog, tokenizer, located):
        raise DataError("\n".join(problems))
    estimates = estimate_sources(config.data, catalog, tokenizer, TO_INSPECT, options.seed)
    budgets = source_budgets(config, [estimate.tokens for estimate in estimates])
    if options.json:
        sources = [_as_json(*pair) for pair in zip(estimates, budgets, strict=True)]
        print(json.dumps({"total_tokens": config.train.total_tokens, "sources": sources}, indent=1))
    else:
        print("\n\n".join("\n".join(_as_text(*pair)) for pair in zip(estimates, budgets, strict=True)))
    return 0


def _as_text(estimate: SourceEstimate, budget: SourceBudget) -> list[str]:
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.data.quantity import rounded

    licences = ", ".join(estimate.licences) or "not known"
    allowed = f"{budget.max_epochs:g} allowed" if math.isfinite(budget.max_epochs) else "no limit"
    rows = [
        ("path", estimate.path),
        ("files", f"{estimate.files:,}, {estimate.bytes:,} bytes"),
        ("licences", licences),
        ("documents", str(estimate.documents)),
        ("text", f"{estimate.text_bytes} bytes in UTF-8"),
        ("tokens", f"{estimate.tokens}"),
        ("per token", f"{estimate.characters_per_token:.2f} characters, {estimate.bytes_per_token:.2f} bytes"),
        (
            "sample",
            f"{estimate.sampled_documents:,} documents, of which {estimate.repeated:.1%} repeat another one of the "
            f"sample; {estimate.empty:.1%} of its rows are empty",
        ),
        (
            "this run",
            f"{budget.share:.3g} of its tokens, about {rounded(budget.epochs)} epochs of the training split "
            f"({allowed})",
        ),
        *(("", how) for how in estimate.how),
        *(("unreadable", problem) for problem in estimate.problems),
        *(("document", _shown(text)) for text in estimate.examples),
    ]
    return [budget.name, *(f"  {label:<11} {value}" for label, value in rows)]


def _shown(text: str) -> str:
    """The beginning of a document on one line, with control characters escaped."""
    cut = text[:_EXAMPLE_CHARACTERS]
    plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut)
    return plain + (" ..." if len(text) > len(cut) else "")


def _as_json(estimate: SourceEstimate, budget: SourceBudget) -> dict[str, Any]:
    def quantity(name: str) -> dict[str, float | bool]:
        found = getattr(estimate, name)
        return {"value": found.value, "standard_error": found.error, "exact": not found.error}

    return {
        "name": budget.name,
        "path": estimate.path,
        "files": estimate.files,
        "bytes": estimate.bytes,
        "licences": list(estimate.licences),
        **{name: quantity(name) for name in ("documents", "text_bytes", "tokens")},
        "characters_per_token": estimate.characters_per_token,
        "bytes_per_token": estimate.bytes_per_token,
        "sample": {
            "how": list(estimate.how),
            "documents": estimate.sampled_documents,
            "empty": estimate.empty,
            "repeated": estimate.repeated,
            "problems": list(estimate.problems),
        },
        "run": {
            "share": budget.share,
            "tokens": budget.tokens,
            "epochs": budget.epochs,
            "least_epochs": budget.least_epochs,
            "most_epochs": budget.most_epochs if budget.available.lower else None,
            "max_epochs": budget.max_epochs if math.isfinite(budget.max_epochs) else None,
        },
        "examples": [text[:_EXAMPLE_CHARACTERS] for text in estimate.examples],
    }
