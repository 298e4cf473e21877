"""Field types that several config sections share."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _integral(value: Any) -> Any:
    """Accept ``1e9`` for a whole number: YAML 1.2 reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The bounds come first, inside the validator, so that the JSON schema shows them.
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_integral)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
