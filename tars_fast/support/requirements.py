"""What this package needs installed, checked before any of it is loaded, in the place of tracebacks from inside.

The ranges stand in pyproject.toml, or in an installed wheel's metadata, and nowhere else. This module and `tars_fast` itself
import nothing but the standard library and packaging.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tars_fast.support.starting import is_command

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_NAME = "tars-fast"
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_MISUSED = 2


def installed(package: str) -> str | None:
    """Version of a package, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_at_least(package: str, version: str) -> bool:
    """Whether the installed release of a package is this one or a later one. Raises PackageNotFoundError without one."""
    from packaging.version import Version

    return Version(importlib.metadata.version(package)) >= Version(version)


def supported(extra: str) -> dict[str, SpecifierSet]:
    """Range of every package that an extra brings, by its name."""
    from packaging.requirements import Requirement

    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8")).get("project", {}) if _PYPROJECT.is_file() else {}
    if project.get("name") == _NAME:
        # A checkout: what an editable install wrote down may be older.
        listed = [*project["dependencies"], *project["optional-dependencies"][extra]]
    else:
        # Nothing is known of a copy of this folder alone.
        listed = importlib.metadata.requires(_NAME) or [] if installed(_NAME) else []
    ranges: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, listed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        found = {requirement.name: requirement.specifier}
        if requirement.name == _NAME:
            found = {name: value for other in sorted(requirement.extras) for name, value in supported(other).items()}
        for name, specifier in found.items():
            ranges[name] = ranges[name] & specifier if name in ranges else specifier
    return ranges


def in_order(specifier: SpecifierSet) -> str:
    """Lower bound first, as people write it."""
    return ",".join(sorted({str(bound) for bound in specifier}, reverse=True))


def missing(extra: str) -> str | None:
    """Of the packages that an extra brings one that is not installed, as a line with its remedy; None where all are there."""
    for name in supported(extra):
        if installed(name) is None:
            return f"{name} is not installed; pip install '{_NAME}[{extra}]', in a checkout pip install -e '.[{extra}]'"
    return None


def unsupported() -> str | None:
    """The first installed package outside its range, as a line with version, range and remedy; None where all fit."""
    # vLLM 0.33 pins a torch that nothing else needs.
    ranges = supported("vllm" if installed("vllm") else "train")
    for name in supported("train"):
        found, specifier = installed(name), ranges[name]
        if found is not None and not specifier.contains(found, prereleases=True):
            return f"{name} {found} is installed, supported is {in_order(specifier)}; pip install '{name}{in_order(specifier)}'"
    return None


def check() -> None:
    """Refuse an environment in which this package does not work.

    Raises:
        SystemExit: with status 2 and one line on standard error, where a command of this package is being started.
        ImportError: elsewhere, for a package outside its range; one that is missing fails where it is imported.
    """
    try:
        import packaging  # noqa: F401
    except ModuleNotFoundError:
        problem: str | None = (
            f"packaging is not installed; pip install '{_NAME}[train]', in a checkout pip install -e '.[train]'"
        )
    else:
        problem = unsupported() or (missing("train") if is_command() else None)
    if problem is not None:
        _refuse(problem)


def _refuse(problem: str) -> NoReturn:
    if is_command():
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(_MISUSED)
    raise ImportError(problem)
