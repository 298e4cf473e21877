import ast
import sys
from pathlib import Path

import optimizers


def test_the_package_needs_nothing_but_torch() -> None:
    allowed = {"optimizers", "torch", *sys.stdlib_module_names}
    files = sorted(Path(optimizers.__file__).parent.rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, file.name
                found = {(node.module or "").split(".")[0]}
            else:
                continue
            assert found <= allowed, f"{file.name} imports {found - allowed}"
