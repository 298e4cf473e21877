"""The repository's Python files, parsed: modules, what they import and where."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("pretrain", "optimizers", "eval")


@dataclass(frozen=True)
class Import:
    """One import of a module of ours."""

    importer: str
    imported: str
    """The module, not a name in it."""
    line: int
    inside_function: bool
    type_checking: bool

    def __str__(self) -> str:
        notes = [
            note for note, true in (("in a function", self.inside_function), ("types", self.type_checking)) if true
        ]
        return f"{self.importer}:{self.line} -> {self.imported}" + (f" ({', '.join(notes)})" if notes else "")


@cache
def sources(*folders: str) -> dict[str, Path]:
    """The modules below some folders of the repository, by dotted name."""
    found = {}
    for folder in folders:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports() -> tuple[Import, ...]:
    """Every import of our modules by our modules, those in functions and for type checkers included."""
    modules, found = sources(*PACKAGES), []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, inside, types in import_nodes(parsed(path)):
            for target in targets(node, package, modules):
                if target != name:
                    found.append(Import(name, target, node.lineno, inside, types))
    return tuple(found)


def import_nodes(tree: ast.Module) -> list[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Every import statement, whether it stands in a function, and whether only type checkers see it."""
    found: list[tuple[ast.Import | ast.ImportFrom, bool, bool]] = []

    def visit(node: ast.AST, inside: bool, types: bool) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append((node, inside, types))
        inside |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, inside, True)
            for child in node.orelse:
                visit(child, inside, types)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside, types)

    visit(tree, False, False)
    return found


def targets(node: ast.Import | ast.ImportFrom, package: str, modules: dict[str, Path]) -> list[str]:
    """The modules of ours that an import loads by name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules]
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
    if base not in modules:
        return []
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    found = [name for name in submodules if name in modules]
    return found + ([base] if len(found) < len(submodules) else [])


def room(module: str) -> str:
    """``pretrain.data`` for ``pretrain.data.stream``; a module that lies directly in pretrain is its own room."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pretrain" else parts[0]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            part, stack[at:] = stack[at:], []
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found
