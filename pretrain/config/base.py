"""The base class of every config section, and the class of a key: what may change when a run is resumed."""

import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

KeyKind = Literal["result", "numerics", "execution", "note"]

STORED = {"stored": True}
"""Validation context for a config that this program wrote: see `Section`."""


@dataclass(frozen=True)
class KeyClass:
    """What a config key decides. It stands in the `Annotated` type of a field, or as the `key_class` of a section.

    Attributes:
        kind: ``result``: what is trained; must match on resume. ``numerics``: the same training in other arithmetic;
            a change on resume prints a warning. ``execution``: how it is carried out; free. ``note``: text for people;
            free. A sweep names a run after its result and numerics keys.
        by_content: the key is a path. A resume compares the contents of the files, not the path.
        extends: the key sets where the run ends, so it may change on resume, with a warning.
    """

    kind: KeyKind
    by_content: bool = False
    extends: bool = False

    def __str__(self) -> str:
        detail = " (contents)" if self.by_content else " (may be extended)" if self.extends else ""
        return self.kind + detail


RESULT = KeyClass("result")
CONTENTS = KeyClass("result", by_content=True)
LENGTH = KeyClass("result", extends=True)
NUMERICS = KeyClass("numerics")
EXECUTION = KeyClass("execution")
NOTE = KeyClass("note")


class Section(BaseModel):
    """A frozen part of the config: unknown keys are rejected, field docstrings become descriptions.

    Non-finite floats are rejected everywhere: no setting of a training run is NaN or infinite.

    Setting an option that has no effect in combination with the others is an error, and a dump leaves such options
    out: it shows what takes effect, and it can be loaded again. A config that this program wrote (validation context
    `STORED`) may set them, since an older version may have written them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    key_class: ClassVar[KeyClass | None] = None
    """The class of the fields that do not declare one; None if each has to."""

    def ineffective(self) -> Mapping[str, str]:
        """The fields that have no effect in this combination, each with the reason."""
        return {}

    def implied(self) -> Collection[str]:
        """The fields that a dump leaves out at their present value although they take effect: options that were added
        later, at the value that reproduces the earlier behaviour. So runs from before keep their names in sweeps."""
        return ()

    @model_validator(mode="after")
    def _refuse_ineffective(self, info: ValidationInfo) -> Self:
        if info.context == STORED:
            return self
        problems = [
            f"{field}: has no effect: {why}; remove it"
            for field, why in self.ineffective().items()
            if field in self.model_fields_set
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _without_ineffective(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        without = {*self.ineffective(), *self.implied()}
        dumped: dict[str, Any] = handler(self)
        return {key: value for key, value in dumped.items() if key not in without}


def section_in(annotation: Any) -> type[Section] | None:
    """The Section class inside an annotation such as ``tuple[SourceConfig, ...]`` or ``X | None``; None without one."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Section) else None
    return next((found for argument in typing.get_args(annotation) if (found := section_in(argument))), None)


def class_of(section: type[Section], field: str) -> KeyClass | None:
    """The class that a field declares, or else its section's."""
    own = [entry for entry in section.model_fields[field].metadata if isinstance(entry, KeyClass)]
    return own[-1] if own else section.key_class


def leaves(section: type[Section], dumped: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, KeyClass]]:
    """The keys of a dumped section that are not sections themselves: dotted path, value, class."""
    for name, field in section.model_fields.items():
        if name not in dumped:
            continue
        inner, value, path = section_in(field.annotation), dumped[name], prefix + name
        if inner is None:
            declared = class_of(section, name)
            assert declared is not None, f"{path} declares no class"
            yield path, value, declared
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from leaves(inner, item, f"{path}.{index}.")
        else:
            yield from leaves(inner, value, f"{path}.")
