"""Messages about mixtures and stages, and what became of `weight`."""

from typing import Any

import pytest

from pretrain.config import ConfigError, parse_config, parse_stored_config
from tests.config.test_config import quickstart
from tests.conftest import merged

SHARES = {"sotu": 1, "moby_dick": 2, "austen": 3}
LAST = {"mixture": SHARES}


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (
            {"mixture": {"sotu": 1, "mobydick": 2, "austen": 3}},
            [
                "data.mixture.mobydick: no source has this name; did you mean moby_dick?",
                "data.mixture.moby_dick: required, but missing",
            ],
        ),
        ({"mixture": {**SHARES, "sotu": 0}}, ["data.mixture.sotu: input should be greater than 0"]),
        ({"mixture": SHARES, "stages": [LAST]}, ["data.mixture: expected either mixture or stages, got both"]),
        ({"stages": []}, ["data.stages: expected at least one stage"]),
        ({"stages": [LAST, LAST]}, ["data.stages.0.until_tokens: expected a number of tokens, got None"]),
        (
            {"stages": [{**LAST, "until_tokens": 9}]},
            ["data.stages.0.until_tokens: expected null, since the last stage ends with the run, got 9"],
        ),
        (
            {"stages": [{**LAST, "until_tokens": 9}, {**LAST, "until_tokens": 9}, LAST]},
            ["data.stages.1.until_tokens: expected more than the 9 of the stage before it, got 9"],
        ),
        ({"stages": [{"mixture": {"sotu": 1, "austen": 1}}]}, ["data.stages: the source moby_dick has no share"]),
        (
            {"stages": [{"mixture": {"sotu": 0}, "until_tokens": 1}, LAST]},
            ["data.stages.0.mixture: expected at least one source with a share above 0"],
        ),
        ({"stages": [{"mixture": {**SHARES, "sotu": -1}}]}, ["data.stages.0.mixture.sotu: input should be greater"]),
        ({"stages": [{"mixtur": SHARES}]}, ["data.stages.0.mixtur: unknown key; did you mean mixture?"]),
        ({"past_max_epochs": "stop"}, ["data.past_max_epochs: input should be 'error' or 'end_source'"]),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(data: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(merged(quickstart(), {f"data.{key}": value for key, value in data.items()}))
    for problem in problems:
        assert any(line.startswith(problem) for line in error.value.problems), error.value.problems
    keys = [line.partition(":")[0] for line in error.value.problems]
    assert len(keys) == len(set(keys)), error.value.problems


def sources(**changes: Any) -> dict[str, Any]:
    found = quickstart()["data"]["sources"]
    return {"data.sources": [{**found[0], **changes}, *found[1:]]}


def test_names_are_checked() -> None:
    config = parse_config(merged(quickstart(), sources(name="speeches")))
    assert config.data.names == ("speeches", "moby_dick", "austen")
    for name in ("a.b", "", "-x", "a b"):
        with pytest.raises(ConfigError, match=r"data\.sources\.0\.name"):
            parse_config(merged(quickstart(), sources(name=name)))
    given = [{**source, "name": "same"} for source in quickstart()["data"]["sources"]]
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.name: expected a name of its own, got same"):
        parse_config(merged(quickstart(), {"data.sources": given}))


@pytest.mark.parametrize("weight", [1.0, 2, 0.5, "1"])
def test_the_weight_of_a_source_names_its_replacement(weight: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.weight: is replaced by data\.mixture"):
        parse_config(merged(quickstart(), sources(weight=weight)))


def test_an_older_config_is_still_read() -> None:
    """It has `weight: 1.0` written out; such a run of one source continues, and its config may be used again."""
    stored = merged(quickstart(), sources(weight=1.0))
    assert parse_stored_config(stored) == parse_config(quickstart())
    with pytest.raises(ConfigError, match="is replaced by"):
        parse_stored_config(merged(quickstart(), sources(weight=2.0)))
    one = {"data.sources": [{"path": "assets/corpus/austen.parquet", "weight": 1.0}]}
    assert parse_config(merged(quickstart(), one)).data.names == ("austen",)


def test_ending_sources_needs_a_limit() -> None:
    unlimited = [{**source, "max_epochs": None} for source in quickstart()["data"]["sources"]]
    changes = {"data.sources": unlimited, "data.past_max_epochs": "end_source"}
    with pytest.raises(ConfigError, match=r"data\.past_max_epochs: has no effect: no source has a max_epochs"):
        parse_config(merged(quickstart(), changes))
