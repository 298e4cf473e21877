"""Modules stay small, helpers exist once, and the package list names every folder."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict

from tests.structure.modules import PACKAGES, REPOSITORY, parsed, sources

MOST_LINES = {"pretrain": 400, "optimizers": 400, "eval": 400, "scripts": 400, "tests": 500}
SAME_HELPER_LINES = 5

# The conditions of assertions in the product, and what of our own each states. Data and input are never checked by an
# assertion, which `python -O` removes.
ASSERTIONS: dict[str, str] = {
    "box is not None": "our own figure has a viewBox",
    "context": "the harness puts a token before an empty context",
    "declared is not None": "every key of the schema declares a class, which a test checks",
    "grad is not None": "callers choose parameters that have a gradient",
    "is_dtensor(first)": "the parameters have just been checked to be DTensors",
    "is_dtensor(p)": "callers choose DTensors",
    "isinstance(dtype, torch.dtype)": "the index was checked when it was read",
    "isinstance(model, GenerationMixin)": "the config refuses samples of a model that cannot write any",
    "job.config is not None": "only jobs with a config are launched",
    "layout is not None": "under FSDP2 there always is one",
    "matrix is not None": "only a matrix optimizer routes to itself",
    "section is not None": "a section of the schema",
    "self._process.stdin": "the pipe was asked for",
    "self._process.stdout": "the pipe was asked for",
    "self.config is not None": "a job that waits for its values has no run",
    "shard.grad is not None": "the optimizer steps what has a gradient",
    "value is not PydanticUndefined": "an optional field of the schema has a default",
    "wrapped == (self.world_size > 1)": "what Accelerate made of the model",
    "work is not None": "a process is in the group of its own holder",
}


def test_modules_are_no_longer_than_allowed() -> None:
    long = []
    for folder, most in MOST_LINES.items():
        for path in sources(folder).values():
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > most:
                long.append(f"{path.relative_to(REPOSITORY)}: {lines} lines, at most {most}")
    assert not long, "\n".join(long)


def normalised(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The body without docstring, annotations and names of local variables."""
    names: dict[str, str] = {}
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Name(names.setdefault(node.id, f"n{len(names)}"), node.ctx)

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
            self.generic_visit(node)
            return ast.Assign([node.target], node.value) if node.value else ast.Pass()

    for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        names[argument.arg] = f"n{len(names)}"
    copied = ast.parse(ast.unparse(ast.Module(body, [])))
    return ast.dump(Rename().visit(copied))


def test_helpers_exist_once() -> None:
    """Functions of more than five lines whose bodies are equal up to names, in two modules of the product."""
    by_body: dict[str, list[str]] = defaultdict(list)
    for name, path in sources(*PACKAGES, "scripts").items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (first[-1].end_lineno or 0) - first[0].lineno + 1 if first else 0
                if lines > SAME_HELPER_LINES:
                    by_body[normalised(node)].append(f"{name}.{node.name}")
    doubled = [names for names in by_body.values() if len({name.rpartition(".")[0] for name in names}) > 1]
    assert not doubled, "\n".join(" = ".join(names) for names in doubled)


def test_helpers_with_one_name_do_one_thing() -> None:
    """Functions of the same name at the top of two modules that are nearly the same, by their statements."""
    by_name: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for module, path in sources(*PACKAGES).items():
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef):
                first = node.body[1:] if ast.get_docstring(node) is not None else node.body
                statements = [line for part in first for line in ast.unparse(part).splitlines()]
                if len(statements) > SAME_HELPER_LINES:
                    by_name[node.name.strip("_")].append((module, statements))
    alike = []
    for name, found in by_name.items():
        for index, (module, statements) in enumerate(found):
            for other, others in found[index + 1 :]:
                common = len(set(statements) & set(others)) / max(len(set(statements)), len(set(others)))
                if other != module and common > 0.6:
                    alike.append(f"{module}.{name} and {other}.{name}: {common:.0%} of the lines are equal")
    assert not alike, "\n".join(alike)


def test_the_package_list_names_every_folder_with_modules() -> None:
    """A folder with a pyproject.toml of its own may have a list of its own; folders of data are mapped to a name."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert isinstance(settings.get("packages"), list), "the list has moved: adapt this test"
    listed = set(settings["packages"]) - settings.get("package-dir", {}).keys()
    folders = {path.parent.relative_to(REPOSITORY) for path in sources(*PACKAGES).values()}
    apart = {folder for folder in folders if (REPOSITORY / folder.parts[0] / "pyproject.toml").exists()}
    assert {".".join(folder.parts) for folder in folders - apart} <= listed
    assert listed <= {".".join(folder.parts) for folder in folders}


def test_assertions_are_about_ourselves() -> None:
    found = defaultdict(list)
    for name, path in sources(*PACKAGES).items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Assert):
                found[ast.unparse(node.test)].append(f"{name}:{node.lineno}")
    new = [f"{' '.join(found[text])}: assert {text}" for text in found.keys() - ASSERTIONS.keys()]
    assert not new, "about data: raise an error; about ourselves: list it in ASSERTIONS\n" + "\n".join(sorted(new))
