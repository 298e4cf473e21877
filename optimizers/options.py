"""The options of a parameter group: defaults, presets, checks, and which of them have an effect.

A group is a dict with `params`, `kind` ("matrix", "adamw" or "mixed") and the keys of `DEFAULTS[kind]`. Each option is
declared once, in the dataclass of its direction (`optimizers.directions`) or of AdamW (`optimizers.adamw`); this module
only puts them together.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .adamw import AdamWOptions
from .directions import DIRECTIONS
from .fields import Declared, Option, OptionError, described, did_you_mean, option, options_of

Kind = Literal["matrix", "adamw"]
"""What steps a parameter."""
GroupKind = Literal["matrix", "adamw", "mixed"]
"""What steps the parameters of a group; "mixed": the matrix optimizer those with at least two rows and columns, AdamW
the others."""
DirectionName = Literal["aurora", "riemannian_aurora", "muon", "normuon", "u_normuon"]
OptimizerName = Literal["aurora", "riemannian_aurora", "muon", "normuon", "u_normuon", "adamw"]
PresetName = Literal["released"]

MATRIX: dict[str, Option] = {name: known for cls in DIRECTIONS.values() for name, known in options_of(cls).items()}
"""The options of matrix groups by name: those of all directions. A group has them all, whatever its direction."""

ADAMW: dict[str, Option] = options_of(AdamWOptions)
"""The options of adamw groups by name."""


@dataclass(frozen=True)
class SharedOptions(Declared):
    """The options of groups in which matrices and other parameters share one learning rate."""

    adamw_lr_ratio: float = option(
        0.15,
        "Learning rate of AdamW as a share of that of the matrices, where one `lr` is given for both. 1 with lr_scale "
        '"rms" and a learning rate of AdamW.',
        acts="step",
    )


SHARED: dict[str, Option] = options_of(SharedOptions)
"""The options of groups of both kinds."""

_BY_KIND: dict[str, dict[str, Option]] = {"matrix": MATRIX, "adamw": ADAMW, "mixed": {**ADAMW, **MATRIX, **SHARED}}

DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {**({} if kind == "adamw" else {"direction": "aurora"}), **{key: known.default for key, known in own.items()}}
    for kind, own in _BY_KIND.items()
}
"""Option keys of each kind with the values of a group that does not set them."""

PRESETS: dict[str, dict[str, Any]] = {
    "released": {
        "direction": "aurora",
        "scope": "all",
        "row_balance": "polar",
        "balance_rule": "tyler",
        "beta": 0.5,
        "iterations": 2,
        "polar": "quintic_exact",
        "eps_mode": "absolute",
        "momentum": 0.95,
        "nesterov": True,
        "lr_scale": "aspect",
        "weight_decay": 0.025,
    }
}
"""Named sets of matrix options. "released" repeats the arithmetic of tilde-research/aurora-release. A preset does not
set a learning rate, and an option that is given alongside one wins."""

ONE_ITERATION = (
    "iterations = 1 only normalises the rows before the polar call: the rows of the direction can come out "
    "less even than Muon's; 2 is the default"
)
"""The warning of a config and of the optimizer."""

# Keys of a group that are not options: what it consists of, and what torch, its schedulers, and wrappers such as SAM
# put there; `is_foreign` knows others. `maximize` is in a group only if it is set.
FOREIGN_KEYS = frozenset(
    {
        "params",
        "param_names",
        "row_blocks",
        "views",
        "role",
        "maximize",
        "differentiable",
        "rho",
        "adaptive",
        "kind",
        "base_lr",
        "initial_lr",
        "max_lr",
        "min_lr",
        "swa_lr",
        "base_momentum",
        "max_momentum",
    }
)


def group_kind(group: Mapping[str, Any], otherwise: GroupKind = "matrix") -> GroupKind:
    """The kind of a group, `otherwise` if it has none.

    Raises:
        OptionError: an unknown one.
    """
    kind = group.get("kind", otherwise)
    if kind not in DEFAULTS:
        raise OptionError(f"kind is {kind!r}: expected one of {', '.join(DEFAULTS)}{did_you_mean(kind, DEFAULTS)}")
    return kind


_OTHER_NAMES = frozenset({"learning_rate", "wd", "mu", "beta1"})
"""What other libraries call an option of ours."""


def is_foreign(key: str) -> bool:
    """Whether a key of a group is neither an option nor meant to be one: what other code put there for itself, such as
    the `name` of Lightning."""
    known = {name for options in DEFAULTS.values() for name in options}
    near = key in known | _OTHER_NAMES or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return key in FOREIGN_KEYS or not near


def complete(
    kind: GroupKind,
    given: Mapping[str, Any],
    *,
    inherited: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """All options of a group: its own, then those it inherits, then the preset, then the defaults.

    Raises:
        OptionError: naming every unknown key, every value out of range and every option of its own that has no effect
            in the combination. (An inherited one may have its effect in another group.)
    """
    named = expand_preset(preset, {**(inherited or {}), **given})
    options = {**DEFAULTS[kind], **named}
    problems = [_unknown(kind, key) for key in named if key not in DEFAULTS[kind]]
    problems += invalid(kind, options)
    if not problems and kind != "adamw":
        problems += [f"{key} has no effect: {why}" for key, why in ineffective(options).items() if key in given]
    if problems:
        raise OptionError(f"bad options of a parameter group of kind {kind!r}: " + "; ".join(problems))
    return options


def expand_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` on top of a preset, without those of the preset's options that have no effect alongside the given ones.

    Raises:
        OptionError: an unknown preset, or one for another direction than the one given.
    """
    if preset is None:
        return dict(given)
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise OptionError(f"preset is {preset!r}: expected one of {', '.join(PRESETS)}{hint}", "preset")
    fixed = PRESETS[preset]
    direction = given.get("direction", fixed["direction"])
    if direction != fixed["direction"]:
        raise OptionError(f"preset {preset!r} is for direction {fixed['direction']!r}, not {direction!r}", "preset")
    merged = {**fixed, **given}
    without = ineffective({**DEFAULTS["matrix"], **merged})
    return {key: value for key, value in merged.items() if key in given or key not in without}


def ineffective(options: Mapping[str, Any]) -> dict[str, str]:
    """The matrix options that change nothing in a complete set, each with the reason."""
    direction = options["direction"]
    own = options_of(DIRECTIONS[direction]) if direction in DIRECTIONS else MATRIX
    found = {}
    for name, known in MATRIX.items():
        why = f"the direction {direction!r} does not use it" if name not in own else None
        if why is None and known.idle is not None:
            why = known.idle(options)
        if why is not None:
            found[name] = why
    return found


def invalid(kind: GroupKind, options: Mapping[str, Any]) -> list[str]:
    """One message for every option of the kind whose value cannot be used."""
    problems = []
    direction = options.get("direction")
    if kind != "adamw" and direction not in DIRECTIONS:
        hint = did_you_mean(direction, DIRECTIONS)
        problems.append(f"direction is {direction!r}: expected one of {', '.join(DIRECTIONS)}{hint}")
    found = (known.problem(options[name]) for name, known in _BY_KIND[kind].items())
    return problems + [problem for problem in found if problem]


def documentation() -> str:
    """All options with their defaults and meanings, as text: the few that matter to everybody come first."""
    headings = {
        "main": "Options of a matrix group that most runs set",
        "tuning": "More options of a matrix group",
        "parity": "Options of a matrix group for comparisons with other code, and for tests",
    }
    lines = []
    for group, heading in headings.items():
        lines.append(f"{heading}:")
        if group == "main":
            lines.append(f"    direction = {DEFAULTS['matrix']['direction']!r}, one of {', '.join(DIRECTIONS)}")
        lines += described({name: known for name, known in MATRIX.items() if known.group == group}, "    ")
    lines += ["Options of an adamw group:", *described(ADAMW, "    ")]
    return "\n".join([*lines, "Of groups with both:", *described(SHARED, "    ")])


def _unknown(kind: GroupKind, key: str) -> str:
    other = next((name for name in DEFAULTS if name != kind and key in DEFAULTS[name]), None)
    if other is not None:
        return f"{key!r} is an option of kind {other!r}"
    return f"unknown option {key!r}{did_you_mean(key, DEFAULTS[kind])}"
