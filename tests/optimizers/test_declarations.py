"""Each option is declared once, and everything that has to know it follows."""

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora, OptionError, directions, options
from optimizers.directions import Direction, MatrixOptions, MuonOptions
from optimizers.fields import Declared, Option, option, options_of, takes_options
from optimizers.polar import BACKENDS
from pretrain.config.optimizer import AdamWConfig, OptimizerConfig

FUNCTIONS: dict[str, tuple[Any, dict[str, str]]] = {
    "muon": (directions.muon, {}),
    "normuon": (directions.normuon, {"normuon_target": "target"}),
    "aurora": (directions.aurora, {}),
    "riemannian_aurora": (directions.riemannian_aurora, {}),
}


def test_the_names_of_directions_and_backends_are_those_that_exist() -> None:
    assert get_args(options.DirectionName) == tuple(directions.DIRECTIONS)
    assert {"adamw", *directions.DIRECTIONS} == set(get_args(options.OptimizerName))
    assert set(options.MATRIX["polar"].choices) == set(BACKENDS)
    assert set(options.MATRIX["lr_scale"].choices) == set(directions.LR_SCALES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_come_from_the_declarations(name: str) -> None:
    function, names = FUNCTIONS[name]
    keywords = {key: p.default for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    tensors = len(inspect.signature(function).parameters) - len(keywords)
    declared = options_of(directions.DIRECTIONS[name])
    wanted = {names.get(key, key): known.default for key, known in declared.items() if known.acts == "direction"}
    assert keywords == wanted
    assert all(known.doc[:40] in function.__doc__ for known in declared.values() if known.acts == "direction")
    with pytest.raises(TypeError, match="nosuch"):
        function(*[torch.ones(2, 2)] * tensors, nosuch=1)


def test_the_docstring_of_aurora_names_every_option_with_its_default() -> None:
    assert Aurora.__doc__ is not None
    lines = [line.strip() for line in Aurora.__doc__.splitlines()]
    for known in (*options.MATRIX.values(), *options.ADAMW.values()):
        assert any(line.startswith(f"{known.name} = {known.default!r}, ") for line in lines), known.name
    first = [line.split(" =")[0] for line in lines if " = " in line and line.split(" =")[0] in options.MATRIX]
    main = [name for name, known in options.MATRIX.items() if known.group == "main"]
    assert first[: len(main)] == main
    assert len(main) <= 6


@pytest.mark.parametrize(("section", "declared"), [(OptimizerConfig, options.MATRIX), (AdamWConfig, options.ADAMW)])
def test_every_option_is_a_config_key_with_the_same_default_range_and_meaning(
    section: Any, declared: dict[str, Option]
) -> None:
    outside = {"low": 1, "high": 1}
    for name, known in declared.items():
        if known.preset_only:
            assert name not in section.model_fields
            continue
        field = section.model_fields[name]
        assert field.default == known.default
        assert (field.description or "").startswith(known.doc)
        if not known.is_number:
            continue
        below = known.low if known.above else known.low - outside["low"]
        above = known.high + (outside["high"] if known.closed else 0)
        for value in (below, above):
            if math.isfinite(value):
                assert known.problem(type(known.default or 0.5)(value))
                with pytest.raises(ValueError, match=name):
                    section.model_validate({name: type(known.default or 0.5)(value)})


@dataclass(frozen=True)
class SlantedOptions(MuonOptions):
    """A direction that a user adds: one module, and an entry in the table of directions."""

    direction: ClassVar[str] = "slanted"

    slant: float = option(0.25, "Share of the momentum.", high=1.0)

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        return Direction.uncounted(u * self.slant)


@takes_options(SlantedOptions)
def slanted(u: Tensor, options: SlantedOptions) -> Tensor:
    """A share of u."""
    return options.find(u, None).d


def test_an_option_needs_nothing_but_its_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(slanted(torch.ones(2, 1), slant=0.5), torch.full((2, 1), 0.5))
    with pytest.raises(OptionError, match="slant is 2: expected a number of at least 0 and below 1"):
        slanted(torch.ones(2, 1), slant=2)
    monkeypatch.setitem(directions.DIRECTIONS, "slanted", SlantedOptions)
    monkeypatch.setitem(options.MATRIX, "slant", options_of(SlantedOptions)["slant"])
    monkeypatch.setitem(options.DEFAULTS["matrix"], "slant", 0.25)
    w = nn.Parameter(torch.zeros(2, 1))
    w.grad = torch.ones(2, 1)
    Aurora([w], direction="slanted", slant=0.5, lr=1.0, momentum=0.0, lr_scale="rms").step()
    assert torch.allclose(w, torch.full((2, 1), -0.5 * 0.2 * 2**0.5))
    with pytest.raises(OptionError, match="slant has no effect: the direction 'muon' does not use it"):
        Aurora([w], direction="muon", slant=0.5)
    assert "slant = 0.25" in options.documentation()


def test_a_switch_without_its_condition_is_refused_if_it_is_on() -> None:
    w = nn.Parameter(torch.zeros(2, 1))
    for given, key in (({"cautious": True}, "cautious"), ({"momentum": 0.0, "nesterov": True}, "nesterov")):
        with pytest.raises(OptionError, match=f"{key} has no effect"):
            Aurora([w], **given)
        with pytest.raises(OptionError, match=f"{key} has no effect"):
            Aurora([{"params": [w], **given}])
        with pytest.raises(ValueError, match=f"{key}: has no effect"):
            OptimizerConfig.model_validate(given)
        # What is off asks for nothing, and nobody has asked for a default.
        without = {name: value for name, value in given.items() if name != key}
        Aurora([w], **without, **{key: False})
        Aurora([w], **without)
        OptimizerConfig.model_validate({**without, key: False})
    Aurora([w], cautious=True, weight_decay=0.1)


def test_options_are_checked_where_they_are_made() -> None:
    with pytest.raises(OptionError, match=r"momentum is 1\.0"):
        MuonOptions(momentum=1.0)
    assert MuonOptions.of({"momentum": 0.5, "unknown": 1}).momentum == 0.5
    assert issubclass(MatrixOptions, Declared)
