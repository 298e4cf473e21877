"""Muon and Aurora for matrices, AdamW for everything else. It needs only torch.

    optimizer = Aurora(model, lr=0.02)

`polar` and `directions` are the mathematics, as pure functions of stacks of matrices. `aurora` is the class that holds
the state, `matrices` the step of a matrix group, `adamw` and `update` its elementwise parts. `recognise` finds out what
each parameter of a model is, `routing` decides where it goes, `binding` takes what other code hands to an optimizer,
`dtensors` parameters that are in part on other processes, `options` says what can be set, `flops` what a step costs.
`sharded` is the same step for parameters that are cut between processes.
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
