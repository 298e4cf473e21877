"""A fused weight in blocks is stepped as the separate weights would be."""

from typing import Any

import pytest
import torch
from torch import nn

from optimizers import Aurora
from optimizers.blocks import row_blocks

SPLIT = (40, 8, 8, 16)
OPTIONS = [
    {"direction": "aurora"},
    {"direction": "aurora", "scope": "all", "lr_scale": "spectral"},
    {"direction": "normuon"},
    {"direction": "u_normuon", "running_norms": True},
    {"direction": "riemannian_aurora"},
    {"direction": "muon", "contra": 0.2, "uw_floor": 0.35, "weight_decay": 0.1, "cautious": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_blocks_step_as_weights_of_their_own(options: dict[str, Any]) -> None:
    whole = nn.Parameter(torch.randn(sum(SPLIT), 8))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(SPLIT)]
    fused = Aurora([{"params": [whole], "row_blocks": [SPLIT]}], lr=0.1, polar="svd", **options)
    separate = Aurora(parts, lr=0.1, polar="svd", **options)
    for _ in range(4):
        whole.grad = torch.randn_like(whole)
        for part, grad in zip(parts, whole.grad.split(SPLIT), strict=True):
            part.grad = grad.clone()
        fused.step()
        separate.step()
    assert torch.allclose(whole.detach(), torch.cat([part.detach() for part in parts]), atol=1e-6)
    assert torch.allclose(fused.state[whole]["momentum"], torch.cat([separate.state[p]["momentum"] for p in parts]))
    assert int(fused.state[whole]["step"]) == 4
    if "second_moment" in fused.state[whole]:
        # Only the first and the last block are tall; the square ones keep no second moment.
        moments = fused.state[whole]["second_moment"].split(SPLIT)
        assert torch.allclose(moments[0], separate.state[parts[0]]["second_moment"])
        assert torch.allclose(moments[3], separate.state[parts[3]]["second_moment"])
        assert not moments[1].any()
        assert "second_moment" not in separate.state[parts[1]]


def test_a_split_is_kept_by_state_dict_and_differs_from_the_whole() -> None:
    w, whole = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12, 4))
    whole.data.copy_(w.data)
    optimizer, other = Aurora([{"params": [w], "row_blocks": [[6, 6]]}]), Aurora([whole])
    w.grad = torch.randn(12, 4)
    whole.grad = w.grad.clone()
    optimizer.step()
    other.step()
    assert not torch.allclose(w, whole, atol=1e-4)
    loaded = Aurora([w])
    loaded.load_state_dict(optimizer.state_dict())
    assert row_blocks(loaded.param_groups[0]) == [(6, 6)]


@pytest.mark.parametrize(
    "given",
    [[(6, 5)], [(12, 0)], [(13, -1)], [(6, 6), None], "12", 2, [()]],
    ids=["short", "zero", "negative"] + [""] * 4,
)
def test_blocks_that_do_not_fit_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="row_blocks"):
        Aurora([{"params": [nn.Parameter(torch.randn(12, 4))], "row_blocks": given}])


def test_vectors_have_no_blocks() -> None:
    with pytest.raises(ValueError, match="only matrices have blocks"):
        Aurora([{"params": [nn.Parameter(torch.randn(12))], "kind": "adamw", "row_blocks": [(6, 6)]}])
