"""``aurora config``: document every key of a config."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "config",
        help="document every key of a config",
        description="Print every key of a config with its type, default, class and meaning, as Markdown.",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a config, for editors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the page or the schema."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config.reference import config_reference, config_schema

    print(json.dumps(config_schema(), indent=1) if options.schema else config_reference(), end="")
    return 0
