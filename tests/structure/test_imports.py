"""The arrows between packages, rooms and modules keep their direction."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.structure.modules import Import, circles, import_nodes, imports, parsed, room, sources, targets

# Which package may import which, besides itself.
PACKAGES: dict[str, set[str]] = {"optimizers": set(), "eval": {"pretrain"}, "pretrain": {"optimizers", "eval"}}
# What the evaluation may know of the trainer.
OF_PRETRAIN_IN_EVAL = {
    "pretrain.config.base",  # sections, errors and YAML of config files in general
    "pretrain.config.errors",
    "pretrain.config.loader",
    "pretrain.config.validate",
    "pretrain.engine.ranks",  # what processes tell each other; imports nothing else of the trainer
    "pretrain.files",  # writes files whole and finds what a wheel carries; imports neither torch nor another room
    "pretrain.locks",  # locks of files; imports nothing
    "pretrain.processes",
    "pretrain.processes.environment",
    "pretrain.processes.errors",
    "pretrain.processes.exit_codes",
    "pretrain.processes.failures",
    "pretrain.processes.redaction",  # regular expressions; imports nothing
    "pretrain.text_tables",  # imports nothing
}
# The only modules of pretrain that know of the evaluation.
KNOW_EVAL = {"pretrain.cli"}

# The rooms of pretrain from top to bottom; each imports only from rows below its own.
LEVELS = (
    ("pretrain.__main__",),
    ("pretrain.cli", "pretrain"),
    ("pretrain.launch",),
    ("pretrain.comparison",),
    ("pretrain.neurons", "pretrain.sweep", "pretrain.report", "pretrain.export"),
    ("pretrain.training",),
    ("pretrain.run",),
    ("pretrain.data", "pretrain.checkpoint", "pretrain.planning", "pretrain.watching"),
    ("pretrain.engine",),
    ("pretrain.model",),
    ("pretrain.config",),
    ("pretrain.slurm",),
    ("pretrain.shipped",),
    ("pretrain.processes",),
    ("pretrain.files", "pretrain.locks", "pretrain.text_tables"),
)

# Function-level imports of our own modules: importer (or its package) and what is imported (or its package): why.
# The rule is that there are none; the reason must be that an import is heavy and optional.
LAZY: dict[tuple[str, str], str] = {
    ("pretrain.cli", "pretrain"): "a verb loads what it needs: --help and bad input answer without importing torch",
    ("pretrain.cli", "eval"): "a verb loads what it needs: --help and bad input answer without importing torch",
    ("pretrain.engine", "pretrain.engine"): "an engine is imported when it is chosen: DeepSpeed takes seconds",
    ("pretrain.run.reader", "pretrain.config"): "only runs of older versions need it, and it imports torch",
    ("pretrain.run.reader", "pretrain.model.cost"): "only runs of older versions need it, and it imports torch",
}

# Modules whose own function-level imports are free: `import pretrain` must stay cheap, `pretrain.train` loads the rest.
LAZY_MODULES = {"pretrain"}


def show(found: Iterable[object]) -> str:
    return "\n".join(sorted(map(str, found)))


def test_packages_import_only_those_below_them() -> None:
    wrong = []
    for edge in imports():
        importer, imported = edge.importer.split(".")[0], edge.imported.split(".")[0]
        if importer != imported and imported not in PACKAGES[importer]:
            wrong.append(edge)
        if importer == "eval" and imported == "pretrain" and edge.imported not in OF_PRETRAIN_IN_EVAL:
            wrong.append(edge)
        if importer == "pretrain" and imported == "eval" and not _below(edge.importer, KNOW_EVAL):
            wrong.append(edge)
    assert not wrong, show(wrong)


def _below(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_the_optimizers_import_torch_and_nothing_else() -> None:
    """DeepSpeed and others are handed over as objects, never imported."""
    allowed, wrong = {"torch", "optimizers", *sys.stdlib_module_names}, []
    for name, path in sources("optimizers").items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = [(node.module or "").split(".")[0]]
            else:
                continue
            wrong += [f"{name}:{node.lineno} -> {root}" for root in roots if root not in allowed]
    assert not wrong, show(wrong)


def test_only_the_command_imports_the_command() -> None:
    own = ("pretrain.cli", "pretrain.__main__")
    wrong = [edge for edge in imports() if _below(edge.imported, ["pretrain.cli"]) and not _below(edge.importer, own)]
    assert not wrong, show(wrong)


def test_nothing_imports_tests_or_scripts() -> None:
    wrong = []
    for name, path in sources("pretrain", "optimizers", "eval").items():
        for node in ast.walk(parsed(path)):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{name} -> {target}" for target in named if target.split(".")[0] in ("tests", "scripts")]
    assert not wrong, show(wrong)


def between(edges: Iterable[Import], level: str) -> dict[str, set[str]]:
    """Who imports whom, of rooms or of modules."""
    found: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        importer, imported = edge.importer, edge.imported
        if level == "rooms":
            importer, imported = room(importer), room(imported)
        if importer != imported:
            found[importer].add(imported)
    return found


def _edges_of(circle: list[str], level: str) -> str:
    named = room if level == "rooms" else str
    inside = [e for e in imports() if named(e.importer) in circle and named(e.imported) in circle]
    return show(e for e in inside if named(e.importer) != named(e.imported))


def test_rooms_import_only_from_the_rows_below_them() -> None:
    rows = {name: row for row, names in enumerate(LEVELS) for name in names}
    edges = [e for e in imports() if e.importer.startswith("pretrain") and e.imported.startswith("pretrain")]
    edges = [edge for edge in edges if room(edge.importer) != room(edge.imported)]
    assert {room(end) for edge in edges for end in (edge.importer, edge.imported)} <= rows.keys(), (
        "a room without a row"
    )
    wrong = [edge for edge in edges if rows[room(edge.importer)] >= rows[room(edge.imported)]]
    assert not wrong, show(wrong)


def test_rooms_form_no_circle() -> None:
    """Imports in functions and for type checkers count: they hide a circle, they do not remove it."""
    found = circles(between(imports(), "rooms"))
    assert not found, "\n\n".join(f"{' <-> '.join(circle)}\n{_edges_of(circle, 'rooms')}" for circle in found)


def test_modules_form_no_circle() -> None:
    """A package's __init__ may re-export its modules; a module that imports from its own package would be a circle."""
    found = circles(between(imports(), "modules"))
    assert not found, "\n\n".join(f"{' <-> '.join(circle)}\n{_edges_of(circle, 'modules')}" for circle in found)


def test_imports_in_functions_are_listed_with_a_reason() -> None:
    def listed(edge: Import) -> bool:
        return any(_below(edge.importer, [importer]) and _below(edge.imported, [other]) for importer, other in LAZY)

    inside = [edge for edge in imports() if edge.inside_function and edge.importer not in LAZY_MODULES]
    wrong = [edge for edge in inside if not listed(edge)]
    assert not wrong, show(wrong)


def test_a_circle_is_seen_wherever_its_arrows_stand(tmp_path: Path) -> None:
    tree = ast.parse(
        "import typing\nfrom pretrain.files import sync\n"
        "if typing.TYPE_CHECKING:\n    from pretrain.data import masks\n"
        "def f():\n    from . import order\n    from pretrain.config import Config, loader\n"
    )
    names = ["pretrain.files", "pretrain.data", "pretrain.data.masks", "pretrain.data.order", "pretrain.config"]
    modules = dict.fromkeys([*names, "pretrain.config.loader"], tmp_path)
    found = [
        (target, inside, types)
        for node, inside, types in import_nodes(tree)
        for target in targets(node, "pretrain.data", modules)
    ]
    assert found == [
        ("pretrain.files", False, False),
        ("pretrain.data.masks", False, True),
        ("pretrain.data.order", True, False),
        ("pretrain.config.loader", True, False),
        ("pretrain.config", True, False),
    ]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
