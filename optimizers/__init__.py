"""Muon and Aurora for matrices, AdamW for the rest. Needs nothing but torch.

    groups = param_groups(model, Settings(name="aurora", matrix={"lr": 0.02}))
    optimizer = Aurora(groups)

`polar`, `row_balance` and `directions` are the mathematics as pure functions of stacks of matrices; `update`
and `adamw` the elementwise parts; `aurora` the class that holds the state; `routing` says which parameter
belongs where, `options` what can be set, `flops` what a step costs.
"""

from . import directions, flops, polar
from .aurora import Aurora
from .fields import OptionError
from .polar.precision import has_fast_bf16
from .routing import Route, Settings, param_groups, routes

__all__ = [
    "Aurora",
    "OptionError",
    "Route",
    "Settings",
    "directions",
    "flops",
    "has_fast_bf16",
    "param_groups",
    "polar",
    "routes",
]
