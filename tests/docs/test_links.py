"""What README, CONTRIBUTING, CHANGELOG and docs point at is there: pages, headings, files, functions and settings."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown.extensions.toc import slugify
from settings_page import COMMANDS, PAGE, settings_of
from snippets import PAGES, ROOT, parse_markdown

from tars_fast.support.cli import flag_of

DOCS = ROOT / "docs"
GENERATED = DOCS / PAGE
RESULTS = ROOT / "bench" / "results"
"""Which a hook of docs puts into the site."""
SUFFIXES = "py|ipynb|sh|jsonl?|md|png|html|npz|tex|toml|ya?ml|cfg|txt|gz|jinja|js|css|parquet"
FILE = re.compile(rf"[\w./-]+\.(?:{SUFFIXES})(?![\w.])")
FIELD = re.compile(r"^    ([a-z]\w*): ", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
TRL = "num_generations reward_funcs reward_weights scale_rewards loss_type epsilon_low epsilon_high num_iterations max_steps "
TRL += "mask_truncated_completions vllm_importance_sampling_cap gradient_accumulation_steps eval_steps log_completions"
VERL = "rollout_correction loss_mode rollout_log_probs rollout_is_weights rollout_is_threshold rollout_is rollout_rs "
VERL += "entropy_coeff kl_loss_coef kl_loss_type old_log_prob ref_log_prob response_mask"
ELSEWHERE = {
    **dict.fromkeys(("--nnodes", "--rdzv-endpoint", "--shutdown-timeout", "--max-restarts"), "torchrun"),
    "--signal": "Slurm",
    **dict.fromkeys(TRL.split(), "TRL"),
    **dict.fromkeys(VERL.split(), "verl"),
    **dict.fromkeys(("Qwen2_5OmniThinkerForConditionalGeneration", "spk_dict.pt"), "transformers"),
    "OPENAI_API_KEY": "OpenAI's client and those like it",
    "data/law-00000-of-00001.parquet": "a file that somebody may have",
}
"""What is named and other projects have, and which."""


@cache
def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout: nothing says which files belong to it")
    return set(listed.stdout.splitlines())


@cache
def folders() -> set[str]:
    return {part for path in tracked_files() for part in Path(path).parent.parts}


@cache
def source_words() -> set[str]:
    """Every word of code and every folder; names of files that commands write, and flags of other programs, are among them."""
    words = folders() | ELSEWHERE.keys()
    for path in tracked_files():
        if path.endswith((".py", ".toml", ".sh", ".cfg", ".jinja", ".js")) or path.startswith(".ci/"):
            text = (ROOT / path).read_text(encoding="utf-8")
            words.update(re.findall(r"[\w.-]+", text))
            words.update(re.findall(r"\w+", text))
    return words


@cache
def flags() -> set[str]:
    of_commands = {flag for command in COMMANDS for setting in settings_of(command) for flag in setting.flags.split(", ")}
    # Of examples the fields of their settings, which tyro makes flags of.
    fields = {name for path in ROOT.glob("examples/*/*.py") for name in FIELD.findall(path.read_text(encoding="utf-8"))}
    return of_commands | {flag_of(name) for name in fields}


def anchors(page: Path) -> set[str]:
    """Of every heading, as GitHub makes them, or mkdocs for its own pages."""
    if page == GENERATED:
        return set(COMMANDS)
    found = set()
    tokens = parse_markdown(page.read_text(encoding="utf-8"))
    for heading, token in pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(child.content for child in token.children)
            given = re.search(r"\{ ?#([\w-]+) ?\}$", text)
            github = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(given[1] if given else slugify(text, "-") if page.is_relative_to(DOCS) else github)
    return found


def check_links(page: Path) -> None:
    """Raises AssertionError for the first link or picture that leads nowhere."""
    for token in parse_markdown(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            link = unquote(child.attrGet("href") or child.attrGet("src") or "")
            if not link or re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            place = f"{page.name}:{token.map[0] + 1}: {link}"
            target = (page.parent / path).resolve() if path else page
            if target != GENERATED and path:
                relative = target.relative_to(ROOT).as_posix()
                assert any(name == relative or name.startswith(f"{relative}/") for name in tracked_files()), (
                    f"{place}: no such file"
                )
                in_site = target.is_relative_to(DOCS) or (target.is_relative_to(RESULTS) and target.suffix in (".png", ".json"))
                assert in_site or not page.is_relative_to(DOCS), f"{place}: not in the site, name the file instead"
            assert not anchor or anchor in anchors(target), f"{place}: no such heading"


def unknown_names(page: Path) -> list[str]:
    """Files, flags and names of code that a page names and nothing has."""
    tokens = parse_markdown(page.read_text(encoding="utf-8"))
    # A page may name the files that its own examples are about.
    examples = " ".join(token.content for token in tokens if token.type == "fence")
    unknown = []
    for token in tokens:
        for code in [child.content for child in token.children or () if child.type == "code_inline"]:
            files = FILE.findall(code)
            missing = [name for name in files if not is_file(name)]
            missing += [flag for flag in FLAG.findall(code) if flag not in flags() | source_words()]
            missing += [name for name in names_of_code(code) if not files and name not in source_words()]
            unknown += [f"{page.name}:{token.map[0] + 1}: {name}" for name in missing if name not in examples]
    return unknown


def is_file(name: str) -> bool:
    """Whether it is in the repository, under that path or the end of one, or is what some code calls a file of its own."""
    folder, _, bare = name.rpartition("/")
    is_tracked = any(f"/{path}".endswith(f"/{name}") for path in tracked_files())
    return is_tracked or name in ELSEWHERE or (folder.partition("/")[0] not in folders() and bare in source_words())


def names_of_code(code: str) -> list[str]:
    """Names rather than words: they have an underscore, or a capital after a small letter."""
    return [name for name in re.findall(r"(?<!\w)[A-Za-z_]\w+", code) if re.search(r"_|[a-z][A-Z]", name)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    check_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_is_there(page):
    unknown = unknown_names(page)
    assert not unknown, "\n".join(["named, and nowhere to be found:", *unknown])
