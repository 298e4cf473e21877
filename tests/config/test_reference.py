"""The documentation of the config is complete, and the committed page is the generated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.config import load_config
from pretrain.config.reference import PAGE, config_reference, config_schema
from pretrain.config.schema import Config
from tests.config.test_classes import declared

REPOSITORY = Path(__file__).parents[2]


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_reference(), "run: python -m pretrain.config.reference"


def test_the_page_has_a_row_for_every_key_with_class_and_meaning() -> None:
    rows: dict[str, list[str]] = {}
    section = ""
    for line in config_reference().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").replace(".*", "")
        elif line.startswith("| `") and section:
            cells = [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
            rows[f"{section}.{cells[0].strip('`')}"] = cells
    keys = dict(declared(Config))
    assert rows.keys() == keys.keys()
    for path, (_, type_text, default, of, meaning) in rows.items():
        assert of == str(keys[path]), path
        assert len(meaning) > 10, path
        assert type_text, path
        assert "None" not in type_text, path
        assert default == "required" or default.startswith("`"), path
    assert rows["train.total_tokens"][1:4] == ["whole number > 0", "required", "result (may be extended)"]
    assert rows["train.activation_checkpointing"][1] == "`none`, `full` or whole number > 0"
    assert rows["engine.reduce_bucket_elements"][2] == "`50_000_000`"


def test_options_can_stand_in_a_group_of_their_own() -> None:
    from pydantic import Field

    from pretrain.config.base import RESULT, Section
    from pretrain.config.reference import _section_parts

    class Grouped(Section):
        """A section."""

        key_class = RESULT
        plain: int = 1
        """The plain one."""
        special: int = Field(default=2, json_schema_extra={"group": "for parity runs"})
        """The special one."""

    schema = {"$defs": {"Grouped": Grouped.model_json_schema()}}
    page = "\n".join(_section_parts(Grouped, "grouped", schema))
    assert page.index("`plain`") < page.index("### grouped: for parity runs") < page.index("`special`")


def test_the_schema_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == config_schema()
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        for name, of in definition["properties"].items():
            assert "description" in of or "$ref" in of, name
    tokens = schema["$defs"]["TrainConfig"]["properties"]["total_tokens"]
    assert (tokens["type"], tokens["exclusiveMinimum"], tokens["x-class"]) == ("integer", 0, "result (may be extended)")


def test_the_verb_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == config_reference()


def test_a_shipped_config_has_no_key_that_the_schema_lacks() -> None:
    definitions = config_schema()
    data = load_config(REPOSITORY / "configs" / "quickstart.yaml").resolved()
    for name, section in data.items():
        known = definitions["$defs"][definitions["properties"][name]["$ref"].rpartition("/")[2]]["properties"]
        assert section.keys() <= known.keys()
