"""The architecture as it is drawn: no module imports itself by a detour, no folder one above it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"formula"},
    {"core"},
    {"storage"},
    {"transforms"},
    {"wrappers"},
    {"optimizers"},
    {"inspect", "interop"},
]
"""The folders, each of which imports from itself and from those before it."""


def imports() -> dict[str, set[str]]:
    """The modules that each module imports, those for type checkers too."""
    found = {}
    for path in (ROOT / "adamx").rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adamx"):
                for alias in node.names:
                    inside = ROOT.joinpath(*f"{node.module}.{alias.name}".split("."))
                    is_module = inside.with_suffix(".py").exists()
                    names.add(f"{node.module}.{alias.name}" if is_module else str(node.module))
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    return found


def folder(module: str) -> str:
    return module.split(".")[1] if module.count(".") > 1 else ""


def test_no_module_imports_itself_by_a_detour():
    of = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in of.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in of:
        visit(module, ())
    assert len(done) > 100


def test_no_folder_imports_from_one_above_it():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module, others in imports().items():
        here = folder(module)
        for other in others if here else ():
            there = folder(other)
            assert there == here or floor[there] < floor[here], f"{module} imports {other}"


def test_tests_do_not_import_tests():
    pattern = re.compile(r"^(?:from|import) (test_\w+)", re.M)
    found = {path.name: pattern.findall(path.read_text()) for path in ROOT.glob("tests/*.py")}
    assert {name: others for name, others in found.items() if others} == {}
