"""Files for other tools and hosts agree with the project."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def _read(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text())


def test_the_citation_has_the_projects_name_version_and_licence() -> None:
    citation = _read("CITATION.cff")
    assert [citation[key] for key in ("title", "version", "license")] == [
        PROJECT[key] for key in ("name", "version", "license")
    ]


def test_hooks_are_local_and_run_tools_of_the_environment() -> None:
    (repository,) = _read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = [Path(hook["entry"].split()[0]) for hook in repository["hooks"]]
    assert {tool.name for tool in tools} == {"ruff", "mypy"}
    installed = {requirement.partition(">")[0] for requirement in PROJECT["optional-dependencies"]["dev"]}
    assert {tool.name for tool in tools} <= installed
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_the_workflow_calls_the_test_script_and_pins_the_oldest_python() -> None:
    (job,) = _read(".github/workflows/test.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": "./scripts/test"}
    (version,) = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert PROJECT["requires-python"] == f">={version}"


def test_the_constraints_pin_what_the_project_asks_for() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {requirement.partition(">")[0].lower().replace("_", "-") for requirement in asked}
    assert names <= pinned
