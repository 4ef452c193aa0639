"""Every command and snippet of README, CONTRIBUTING and docs: all are parsed, and a page is run from its top to its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from settings_page import COMMANDS, config_of, settings_of
from snippets import (
    LANGUAGES,
    NOT_RUN,
    PAGES,
    ROOT,
    SHELL,
    Block,
    check_json,
    check_python,
    parse_markdown,
    read_blocks,
    settings_for,
    write_script,
)

from tars_fast.ablate import choose_arms
from tars_fast.models.registry import PRESETS
from tars_fast.support.cli import parse_command_line
from tars_fast.types import UserError

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
PAGES_WITH_CODE = [page for page in PAGES if "```" in page.read_text(encoding="utf-8")]
MINUTES_A_PAGE = 15


@cache
def flags_of(command: str) -> set[str]:
    return {flag for setting in settings_of(command) for flag in setting.flags.split(", ")}


@cache
def tracked_scripts() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "bench").glob("*.sh")]


def typed_commands(blocks: Sequence[Block], folder: Path) -> list[tuple[Block, list[str]]]:
    """What a shell would start, in order, with all words expanded; bash reads the blocks and starts nothing.

    Raises AssertionError where bash cannot read one, or a variable is used that no earlier block of the page has set.
    """
    record = folder / "record"
    record.touch()
    handler = 'command_not_found_handle() { printf "%s\\0" "$BLOCK" "$@" $\'\\n\' >> "$RECORD"; }'
    builtins = [*tracked_scripts(), "source", "cd", "exec", "trap", "wait"]
    lines = ["set -u", handler, *(f'{name}() {{ command_not_found_handle {name} "$@"; }}' for name in builtins)]
    for number, block in enumerate(blocks):
        if block.language in SHELL:
            lines += [f"BLOCK={number}", block.command_text]
    environment = {"PATH": "/nowhere", "RECORD": str(record), "HOME": str(folder)}
    done = subprocess.run(
        [shutil.which("bash"), "-c", "\n".join(lines)], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = [words.split("\0") for words in record.read_text().split("\0\n\0")[:-1]]
    return [(blocks[int(number)], words) for number, *words in found]


def check_settings(command: str, arguments: Sequence[str]) -> None:
    """Raises UserError or AssertionError for what the command would refuse before it looks at any file."""
    given = list(arguments)
    if "--config" in given:
        place = given.index("--config")
        path = ROOT / given[place + 1]
        # One that is not in the repository is written by an earlier command.
        given[place : place + 2] = ["--config", str(path)] if path.is_file() else []
    try:
        config, _ = parse_command_line(config_of(command), given, command)
    except UserError as error:
        raise AssertionError(f"tars_fast.{command} does not take these flags ({error})") from error
    except SystemExit:
        return
    if command == "ablate":
        choose_arms(config)
    model = getattr(config, "model", "pocket")
    assert "/" in model or model.isupper() or model in PRESETS, f"--model {model} is no preset"


def check_command(words: Sequence[str]) -> None:
    """Raises AssertionError or UserError for a command line that cannot be right."""
    program, *arguments = words
    module = arguments.index("-m") + 1 if "-m" in arguments else 0
    if program in ("python", "python3", "torchrun") and module:
        name = arguments[module]
        if name.startswith("tars_fast."):
            command = name.removeprefix("tars_fast.")
            assert command in COMMANDS, f"no command {name}"
            if arguments[module + 1 :]:
                check_settings(command, arguments[module + 1 :])
        else:
            assert find_spec(name), f"no module {name}"
            if name == "pytest":
                check_command([name, *arguments[module + 1 :]])
    elif program == "python" and arguments[0] == "-c":
        check_python(arguments[1], may_be_absent=False)
    elif program == "python" or program in tracked_scripts():
        path, *arguments = words if program != "python" else arguments
        source = (ROOT / path).read_text(encoding="utf-8")
        # As argparse is given them, or as a field of a configuration.
        fields = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
        unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source and word not in fields]
        assert not unknown, f"{path} does not know {unknown}"
    elif program == "pytest":
        paths = [word.partition("::")[0] for word in arguments if "/" in word]
        assert all((ROOT / path).exists() for path in paths), f"not there: {paths}"
    elif program == "pip":
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            for extra in extras.split(","):
                assert extra in EXTRAS, f"no extra {extra}"
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"no script {arguments[0]}"
    else:
        assert program in NOT_RUN or shutil.which(program), f"no program {program}"


def check_page(page: Path, folder: Path) -> None:
    """Everything that can be found out about a page's code without running it. Raises what the first problem is."""
    blocks = read_blocks(page)
    inline = [
        Block(page, token.map[0] + 1, "bash", child.content.removesuffix("...").rstrip())
        for token in parse_markdown(page.read_text(encoding="utf-8"))
        for child in token.children or ()
        if child.type == "code_inline" and re.match(r"(python|torchrun) .*-m tars_fast\.", child.content)
    ]
    for block in blocks:
        assert block.language in LANGUAGES, f"{block}: say the language behind the fence, one of {sorted(LANGUAGES)}"
        if block.language == "python":
            check_python(block.code, may_be_absent=bool(block.skip), written={Path(other.file).stem for other in blocks})
        elif block.language == "json":
            check_json(block)
    for block, words in typed_commands([*blocks, *inline], folder):
        try:
            check_command(words)
        except (AssertionError, UserError, OSError) as error:
            raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error
    for block in blocks:
        settings_for(block, commands_in(block))


def commands_in(block: Block) -> dict[str, set[str]]:
    """Flags of each command of ours that a block names."""
    return {name: flags_of(name) for name in dict.fromkeys(re.findall(r"-m tars_fast\.(\w+)", block.code)) if name in COMMANDS}


def run_page(page: Path, folder: Path, python: str | Path = sys.executable) -> str:
    """What a page prints, run in a new folder that looks like a checkout. Raises AssertionError where it fails."""
    blocks = read_blocks(page)
    checkout, snippets = folder / "checkout", folder / "snippets"
    checkout.mkdir()
    snippets.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (checkout / path.name).symlink_to(path)
    script = write_script(blocks, [settings_for(block, commands_in(block)) for block in blocks], snippets)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": f"{checkout / 'kernels'}{os.pathsep}{checkout}"}
    output = folder / "output.txt"
    with output.open("w") as file:
        done = subprocess.run(
            [shutil.which("bash"), script],
            env=environment,
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=MINUTES_A_PAGE * 60,
        )
    printed = output.read_text(errors="replace")
    assert done.returncode == 0, f"{page.name}: status {done.returncode}\n{printed[-6000:]}"
    return printed


@pytest.mark.parametrize("path", [*(ROOT / ".ci").iterdir(), *(ROOT / "bench").glob("*.sh")], ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path):
    for line in re.findall(r"^\s*((?:from|import) tars_.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        check_python(line, may_be_absent=False)


BAD_CODE = {
    "a flag that is not there": ("```bash\npython -m tars_fast.train --nmu-steps 1\n```", "does not take these flags"),
    "a flag in a sentence": ("Call `python -m tars_fast.plan --gpu 80`.", "does not take these flags"),
    "a value out of range": ("```bash\npython -m tars_fast.train --group-size 3\n```", "must be even"),
    "a command that is not there": ("```bash\npython -m tars_fast.trian\n```", "no command tars_fast.trian"),
    "a variable that nothing sets": ("```bash\npython -m tars_fast.train --data $D\n```", "D: unbound variable"),
    "an arm that is not there": ("```bash\npython -m tars_fast.ablate --arms grpo,tras\n```", "'tras' is none of"),
    "a preset that is not there": ("```bash\npython -m tars_fast.plan --model qwen3-audio\n```", "is no preset"),
    "an extra that is not there": ('```bash\npip install -e ".[trian]"\n```', "trian"),
    "a flag of a benchmark": ("```bash\npython bench/engine.py --nothing\n```", "does not know"),
    "a test that is not there": ("```bash\npytest tests/test_nothing.py\n```", "not there"),
    "a module that is not there": ("```python\nimport tars_fast.nothing\n```", "No module named"),
    "a name that is not there": ("```python\nfrom tars_kernels import nothing\n```", "nothing"),
    "a syntax error": ("```python\nx = = 1\n```", "invalid syntax"),
    "JSON that is none": ("```json\n{x: 1}\n```", "Expecting"),
    "a fence without a language": ("```\nls\n```", "say the language"),
    "a fence inside an indented paragraph": ("text\n\n    ```bash\n    ls\n    ```", "too far indented"),
    "a marker nobody knows": ("<!-- test: slowly -->\n```bash\nls\n```", "unknown marker"),
    "a marker before a sentence": ("<!-- test: skip needs a GPU -->\n\nA sentence.", "before something that is no code"),
    "a skip without a reason": ("<!-- test: skip because -->\n```bash\nls\n```", "begins with none of"),
    "a skip of nothing": ("<!-- test: skip `--resume` needs a GPU -->\n```bash\nls\n```", "no command contains"),
    "a setting for no command": (
        "<!-- test: --num-steps 1 -->\n```bash\npython -m tars_fast.plan\n```",
        "no command has the marker's --num-steps",
    ),
    "a replacement of nothing": ("<!-- test: replace x by y -->\n```bash\nls\n```", "not there to be replaced"),
}


@pytest.mark.parametrize(("text", "problem"), BAD_CODE.values(), ids=BAD_CODE)
def test_what_cannot_be_right_is_found_without_running_it(tmp_path, monkeypatch, text, problem):
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, UserError, ImportError, SyntaxError, json.JSONDecodeError), match=re.escape(problem)):
        check_page(page, tmp_path)


GOOD_PAGE = """
<!-- test: first echo '{"id": 1}' > made_before.jsonl -->
<!-- test: skip `--resume` takes an hour -->
<!-- test: replace 80 by 12 -->
```bash
cat made_before.jsonl
GIVEN=(--gpu-memory 80)                        # goes on in the next block
false --resume
```

```console
$ echo "${GIVEN[@]}"; \
  echo end
--gpu-memory 12
end
```

<!-- test: file my_module.py -->
```python
def seven() -> int:
    return 7
```

<!-- test: first
number = 1
-->
```python
from my_module import seven

number += seven()
```

<!-- test: continue -->
```python
print("number", number)
```

<!-- test: skip takes a month -->
```bash
ls /nowhere
```

<!-- test: --gpu-memory 3 --group-size 4 -->
```bash
python -m tars_fast.plan --model pocket --gpu-memory 80 | grep "GPU of"
for name in one two; do
    python -c "import sys; print('last', sys.argv[1])" $name
done
```
"""


def test_a_page_runs_with_what_its_markers_say(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(GOOD_PAGE)
    monkeypatch.chdir(tmp_path)
    check_page(page, tmp_path)
    printed = run_page(page, tmp_path)
    assert [line for line in printed.splitlines() if not line.startswith("===")] == [
        '{"id": 1}',
        "number 8",
        "pocket on a GPU of 3 GB",
        "last one",
        "last two",
    ]


FAILURES = {
    "a command that fails": "```bash\npython -c 'raise SystemExit(2)'\n```",
    "a command before others": "```bash\nfalse\necho done\n```",
    "another output": "```console\n$ echo one\ntwo\n```",
    "a snippet that fails": "```python\nassert 1 == 2\n```",
    "a name that an earlier snippet has": "```python\nx = 1\n```\n\n```python\nprint(x)\n```",
}


@pytest.mark.parametrize("text", FAILURES.values(), ids=FAILURES)
def test_a_page_whose_code_fails_is_found(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=r"page\.md: status [12]"):
        run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_can_be_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page, tmp_path, forking_python):
    run_page(page, tmp_path, forking_python)
