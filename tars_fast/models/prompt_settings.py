"""The prompt settings that a user gives: system prompt, prompt template, answer format; checked when they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tars_fast.support.text import visible
from tars_fast.types import THINK, AnswerFormat, UserError

PLAIN = AnswerFormat("plain", "Reason briefly where that helps, and end with: The answer is [ANSWER].")
"""Without tags: the whole completion is the answer, or states it."""
ANSWER_FORMATS = {format.name: format for format in (THINK, PLAIN)}
TEMPLATE_VARIABLES = ("question", "options", "modality", "category", "id", "answer_format")
"""What a prompt template may use. `question` is the text in a written prompt and the recording in a spoken one."""
_ENTRIES = ("instruction", "answer", "whole")


def _read(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"{flag} {visible(str(path))}: cannot be read ({reason}); name a text file") from error


def read_prompt_template(path: Path) -> str:
    """The jinja text of `--prompt-template`.

    Raises:
        UserError: it cannot be read, is no template, leaves the question out, or uses what no template is given.
    """
    from jinja2 import Environment, meta

    text = _read("--prompt-template", path)
    # As transformers compiles templates. Only parsed here; rendered in a process of its own.
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        used = meta.find_undeclared_variables(environment.parse(text))
    # jinja2's own, or of a number or of brackets that Python does not take.
    except Exception as error:
        line = getattr(error, "lineno", None)
        place = f"line {line}: " if line else ""
        raise UserError(f"--prompt-template {path}: {place}{error}; write a jinja2 template") from error
    unknown = sorted(used - {*TEMPLATE_VARIABLES})
    if unknown:
        listed = ", ".join(TEMPLATE_VARIABLES)
        raise UserError(f"--prompt-template {path}: uses {unknown[0]!r}, which is none of {listed}; correct it")
    if "question" not in used:
        raise UserError(f"--prompt-template {path}: leaves the question out; write {{{{ question }}}} where it stands")
    return text.removesuffix("\n")


def read_answer_format(given: str) -> AnswerFormat:
    """The answer format that `--answer-format` names: `think`, `plain`, or a YAML or TOML file of `AnswerFormat`'s fields.

    Raises:
        UserError: the file cannot be read, or lacks or misuses an entry.
    """
    if given in ANSWER_FORMATS:
        return ANSWER_FORMATS[given]
    path, own_name = Path(given), given
    given = visible(given)
    if not path.suffix and not path.exists():
        raise UserError(f"--answer-format {given}: neither {' nor '.join(ANSWER_FORMATS)} nor a file; choose one of them")
    values = _entries(given, path, _read("--answer-format", path))
    for name in _ENTRIES:
        if not isinstance(values.get(name, ""), str) or (name != "whole" and not values.get(name)):
            raise UserError(
                f"--answer-format {given}: {name!r} must be a text; it has instruction, answer and, if need be, whole"
            )
    unknown = sorted(values.keys() - {*_ENTRIES}, key=str)
    if unknown:
        raise UserError(f"--answer-format {given}: {unknown[0]!r} is none of {', '.join(_ENTRIES)}; remove it")
    for name in ("answer", "whole"):
        try:
            groups = re.compile(values.get(name, ""), re.DOTALL).groupindex
        except re.error as error:
            raise UserError(f"--answer-format {given}: {name!r} is no regular expression ({error}); correct it") from error
        if name == "answer" and "answer" not in groups:
            raise UserError(
                f"--answer-format {given}: 'answer' has no group named answer; write (?P<answer>...) around the answer"
            )
    return AnswerFormat(own_name, *(values.get(name, "") for name in _ENTRIES))


def _entries(given: str, path: Path, text: str) -> Mapping[str, str]:
    if path.suffix == ".toml":
        import tomllib as reader

        load, kind = reader.loads, "TOML"
    else:
        import yaml

        load, kind = yaml.safe_load, "YAML"
    try:
        values = load(text)
    except Exception as error:  # yaml's errors have no common parent with TOML's but this.
        raise UserError(
            f"--answer-format {given}: is no {kind} ({' '.join(str(error).split()):.200}); write one entry a line"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"--answer-format {given}: holds no entries by name; it has instruction, answer and, if need be, whole")
    return values
