"""The base class of every config section."""

from collections.abc import Collection, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator


class Section(BaseModel):
    """A frozen part of the config: unknown keys are refused, field docstrings become descriptions.

    Non-finite floats are refused everywhere: no setting of a training run is NaN or infinite.

    An option that is set although it has no effect beside the others is an error, and a dump leaves it out: it shows
    what acts, and can be loaded again. A dump is also what a run's identity is made of.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def ineffective(self) -> Mapping[str, str]:
        """The fields that do nothing in this combination, each with the reason."""
        return {}

    def implied(self) -> Collection[str]:
        """The fields that a dump leaves out at their present value although they act: choices that came later, at
        what there was before. So runs from before keep their identity."""
        return ()

    @model_validator(mode="after")
    def _refuse_ineffective(self) -> Self:
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
