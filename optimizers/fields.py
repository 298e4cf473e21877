"""How an option is declared: one dataclass field holds its default, meaning, range, unit and rule of no effect.

    @dataclass(frozen=True)
    class MuonOptions(MatrixOptions):
        scope: Scope = option("tall", "Which shapes are balanced.", group="main")

Everything that has to know the options reads these fields: the checks of groups, the signatures of the direction
functions, the docstring of `Aurora`, and the optimizer section of a config.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

R = TypeVar("R")

Group = Literal["main", "tuning", "parity"]
"""Who needs an option: everybody; somebody who tunes a run; only comparisons with other code, and tests."""

Acts = Literal["direction", "after", "step"]
"""Where an option acts: in the direction, on the direction that was found, or in the rest of the step."""

Rule = Callable[[Mapping[str, Any]], str | None]
"""Takes a complete set of options; returns why this one changes nothing with the others, or None if it does."""


class OptionError(ValueError):
    """Options, or a routing of parameters, that cannot be used.

    Attributes:
        option: the key at fault, such as "overrides" or "adamw.head_lr"; "" if there is not exactly one.
    """

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(message)
        self.option = option


def option(
    default: Any,
    doc: str,
    *,
    group: Group = "tuning",
    acts: Acts = "direction",
    low: float = 0.0,
    high: float = math.inf,
    above: bool = False,
    closed: bool = False,
    unit: str = "",
    idle: Rule | None = None,
    preset_only: bool = False,
    numerics: bool = False,
) -> Any:
    """Declare an option as the default of a dataclass field; the field's annotation is its type.

    Args:
        default: the value of a group that does not set it.
        doc: what it does, in whole sentences. It becomes the description in the config and in `Aurora`'s docstring.
        group: who needs it.
        acts: where it acts.
        low: the smallest number allowed.
        high: numbers have to be below it.
        above: numbers have to be above `low`.
        closed: `high` itself is allowed.
        unit: of a number, where it has one.
        idle: the rule that says when it has no effect.
        preset_only: the config sets it by a preset, not by a key of its own.
        numerics: it changes the arithmetic only, not what is computed, so it may change when a run is resumed.
    """
    declared = {
        "doc": doc,
        "group": group,
        "acts": acts,
        "low": low,
        "high": high,
        "above": above,
        "closed": closed,
        "unit": unit,
        "idle": idle,
        "preset_only": preset_only,
        "numerics": numerics,
    }
    return field(default=default, metadata=declared)


@dataclass(frozen=True)
class Option:
    """A declared option: its name, type and default with the arguments of `option`."""

    name: str
    type: Any
    default: Any
    doc: str
    group: Group
    acts: Acts
    low: float
    high: float
    above: bool
    closed: bool
    unit: str
    idle: Rule | None
    preset_only: bool
    numerics: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that it may be set to; () unless it is one of several names."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def members(self) -> tuple[Any, ...]:
        """The types that its value may have."""
        return get_args(self.type) if get_origin(self.type) in (Union, types.UnionType) else (self.type,)

    @property
    def is_number(self) -> bool:
        """Whether it has a range."""
        return bool({float, int} & set(self.members))

    @property
    def expected(self) -> str:
        """What a value has to be, as the end of "expected ..."."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.type is bool:
            return "true or false"
        if get_origin(self.type) is tuple:
            return f"two numbers of at least {self.low:g} and below {self.high:g}"
        what = "a whole number" if int in self.members else "a number"
        low = f"{'above' if self.above else 'of at least'} {self.low:g}"
        high = "" if math.isinf(self.high) else f" and {'at most' if self.closed else 'below'} {self.high:g}"
        return f"{what} {low}{high}{' or null' if type(None) in self.members else ''}"

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None. The value of a tensor is not read: that would wait for its device."""
        if self._holds(value):
            return None
        return f"{self.name} is {value!r}: expected {self.expected}{did_you_mean(value, self.choices)}"

    def keyword(self, name: str) -> inspect.Parameter:
        """As a keyword of a function."""
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=self.type)

    def _holds(self, value: object) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.type is bool:
            return isinstance(value, bool)
        if get_origin(self.type) is tuple:
            return isinstance(value, list | tuple) and len(value) == 2 and all(map(self._in_range, value))
        if isinstance(value, Tensor):
            return Tensor in self.members and value.numel() == 1 and value.is_floating_point()
        if value is None:
            return type(None) in self.members
        return self._in_range(value) and (int not in self.members or isinstance(value, int))

    def _in_range(self, value: object) -> bool:
        if not _is_number(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value <= self.high if self.closed else value < self.high)


def options_of(cls: type) -> dict[str, Option]:
    """The declared options of a dataclass by name, in their order."""
    return _options_of(cls)


@functools.cache
def _options_of(cls: Any) -> dict[str, Option]:
    hints = get_type_hints(cls)
    return {f.name: Option(f.name, hints[f.name], f.default, **f.metadata) for f in dataclasses.fields(cls)}


class Declared:
    """Base of the dataclasses of options: checks their values when it is made.

    Raises:
        OptionError: a value out of range.
    """

    def __post_init__(self) -> None:
        problems = [declared.problem(getattr(self, name)) for name, declared in options_of(type(self)).items()]
        if found := [problem for problem in problems if problem]:
            raise OptionError("; ".join(found))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From a mapping, such as a parameter group. Other keys are ignored; missing ones have their defaults."""
        return cls(**{name: options[name] for name in options_of(cls) if name in options})


def takes_options(
    cls: type["Declared"], *, names: Mapping[str, str] = MappingProxyType({}), without: Collection[str] = ()
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate `f(tensors..., options)` so that it is called as `f(tensors..., iterations=2, ...)`.

    The keywords, their defaults and their checks are those options of `cls` that act in the direction. The docstring
    lists them.

    Args:
        cls: the dataclass of options that `f` takes.
        names: keywords that differ from the name of their option.
        without: options that the function does not take.
    """
    keywords = {
        names.get(name, name): known
        for name, known in options_of(cls).items()
        if known.acts == "direction" and name not in without
    }

    def decorated(function: Callable[..., R]) -> Callable[..., R]:
        declared = inspect.signature(function)
        tensors = list(declared.parameters.values())[:-1]
        signature = declared.replace(parameters=[*tensors, *(known.keyword(name) for name, known in keywords.items())])

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> R:
            bound = signature.bind(*args, **given)
            options = {keywords[name].name: value for name, value in bound.kwargs.items()}
            return function(*bound.args, cls(**options))

        call.__signature__ = signature  # type: ignore[attr-defined]
        if function.__doc__ is not None:
            listed = "\n".join(described(keywords, "    "))
            call.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nOptions:\n{listed}\n"
        return call

    return decorated


def described(options: Mapping[str, Option], indent: str = "") -> Iterator[str]:
    """Lines that describe options: name, default, choices or range, and what each does."""
    for name, known in options.items():
        unit = f" ({known.unit})" if known.unit else ""
        yield f"{indent}{name} = {known.default!r}, {known.expected}{unit}:"
        yield from textwrap.wrap(known.doc, 110, initial_indent=indent + "    ", subsequent_indent=indent + "    ")


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(got), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
