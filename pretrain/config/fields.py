"""Field types that several config sections share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from pretrain.config.base import STORED
from pretrain.shipped import locate


def _integral(value: Any) -> Any:
    """Accept ``1e9`` for a whole number: YAML 1.2 reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


# The bounds come first, inside the validator, so that the JSON schema shows them.
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_integral)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _located(path: str, info: ValidationInfo) -> str:
    """What a person wrote may name a shipped file; a stored config keeps what was resolved when the run began."""
    return path if info.context == STORED else locate(path)


InputPath = Annotated[str, Field(min_length=1), AfterValidator(_located)]
"""A path or glob of files that a run reads, relative to the working directory or among the shipped files."""
