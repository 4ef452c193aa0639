"""The architecture, proved: imports point downwards only, and the kernels stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"types", "files", "modules", "progress", "requirements", "threads"},
    {"architecture", "answers", "advantages", "metrics", "cli", "audio", "audio_cache", "optimizer", "hub", "weights"}
    | {"alignment", "figure", "page", "key_values", "provenance", "sources", "transcription", "workers"},
    {"memory", "scorers", "recognition", "packed_attention"},
    {"families", "results"},
    {"adapters", "config", "log"},
    {"ablation", "data", "rewards", "prompts", "synthesis", "report"},
    {"ablation_page", "analysis_page", "models", "sampling", "quality"},
    {"checkpoint", "probes", "transformers_engine", "vllm_engine"},
    {"engine", "evaluation"},
    {"analysis", "rollout"},
    {"update"},
    {"train", "evaluate", "analyse", "export", "plan", "pocket", "prepare"},
    {"ablate"},
]
"""From the bottom up; a module imports from layers below its own only. The last two are commands."""


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_imports_point_downwards():
    level = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    paths = {path.stem: path for path in (ROOT / "tars_fast").glob("*.py") if path.stem != "__init__"}
    assert paths.keys() == level.keys(), "every module has a place in LAYERS"
    for module, path in paths.items():
        for imported in imported_modules(path):
            package, _, name = imported.partition(".")
            if package == "tars_fast":
                assert name, f"{module} imports the package itself"
                assert level[name] < level[module], f"{module} imports {name}, which is not below it"


def test_kernels_import_nothing_but_torch_and_triton():
    for path in (ROOT / "kernels" / "tars_kernels").rglob("*.py"):
        packages = {name.partition(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names)
        assert packages <= {"torch", "triton", "tars_kernels"}, path
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow the package of that name inside transformers"


def test_importing_kernels_loads_neither_transformers_nor_vllm():
    code = "import sys, tars_kernels; print(sorted({m.partition('.')[0] for m in sys.modules} & {'transformers', 'vllm'}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert output.stdout.strip() == "[]"
