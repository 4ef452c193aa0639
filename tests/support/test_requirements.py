"""What pyproject.toml promises: every package that is imported, by the extra that needs it; others are refused in one line."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tars_fast.support import requirements
from tars_fast.support.cli import require_extra
from tars_fast.types import UserError

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "coverage": "pytest-cov",
    "markdown_it": "markdown-it-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "torch.utils.tensorboard": "tensorboard",
}
"""Where a package's name is not that of its modules, or is imported by another."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(distribution, whether the file cannot be imported without it) of everything imported from elsewhere."""
    # _typeshed is there for type checkers only.
    local = {"tars_fast", "tars_kernels", "_typeshed"} | {
        other.stem
        for folder in ("tests", "bench", "kernels/tests", "docs", "examples")
        for other in (ROOT / folder).rglob("*.py")
    }
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = {
        id(node)
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
    }
    only_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            package = name.partition(".")[0]
            # Types of the standard library itself, which type checkers bring.
            if package not in {*sys.stdlib_module_names, *local, "_typeshed"}:
                found = DISTRIBUTIONS.get(name) or DISTRIBUTIONS.get(package) or package.replace("_", "-")
                yield found, id(node) in at_top and id(node) not in only_types


def imported(folder: str) -> dict[str, bool]:
    """Distribution -> whether a file of `folder` needs it merely to be imported."""
    found: dict[str, bool] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for name, at_top in imports(path):
            found[name] = found.get(name, False) or at_top
    return found


def test_everything_imported_is_declared_where_it_is_needed():
    used = imported("tars_fast")
    train = set(requirements.supported("train"))
    optional = {
        extra: requirements.supported(extra).keys() - train for extra in ("analysis", "ifeval", "log", "speech", "vllm")
    }
    assert used.keys() | {"triton"} == train.union(*optional.values()), "declared and imported differ"
    assert {name for name, at_top in used.items() if at_top} <= train, "what an extra brings is imported where it is used"
    kernels = imported("kernels/tars_kernels")
    assert {name for name, at_top in kernels.items() if at_top} == {"torch", "triton"}
    assert kernels.keys() - {"torch", "triton"} <= requirements.supported("bench").keys()
    development = requirements.supported("dev").keys()
    for folder, extra in (("tests", "dev"), ("kernels/tests", "bench"), ("bench", "bench")):
        peers = requirements.supported(extra).keys() - development
        assert imported(folder).keys() <= development | peers | {"vllm"}, folder
    assert {name for name, at_top in imported("tests").items() if at_top} <= development
    smol = requirements.supported("smol").keys()
    # Each with a command of its own, see the README beside them.
    assert imported("examples/smol").keys() <= smol | {"tokenizers", "piper", "onnxruntime"}
    assert imported("docs").keys() <= requirements.supported("docs").keys() | used.keys()


def test_ranges_bind_nobody_who_only_wants_the_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = [Requirement(line) for line in project["dependencies"]]
    assert [(one.name, str(one.specifier)) for one in base] == [("torch", ">=2.11"), ("triton", ">=3.6")]
    # Two distributions from one tree: what the whole package brings of the kernels is what they are alone.
    alone = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    for field in ("version", "requires-python", "dependencies", "license"):
        assert alone[field] == project[field], field
    bounded = {
        name for name, specifier in requirements.supported("vllm").items() if any(one.operator == "<" for one in specifier)
    }
    assert bounded == {"accelerate", "datasets", "huggingface-hub", "peft", "torch", "transformers", "triton", "vllm"}
    assert "<2.14" in str(requirements.supported("train")["torch"])
    assert "<2.14" in str(requirements.supported("dev")["torch"]), "extras bring those that they name"


def test_a_wheel_has_the_same_ranges(monkeypatch):
    """Its metadata is written as setuptools writes it."""
    extras = ("train", "analysis", "log", "speech", "vllm", "dev", "bench", "docs")
    expected = {extra: requirements.supported(extra) for extra in extras}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = list(project["dependencies"])
    for extra, needed in project["optional-dependencies"].items():
        for line in needed:
            name, _, marker = line.partition(";")
            listed.append(f'{name}; ({marker}) and extra == "{extra}"' if marker else f'{name}; extra == "{extra}"')
    monkeypatch.setattr(requirements, "_PYPROJECT", ROOT / "no such file")
    monkeypatch.setattr(requirements, "installed", lambda name: "0.1.0")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: listed if name == "tars-fast" else None)
    assert {extra: requirements.supported(extra) for extra in extras} == expected


def start(folder: Path, package: str, version: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where a release of a package seems to be installed."""
    described = folder / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    path = os.pathsep.join([str(folder), str(ROOT / "kernels"), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize(
    ("package", "version", "range_"),
    [
        ("transformers", "5.16.1", ">=5.17,<5.25"),
        ("transformers", "5.25.0", ">=5.17,<5.25"),
        ("peft", "0.22.0", ">=0.18,<0.22"),
        ("torch", "2.14.1+cu130", ">=2.11,<2.14"),
        ("huggingface-hub", "0.36.0", ">=1.5,<3"),
    ],
)
def test_a_package_that_does_not_fit_is_one_line_before_anything_loads(tmp_path, package, version, range_):
    done = start(tmp_path, package, version, "-X", "importtime", "-m", "tars_fast.train", "--num-steps", "1")
    lines = done.stderr.splitlines()
    told = [line for line in lines if not line.startswith("import time:")]
    assert told == [f"error: {package} {version} is installed, supported is {range_}; pip install '{package}{range_}'"]
    assert done.returncode == 2
    assert not [line for line in lines if line.endswith((" torch", " transformers", " peft"))], "nothing was loaded"


def test_a_library_that_imports_it_gets_an_import_error(tmp_path):
    code = "import sys\ntry:\n    import tars_fast.config\nexcept ImportError as error:\n    sys.exit(f'told: {error}')"
    done = start(tmp_path, "peft", "0.17.1", "-c", code)
    assert done.stderr == "told: peft 0.17.1 is installed, supported is >=0.18,<0.22; pip install 'peft>=0.18,<0.22'\n"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    there = requirements.installed
    monkeypatch.setattr(requirements, "installed", lambda name: None if name == "dtaidistance" else there(name) or "1")
    assert requirements.missing("train") is None
    with pytest.raises(UserError, match=r"^dtaidistance is not installed; pip install 'tars-fast\[analysis\]', in a checkout"):
        require_extra("analysis")
    monkeypatch.setattr(requirements, "installed", lambda name: None if name == "transformers" else there(name))
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "tars_fast.train"])
    with pytest.raises(SystemExit) as ended:
        requirements.check()
    assert ended.value.code == 2
