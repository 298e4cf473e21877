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
    from pretrain.config import Config
    from pretrain.run.identity import Identity
    from pretrain.run.inputs import Inputs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "check",
        help="validate a config and show what it would train",
        description="Validate a config and every file it names. Prints the resolved config, how each parameter is "
        "trained, and the size and cost of the run. For a sweep: validates every config and lists the jobs. "
        "Trains nothing, and uses no network without --online.",
    )
    add_config(parser)
    parser.add_argument(
        "--online", action="store_true", help="list remote sources that have no lock yet, as a start would"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check a config, or the configs of a sweep."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.data.budget import describe_data
    from pretrain.model.build import build_model
    from pretrain.planning.summary import describe, format_routing
    from pretrain.sweep import is_sweep_file

    if is_sweep_file(Path(options.config)):
        return _check_sweep(Path(options.config), options.overrides, options.online)
    config = load_config(options.config, options.overrides)
    check_webhook(config)
    inputs = check_config_inputs(config, options.online)
    model = build_model(config.model, config.run.seed, device="meta")
    notes = [*inputs.warnings, *check_ancestor(config, inputs)]
    print(config.to_yaml())
    print("\n".join([*format_routing(config, model), "", *describe(config, model, world_size=1)]))
    lines = [*describe_data(inputs.budgets), *remote_lines(inputs), *(f"warning: {line}" for line in notes)]
    print("\n".join(lines), end="\n" * bool(lines))
    return 0


def check_ancestor(config: Config, inputs: Inputs) -> list[str]:
    """Check what the run takes over from another one; return the warnings."""
    from pretrain.launch.ancestor import preview_ancestor

    return [] if config.init.source is None else preview_ancestor(config, _identity(config, inputs))


def check_earlier_launches(config: Config, inputs: Inputs, *, extend: bool) -> list[str]:
    """Check whether a launch would continue what the run folder holds already; return the warnings.

    Raises:
        UserError: it would not.
    """
    from pretrain.launch.ancestor import ancestry_of
    from pretrain.run.folder import RunFolder
    from pretrain.run.resume import check_launched

    folder = RunFolder(config.run_folder)
    if folder.manifest() is None and not extend:
        return []
    ancestor, _ = ancestry_of(config, folder)
    identity = _identity(config, inputs, ancestor["sha256"] if ancestor else None)
    return check_launched(folder, identity, extend=extend) if identity else []


def _identity(config: Config, inputs: Inputs, ancestor_sha256: str | None = None) -> Identity | None:
    """The identity of the run; None if not all that it reads is known on this machine."""
    from pretrain.run.identity import Identity

    known = bool(inputs.tokenizer_sha256) and all(source.files for source in inputs.catalog.sources)
    return Identity.of(config, inputs.data, inputs.tokenizer_sha256, ancestor_sha256) if known else None


def check_webhook(config: Config) -> None:
    """Make sure that the file of `watch.webhook` holds a URL.

    Environment variables, and files that do not exist on this machine, may exist where the run is started.

    Raises:
        UserError: it does not.
    """
    from pretrain.watching.alerts import read_webhook

    setting = config.watch.webhook
    if setting is not None and setting.startswith("file:") and Path(setting.removeprefix("file:")).exists():
        read_webhook(setting)


def check_config_inputs(config: Config, online: bool) -> Inputs:
    """Check what a run would read; remote sources without a lock are looked at only if asked for."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.data import DataError, load_tokenizer
    from pretrain.data.hub_tokenizer import fetch, local_file, parse
    from pretrain.run.data_lock import lock_of_check
    from pretrain.run.folder import RunFolder
    from pretrain.run.inputs import check_inputs

    named = config.tokenizer
    if parse(named.path) and not online:
        try:
            tokenizer = load_tokenizer(named.model_copy(update={"path": str(local_file(named.path, config.data))}))
        except DataError:
            tokenizer = None  # not on this machine
    else:
        tokenizer = load_tokenizer(fetch(named, config.data))
    locked = lock_of_check(config.data, RunFolder(config.run_folder), online)
    return check_inputs(config, tokenizer, locked, online=online)


def remote_lines(inputs: Inputs) -> list[str]:
    """What is known of each remote source, and what was not checked."""
    lines = []
    if not inputs.tokenizer_sha256:
        lines.append("not checked: the tokenizer, which is not on this machine; --online fetches it")
    for source in inputs.catalog.sources:
        if source.files and source.pinned is not None:
            lines.append(
                f"{source.pinned}: {len(source.files):,} files, {source.bytes:,} bytes; their text was not read"
            )
        elif source.pinned is not None:
            lines.append(
                f"not checked: {source.path} has no lock; `aurora data resolve` writes one, --online lists it now"
            )
    return lines


def _check_sweep(path: Path, overrides: Sequence[str], online: bool) -> int:
    """Check the config of every job; inputs that several share are read once."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import ConfigError
    from pretrain.report.seeds import seed_warnings
    from pretrain.sweep import format_status, plan_jobs

    if overrides:
        raise ConfigError([f"{overrides[0]}: a sweep takes no overrides on the command line; put them into the file"])
    sweep = read_sweep(path)
    by_inputs: dict[tuple[object, ...], Inputs] = {}
    warnings = dict.fromkeys(seed_warnings(sweep.file.axes, sweep.file.seed_axis) if sweep.file.claims else [])
    for config in (job.config for job in plan_jobs(sweep) if job.config):
        # The order of the data, which differs between seeds, changes nothing of what is read here.
        data = config.data.model_dump_json(exclude={"seed"})
        sections = (config.tokenizer, config.train)
        inputs = (data, *(section.model_dump_json() for section in sections), config.model.vocab_size)
        check_webhook(config)
        if inputs not in by_inputs:
            by_inputs[inputs] = check_config_inputs(config, online)
            warnings.update(dict.fromkeys(by_inputs[inputs].warnings))
        warnings.update(dict.fromkeys(check_ancestor(config, by_inputs[inputs])))
    print("\n".join([*format_status(sweep), *(f"warning: {line}" for line in warnings)]))
    return 0
