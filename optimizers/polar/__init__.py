"""Polar factors of stacks of matrices: `polar(x, method)`, its backends and the arithmetic that they run in."""

from .backends import (
    BACKENDS,
    ERRORS,
    Backend,
    StatedError,
    has_dtype_choice,
    largest_entry,
    polar,
    prescale,
    prescale_by,
    working_dtype,
)
from .precision import PolarDtype, has_fast_bf16

__all__ = [
    "BACKENDS",
    "ERRORS",
    "Backend",
    "PolarDtype",
    "StatedError",
    "has_dtype_choice",
    "has_fast_bf16",
    "largest_entry",
    "polar",
    "prescale",
    "prescale_by",
    "working_dtype",
]
