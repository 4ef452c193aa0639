"""Tiers of tests: `pytest` runs the fast one, `pytest --all` everything; CONTRIBUTING.md says what belongs where."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "bench"
WORKERS_ON_A_GPU = 4
LONGEST = {"test_kernels.py", "test_dry_walk.py", "test_snippets.py"}

# PYTHONPATH=kernels:. pytest runs what is not installed; processes that tests start elsewhere must find it as well.
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in os.environ["PYTHONPATH"].split(os.pathsep))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", dest="all_tiers", help="run the slow tests too")


def _fast_tier_alone(config: pytest.Config) -> bool:
    """Whether nothing was chosen: neither all tests, nor some by marker, keyword or name."""
    option = config.option
    return not (option.all_tiers or option.markexpr or option.keyword or any("::" in argument for argument in config.args))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run tests in several processes where pytest-xdist is installed, unless a number of them was given.

    A test that is named runs in this process, for debuggers; so do benchmarks, which would disturb one another.
    """
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    # pytest-cov asks for the number of processes before any conftest is read: with --cov it must be given.
    if config.pluginmanager.hasplugin("_cov"):
        return
    alone = any("::" in argument or Path(argument).resolve().is_relative_to(BENCHMARKS) for argument in config.args)
    if config.option.numprocesses is None and config.option.dist == "no" and not alone:
        config.option.numprocesses = "auto"
        # Neighbours stay together, and with them what their module's fixtures have made, until one process has nothing left.
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A GPU is shared by few; without one pytest-xdist counts the cores."""
    import torch

    return min(WORKERS_ON_A_GPU, os.cpu_count() or 1) if torch.cuda.is_available() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest first, for which other processes would wait at the end.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if _fast_tier_alone(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: docs/getting-started.md, Installing vLLM")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _fast_tier_alone(config):
        terminalreporter.write_line("fast tier; pytest --all runs the slow tests too")
