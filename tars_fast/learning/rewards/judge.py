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
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from tars_fast.learning.rewards.inputs import RewardInput
from tars_fast.support.cli import first_line
from tars_fast.types import Question, UserError

TEMPLATE = """\
You grade an answer to a question.

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
    """The judge cannot be reached, or refuses; the message says why."""


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
        try:
            text = TEMPLATE if settings.template is None else settings.template.read_text(encoding="utf-8")
            environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(text)
            shown = self.prompt(Question("item", "QUESTION"), "ANSWER")
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise UserError(
                f"--judge-template {settings.template}: cannot be used ({first_line(error)}); it may name question, answer and "
                "scale"
            ) from error
        if "ANSWER" not in shown:
            raise UserError(
                f"--judge-template {settings.template}: leaves the answer out; write {{{{ answer }}}} where it belongs"
            )

    def prompt(self, question: Question, answer: str) -> str:
        """What the judge is told."""
        return self._template.render(question=question, answer=answer, scale=f"{self.settings.scale:g}")

    def describe(self) -> str:
        """What its marks depend on, as far as it is known here."""
        told = self.prompt(Question("", "QUESTION", answer_text=("REFERENCE",), rubric="RUBRIC"), "ANSWER")
        return f"{self.settings.model or self.settings.url}, {hashlib.sha256(told.encode()).hexdigest()[:16]}"

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
            content = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise JudgeError(f"{self.settings.url} replied {json.dumps(reply):.200}, no chat completion") from error
        return read_mark(content or "", self.settings.scale)

    async def _find_model(self) -> str:
        if self._model is None:
            listed = await self._ask("models")
            try:
                self._model = str(listed["data"][0]["id"])
            except (LookupError, TypeError) as error:
                raise JudgeError(f"{self.settings.url} lists no model; name one by --judge-model") from error
        return self._model

    async def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The reply to a request, which is sent again where the server is busy or not there."""
        address = f"{self.settings.url.rstrip('/')}/{path}"
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers)
        for attempt in range(_TRIES):
            try:
                return json.loads(await asyncio.to_thread(self._send, request))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {await asyncio.to_thread(_body, error)}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, HTTPException, ValueError) as error:
                problem = first_line(error)
            if attempt + 1 < _TRIES:
                await asyncio.sleep(_WAIT * 2**attempt)
        raise JudgeError(f"{address}: {problem}")

    def _send(self, request: urllib.request.Request) -> bytes:
        with urllib.request.urlopen(request, timeout=self.settings.timeout) as response:
            return response.read()


def find_judge(config: Any) -> Judge | None:
    """The judge that a command's settings name, `judge_url` and the others; None: they name none. Raises UserError."""
    if config.judge_url is None:
        return None
    timeout = getattr(config, "reward_timeout", JudgeSettings.timeout)
    return Judge(JudgeSettings(config.judge_url, config.judge_model, config.judge_template, config.judge_scale, timeout))


def _body(error: urllib.error.HTTPError) -> str:
    with error:
        return error.read().decode(errors="replace").strip()[:200]
