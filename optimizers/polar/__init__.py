"""Polar factors of stacks of matrices: `polar(x, method)`, its backends and the arithmetic that they run in."""

from .backends import (
    BACKENDS,
    ERRORS,
    GRADED_ERRORS,
    Backend,
    StatedError,
    has_accuracy_choice,
    has_dtype_choice,
    largest_entry,
    polar,
    prescale,
    prescale_by,
    product_dtype,
    working_dtype,
)
from .precision import Accuracy, PolarDtype, has_fast_bf16

__all__ = [
    "BACKENDS",
    "ERRORS",
    "GRADED_ERRORS",
    "Accuracy",
    "Backend",
    "PolarDtype",
    "StatedError",
    "has_accuracy_choice",
    "has_dtype_choice",
    "has_fast_bf16",
    "largest_entry",
    "polar",
    "prescale",
    "prescale_by",
    "product_dtype",
    "working_dtype",
]
