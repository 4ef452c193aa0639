"""An LLM as judge of answers that no rule can grade, behind any address that speaks OpenAI's chat completions.

It is told question, reference answer, rubric and answer by a template, and replies with a mark. One that cannot be read, or
lies outside the scale, is none: the reward then does not apply.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from tars_fast.learning.rewards.inputs import RewardInput
from tars_fast.support.cli import first_line
from tars_fast.types import Question, UserError

Result = TypeVar("Result")

TEMPLATE = """\
You grade an answer to a question.

{% for turn in question.turns %}
Said before by the {{ turn.role }}: {{ turn.text }}
{% endfor %}
Question: {{ question.text }}
{% if question.reference %}
Right answer: {{ question.reference }}
{% endif %}
{% if question.rubric %}
What to look at: {{ question.rubric }}
{% endif %}
Answer to grade: {{ answer }}

Reply with one line: "Mark: " and a number from 0 (useless) to {{ scale }} (nothing to improve).
"""
"""What a judge is told where --judge-template names no file."""
_MARK = re.compile(r"(?i)\b(?:mark|score|rating|grade)\b[^\d\n-]{0,20}(-?\d+(?:\.\d+)?)")
_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*\d+)?\s*\.?\s*")
_TRIES = 3
_WAIT = 0.5
"""Seconds before the second try; twice as many before the third."""


class JudgeError(RuntimeError):
    """The judge cannot be told, cannot be reached, or refuses; the message says why."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is, and what it is told."""

    url: str
    """Up to /v1."""
    model: str | None = None
    """None: the first that the address lists."""
    template: Path | None = None
    """jinja2, given `question` (the item), `answer` (what the completion says) and `scale`; None: `TEMPLATE`."""
    scale: float = 10.0
    """The best mark; 0 is the worst."""
    timeout: float = 60.0
    """Seconds without a reply after which a request counts as failed."""
    concurrency: int = 16
    """Requests of an evaluation that are under way at the same time."""


def read_mark(reply: str, scale: float) -> float | None:
    """The last mark of a reply, from 0 to 1; None where there is none on the scale.

    Args:
        scale: the best mark.
    """
    marks = _MARK.findall(reply)
    alone = _NUMBER.fullmatch(reply)
    found = marks[-1] if marks else alone[1] if alone else None
    mark = None if found is None else float(found) / scale
    return mark if mark is not None and 0 <= mark <= 1 else None


class Judge:
    """Marks answers from 0 to 1; an async reward function.

    Raises:
        UserError: the template cannot be read.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self._model = settings.model
        environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            self._text = TEMPLATE if settings.template is None else settings.template.read_text(encoding="utf-8")
            self._template = environment.from_string(self._text)
            shown = self._render(Question("item", "QUESTION"), "ANSWER")
        except Exception as error:  # A template may raise anything.
            raise UserError(
                f"--judge-template {settings.template}: cannot be used ({first_line(error)}); it may name question, answer and "
                "scale"
            ) from error
        if "ANSWER" not in shown:
            raise UserError(
                f"--judge-template {settings.template}: leaves the answer out; write {{{{ answer }}}} where it belongs"
            )

    def _render(self, question: Question, answer: str) -> str:
        return self._template.render(question=question, answer=answer, scale=f"{self.settings.scale:g}")

    def prompt(self, question: Question, answer: str) -> str:
        """What the judge is told. Raises JudgeError where the template fails on the question."""
        try:
            return self._render(question, answer)
        except Exception as error:  # A template may raise anything.
            raise JudgeError(f"--judge-template {self.settings.template}: {first_line(error)}") from error

    def describe(self) -> str:
        """What its marks depend on, as far as it is known here. Raises UserError as `find_model`."""
        told = f"{self.settings.scale:g}\n{self._text}"
        return f"{self.find_model()}, {hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def find_model(self) -> str:
        """The judge's name. Raises UserError where it has to be asked for, and cannot."""
        with self._explained():
            return run_coroutine(self._find_model())

    def check(self, questions: Sequence[Question]) -> None:
        """Ask once, before anything that takes long.

        Args:
            questions: those that are to be answered.

        Raises:
            UserError: the judge cannot be asked, or none of the questions is one for it.
        """
        judged = next((question for question in questions if question.is_judged), None)
        if judged is None:
            raise UserError(
                f"--judge-url {self.settings.url}: has no effect, as all items have choices or a rule to grade by; leave it out"
            )
        with self._explained():
            run_coroutine(self.mark(judged, "I do not know."))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except JudgeError as error:
            raise UserError(f"--judge-url {self.settings.url}: cannot be asked ({error}); see that the judge runs") from error

    async def __call__(self, completions: list[RewardInput]) -> list[float | None]:
        return [await self.mark(one.question, one.text) for one in completions]

    async def mark(self, question: Question, answer: str) -> float | None:
        """From 0 to 1; None where the judge gives none. Raises JudgeError."""
        request = {
            "model": await self._find_model(),
            "messages": [{"role": "user", "content": self.prompt(question, answer)}],
            "temperature": 0,
        }
        reply = await self._ask("chat/completions", request)
        try:
            said = _text_of(reply["choices"][0]["message"]["content"])
        except (LookupError, TypeError, AttributeError) as error:
            raise JudgeError(f"{self.settings.url} replied {json.dumps(reply):.200}, no chat completion") from error
        return read_mark(said, self.settings.scale)

    async def _find_model(self) -> str:
        if self._model is None:
            listed = await self._ask("models")
            try:
                name = listed["data"][0]["id"]
            except (LookupError, TypeError):
                name = None
            if not isinstance(name, str):
                raise JudgeError(f"{self.settings.url} lists no model; name one by --judge-model")
            self._model = name
        return self._model

    async def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The reply to a request, which is sent again where the server is busy or not there."""
        address = f"{self.settings.url.rstrip('/')}/{path}"
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
        for attempt in range(_TRIES):
            try:
                status, reply = await asyncio.to_thread(self._send, request)
                if status < 300:
                    return json.loads(reply)
                problem = f"status {status}: {reply.decode(errors='replace').strip()[:200]}"
                if status != 429 and status < 500:
                    break
            except (OSError, HTTPException, ValueError, RecursionError) as error:
                problem = first_line(error)
            if attempt + 1 < _TRIES:
                await asyncio.sleep(_WAIT * 2**attempt)
        raise JudgeError(f"{address}: {problem}")

    def _send(self, request: urllib.request.Request) -> tuple[int, bytes]:
        """(status, body)."""
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def find_judge(config: Any) -> Judge | None:
    """The judge that a command's settings name, `judge_url` and the others; None: they name none. Raises UserError."""
    if config.judge_url is None:
        return None
    return Judge(
        JudgeSettings(
            config.judge_url,
            config.judge_model,
            config.judge_template,
            config.judge_scale,
            config.reward_timeout,
            config.reward_concurrency,
        )
    )


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What it returns, also in a notebook, whose own thread runs a loop already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _text_of(content: Any) -> str:
    """A message's content, which may be in parts. Raises TypeError, LookupError or AttributeError where it is neither."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError("no text")
    return content or ""
