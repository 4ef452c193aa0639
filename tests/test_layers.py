"""The architecture, proved: imports follow the table of wings, no module imports in a circle, and the kernels stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tars_fast"
COMMANDS = {"train", "evaluate", "analyse", "ablate", "prepare", "export", "plan", "pocket"}
WINGS = {
    "types": set(),
    "support": {"types"},
    "data": {"types", "support"},
    "models": {"types", "support", "data"},
    "config": {"types", "support", "models"},
    "rollout": {"types", "support", "data", "models"},
    "learning": {"types", "support", "data", "models", "config", "rollout"},
    "evaluation": {"types", "support", "data", "models", "rollout", "learning"},
    "analysis": {"types", "support", "data", "models", "rollout", "learning", "evaluation"},
    "reports": {"types", "support", "data", "models", "learning", "evaluation", "analysis"},
}
"""What each wing may import beside itself, from the top down; the commands may import everything. See docs/architecture.md."""


def module_of(path: Path) -> str:
    """`tars_fast.data.items`; a package's own file stands for it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(path: Path) -> set[str]:
    """`from package import module` counts as that module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            inside = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            found |= inside or {node.module}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_every_module_belongs_to_a_wing():
    assert {wing_of(module) for module in MODULES} == {*WINGS, *COMMANDS, "api", ""}


def test_a_wheel_holds_every_package():
    listed = ConfigParser()
    listed.read(ROOT / "setup.cfg")
    packages = set(listed["options"]["packages"].split())
    kernels = {path.parent.relative_to(ROOT / "kernels") for path in (ROOT / "kernels" / "tars_kernels").rglob("__init__.py")}
    kernels = {".".join(path.parts) for path in kernels}
    assert packages == kernels | {module_of(path) for path in PACKAGE.rglob("__init__.py")}
    alone = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())
    assert set(alone["tool"]["setuptools"]["packages"]) == kernels


def test_imports_follow_the_table_of_wings():
    above: set[str] = set()
    for wing, allowed in WINGS.items():
        assert allowed <= above, f"{wing} is said to import what stands below it: {allowed - above}"
        above.add(wing)
    for module, path in MODULES.items():
        wing = wing_of(module)
        for imported in imported_modules(path):
            if imported.partition(".")[0] != "tars_fast":
                continue
            if not wing:
                assert wing_of(imported) == "support", f"{path.name} of the package imports {imported}"
            elif wing in {*COMMANDS, "api"}:
                assert imported != "tars_fast", f"{module} imports the package itself"
            else:
                assert wing_of(imported) in {wing, *WINGS[wing]}, f"{module} imports {imported}: not in the table of wings"


@pytest.mark.parametrize("wing", [wing for wing in WINGS if (PACKAGE / wing).is_dir()])
def test_a_wings_own_file_says_what_it_may_import(wing):
    """The line leaves `types` out, which all may import, where there is something else."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text())) or ""
    allowed = [name for name in WINGS if name in WINGS[wing] - {"types"}]
    assert docstring.splitlines()[-1] == f"May import {', '.join(allowed) or 'types'}."


def test_no_module_imports_in_a_circle():
    graph = {module: imported_modules(path) & MODULES.keys() for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_a_command_is_imported_by_the_python_api_alone():
    for module, path in MODULES.items():
        commands = {wing_of(imported) for imported in imported_modules(path)} & COMMANDS
        assert not commands or module == "tars_fast.api", f"{module} imports {commands}"


def test_kernels_import_nothing_but_torch_and_triton():
    for path in (ROOT / "kernels" / "tars_kernels").rglob("*.py"):
        packages = {name.partition(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names)
        # An integration is named after the trainer that it needs.
        trainer = {path.stem} if path.parent.name == "integrations" else set()
        assert packages <= {"torch", "triton", "tars_kernels"} | trainer, path
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow the package of that name inside transformers"


def test_importing_kernels_loads_neither_transformers_nor_vllm():
    code = "import sys, tars_kernels; print(sorted({m.partition('.')[0] for m in sys.modules} & {'transformers', 'vllm'}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert output.stdout.strip() == "[]"
