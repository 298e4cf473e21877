"""The hooks of `load_state_dict`."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim.optimizer import StateDict


def around(load: Callable[[Any, StateDict], None]) -> Callable[[Any, StateDict], None]:
    """`load_state_dict` of an optimizer, within its own hooks for that: the first may translate a state before `load`
    checks it, and the last find what `load` made of it. torch alone calls both within its part of the work."""

    @wraps(load)
    def load_with_hooks(self: Any, state_dict: StateDict) -> None:
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for hook in before.values():
            translated = hook(self, state_dict)
            state_dict = state_dict if translated is None else translated
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            load(self, state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = before
            self._optimizer_load_state_dict_post_hooks = after
        for hook in after.values():
            hook(self)

    return load_with_hooks
