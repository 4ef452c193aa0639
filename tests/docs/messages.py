"""Every message that ends a command, found in the source: what UserError and TrainingError and their kinds are given.

A message is shown as it stands on the terminal, with `…` for each of its fields.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FIELD = "…"
SAID_BEHIND = {
    "missing": "",
    "unsupported": "",
    "check": "",
    "no_setting": "",
    "engine_refusal": "--engine vllm: ",
    "vllm_refusal": "--engine vllm: ",
    "adapter_refusal": "--engine vllm: ",
    "sharding_refusal": "--tensor-parallel …: ",
    "refusal": "item …: ",
    "length_refusal": "item …: ",
    "prompt_size": "item …: ",
}
"""Functions that say why something is refused, and what their callers set before it."""


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives a name."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    }


def template(node: ast.expr, constants: dict[str, str]) -> str:
    """The text that an expression makes, one `…` for whatever is known only when it runs."""
    return re.sub(f"{FIELD}+", FIELD, _template(node, constants))


def _template(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _template(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, constants) + _template(node.right, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id, FIELD)
    return FIELD


def derived_from(name: str, classes: list[ast.ClassDef]) -> set[str]:
    """A class and all that are derived from it."""
    found = {name}
    for _ in classes:
        found |= {one.name for one in classes if any(isinstance(base, ast.Name) and base.id in found for base in one.bases)}
    return found


def find_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """(line on the terminal, file:line) of every message in the Python files of a folder."""
    paths = sorted(folder.rglob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [list(ast.walk(tree)) for tree in trees]
    classes = [node for held in nodes for node in held if isinstance(node, ast.ClassDef)]
    beginnings = dict.fromkeys(derived_from("UserError", classes), "error: ")
    beginnings |= dict.fromkeys(derived_from("TrainingError", classes), "stopped: ")
    for path, tree, held in zip(paths, trees, nodes, strict=True):
        constants = _constants(tree)
        refusing = [node for node in held if isinstance(node, ast.FunctionDef) and node.name in SAID_BEHIND]
        said_behind = {id(node): SAID_BEHIND[function.name] for function in refusing for node in ast.walk(function)}
        texts = [(f"error: {SAID_BEHIND[function.name]}", text) for function in refusing for text in _texts_of(function)]
        calls = [node for node in held if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args]
        made = [call for call in calls if call.func.id in beginnings]
        texts += [(beginnings[call.func.id] + said_behind.get(id(call), ""), call.args[0]) for call in made]
        for beginning, text in texts:
            yield beginning + template(text, constants), f"{path.relative_to(folder)}:{text.lineno}"


def _texts_of(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What it returns, or gives a name to return it later."""
    for node in ast.walk(function):
        value = node.value if isinstance(node, ast.Return | ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            yield value


def find_texts(folder: Path) -> set[str]:
    """Every text in the Python files of a folder."""
    texts = set()
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts |= {template(node, {}) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)}
    return texts
