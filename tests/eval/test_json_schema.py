"""The JSON Schemas say of our files what the TypedDicts say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.compare import compare
from eval.harness import evaluate
from eval.json_schema import DIALECT, comparison_schema, result_schema
from eval.schema import EvalResult
from eval.texts import HeldOutText
from pretrain.cli import main
from tests.eval.results import write

TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


KEYWORDS = {"$schema", "$defs", "$ref", "title", "description", "type", "properties", "required", "items", "anyOf"}
KEYWORDS |= {"enum", "const", "additionalProperties", "prefixItems", "minItems", "maxItems"}


def violations(schema: dict[str, Any], value: Any, root: dict[str, Any], where: str = "") -> Iterator[str]:
    """What of the value the schema forbids: an interpreter of the keywords that ours use."""
    assert set(schema) <= KEYWORDS
    if "$ref" in schema:
        yield from violations(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root, where)
    if "type" in schema:
        right = isinstance(value, TYPES[schema["type"]])
        right = right and (schema["type"] == "boolean" or not isinstance(value, bool))
        if not right:
            yield f"{where}: not {schema['type']}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: not in the enum"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: not {schema['const']}"
    if "anyOf" in schema and all(any(violations(one, value, root)) for one in schema["anyOf"]):
        yield f"{where}: none of anyOf"
    if isinstance(value, dict):
        yield from (f"{where}.{key}: missing" for key in schema.get("required", []) if key not in value)
        for key, part in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if inner is not None:
                yield from violations(inner, part, root, f"{where}.{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for place, part in enumerate(value):
            prefix = schema.get("prefixItems", [])
            inner = prefix[place] if place < len(prefix) else schema.get("items")
            if inner is not None:
                yield from violations(inner, part, root, f"{where}[{place}]")


@pytest.fixture(scope="module")
def result(model_folder: Path, fetched: dict[str, Any]) -> EvalResult:
    texts = [HeldOutText("sea", ("The whale.", "The sea."), "file")]
    return evaluate(model_folder, ["hellaswag", "winogrande"], limit=5, texts=texts, **fetched)


def test_a_real_result_and_a_real_comparison_obey_them(tmp_path: Path, result: EvalResult) -> None:
    assert list(violations(result_schema(), result, result_schema())) == []
    file = write(tmp_path, result)
    comparison = json.loads(json.dumps(compare([file, file])))
    assert list(violations(comparison_schema(), comparison, comparison_schema())) == []


def test_what_a_reader_refuses_they_forbid(result: EvalResult) -> None:
    schema = result_schema()
    for path, value in (
        (("schema_version",), 2),
        (("model", "source"), "disk"),
        (("tasks", "hellaswag", "acc"), "high"),
        (("tasks", "hellaswag", "items", 0, "acc"), None),
        (("tasks", "winogrande", "acc_stderr"), [1]),
        (("bits_per_byte", "sea", "per_document", 1, "bytes"), 1.5),
        (("limit",), True),
    ):
        spoilt = json.loads(json.dumps(result))
        inner = spoilt
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        assert list(violations(schema, spoilt, schema)), path
        del inner[path[-1]]
        assert list(violations(schema, spoilt, schema)), path


def test_the_comments_above_the_keys_are_their_descriptions() -> None:
    schema = result_schema()
    assert schema["$schema"] == DIALECT
    item = schema["$defs"]["ItemOutcome"]
    assert item["properties"]["doc_id"]["description"].startswith("Position of the item in its split")
    assert item["required"] == ["doc_id", "doc_hash", "acc"]
    assert schema["properties"]["limit"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    # Of a TypedDict that extends another one, too.
    part = comparison_schema()["$defs"]["PartComparison"]["properties"]
    assert part["part"]["description"].startswith('"without overlap"')
    assert part["won"]["description"].startswith("Items that only the model gets right")


@pytest.mark.parametrize(("name", "schema"), [("result", result_schema), ("comparison", comparison_schema)])
def test_the_verb_prints_them(name: str, schema: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["result", "--schema", name]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
