"""``aurora check``: validate a config or a sweep, and show what it would train."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config
from pretrain.cli.sweep import read_sweep

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "check",
        help="validate a config and show what it would train",
        description="Validate a config and every file it names. Prints the resolved config, how each parameter is "
        "trained, and the size and cost of the run. For a sweep: validates every config and lists the jobs. "
        "Uses no network and trains nothing.",
    )
    add_config(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check a config, or the configs of a sweep."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.data import load_tokenizer
    from pretrain.data.budget import describe_data
    from pretrain.launch import check_inputs
    from pretrain.model.build import build_model
    from pretrain.planning.summary import describe, format_routing
    from pretrain.sweep import is_sweep_file

    if is_sweep_file(Path(options.config)):
        return _check_sweep(Path(options.config), options.overrides)
    config = load_config(options.config, options.overrides)
    inputs = check_inputs(config, load_tokenizer(config.tokenizer))
    model = build_model(config.model, config.run.seed, device="meta")
    print(config.to_yaml())
    print("\n".join([*format_routing(config, model), "", *describe(config, model, world_size=1)]))
    print("\n".join([*describe_data(inputs.budgets), *(f"warning: {line}" for line in inputs.warnings)]))
    return 0


def _check_sweep(path: Path, overrides: Sequence[str]) -> int:
    """Check the config of every job; inputs that several share are read once."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import ConfigError
    from pretrain.data import load_tokenizer
    from pretrain.launch import check_inputs
    from pretrain.sweep import format_status, plan_jobs

    if overrides:
        raise ConfigError([f"{overrides[0]}: a sweep takes no overrides on the command line; put them into the file"])
    sweep = read_sweep(path)
    checked = set()
    warnings: dict[str, None] = {}
    for config in (job.config for job in plan_jobs(sweep) if job.config):
        sections = (config.data, config.tokenizer, config.train)
        inputs = (*(section.model_dump_json() for section in sections), config.model.vocab_size)
        if inputs not in checked:
            warnings.update(dict.fromkeys(check_inputs(config, load_tokenizer(config.tokenizer)).warnings))
            checked.add(inputs)
    print("\n".join([*format_status(sweep), *(f"warning: {line}" for line in warnings)]))
    return 0
