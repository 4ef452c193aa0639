"""The LLM judge, against a server on this machine that speaks the same protocol."""

from __future__ import annotations

import pytest
from judge_server import JudgeServer, judge_server

from tars_fast.learning.rewards import judge as judge_module
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.rewards.judge import Judge, JudgeSettings, read_mark
from tars_fast.learning.rewards.reward import AsyncCalls, Reward, RewardError
from tars_fast.types import Completion, Modality, Question, Turn, UserError

QUESTION = Question("a", "Why?", answer_text=("Because",), rubric="be kind")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # The next try would wait as long as for a real one.
    monkeypatch.setattr(judge_module, "_WAIT", 0.01)
    with judge_server() as server:
        yield server


def marks(server: JudgeServer, texts: list[str], concurrency: int = 8, **settings) -> list[float | None]:
    calls = AsyncCalls(concurrency, timeout=20.0)
    try:
        reward = Reward("judge", Judge(JudgeSettings(server.url, **settings)))
        completions = [Completion(0, Modality.SPEECH, (1,), (0.0,), text, truncated=False) for text in texts]
        values = calls.begin(reward, reward_inputs(completions, [QUESTION])).of(range(len(texts))).tolist()
    finally:
        calls.close()
    return [None if value != value else pytest.approx(value) for value in values]


def test_marks_stand_where_their_completions_do(server, monkeypatch):
    """Many at the same time, within the bound, the first ones slowest."""
    server.seconds = 0.02
    texts = [f"{number} {'yes' if number % 3 else 'no'}" for number in range(24)]
    assert marks(server, texts, concurrency=5, model="its-name") == [1.0 if number % 3 else 0.2 for number in range(24)]
    assert 1 < server.most <= 5
    assert len(server.asked) == 24
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["authorization"]) == ("its-name", 0, None)
    for part in ("Question: Why?", "Right answer: Because", "be kind", "from 0 (useless) to 10"):
        assert part in asked["messages"][0]["content"]
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server.seconds = 0
    marks(server, ["yes"])
    assert (server.asked[-1]["model"], server.asked[-1]["authorization"]) == ("a-judge", "Bearer a-key")


@pytest.mark.parametrize(
    ("reply", "scale", "mark"),
    [
        ("Mark: 7", 10, 0.7), ("7", 10, 0.7), ("7/10", 10, 0.7), ("**Score:** 4.5\n", 5, 0.9), ("Rating = 5", 5, 1.0),
        ("<think>Score: 2? no.</think> Mark: 3", 4, 0.75), ("Mark: 11", 10, None), ("Mark: -1", 10, None),
        ("I give it 7 of 10 for 3 reasons", 10, None), ("", 10, None), ("remark: 3", 10, None),
    ],
)  # fmt: skip
def test_marks_in_replies(reply, scale, mark):
    assert read_mark(reply, scale) == (mark if mark is None else pytest.approx(mark))


def test_a_busy_server_is_asked_again_and_a_refusal_is_told(server):
    replies = iter([(503, "busy"), (429, "slowly"), "Mark: 5", "no mark"])
    server.reply = lambda prompt: next(replies)
    assert marks(server, ["a", "b"], concurrency=1) == [0.5, None]
    for reply, said in (
        ((400, "no such\nmodel"), "status 400: no such"),
        ((500, "on fire"), "status 500: on fire"),
        ((200, "{}"), "replied {}, no chat completion"),
        ((200, '{"choices": null}'), "no chat completion"),
        ((200, '{"choices": []}'), "no chat completion"),
        ((200, "[]"), "no chat completion"),
        (7, "no chat completion"),
        ({"text": "Mark: 7"}, "no chat completion"),
        (["Mark: 7"], "no chat completion"),
        ([{"type": "text", "text": 7}], "no chat completion"),
        ((200, "no json"), "Expecting value"),
        ((200, "<html></html>"), "Expecting value"),
        ((200, 100_000 * "["), "recursion"),
        ((302, "elsewhere"), "status 302: elsewhere"),
    ):
        server.reply = lambda prompt, reply=reply: reply
        with pytest.raises(
            RewardError, match=rf"reward 'judge' raised JudgeError\(.*{said}.* for a completion of item 'a': 'x'"
        ):
            marks(server, ["x"])


@pytest.mark.parametrize(
    ("content", "mark"),
    [
        (None, None),
        ([{"type": "text", "text": "Mark"}, {"type": "image_url"}, {"type": "text", "text": ": 7"}], 0.7),
        ([], None),
    ],
)
def test_a_reply_may_be_in_parts_or_say_nothing(server, content, mark):
    server.reply = lambda prompt: content
    assert marks(server, ["x"]) == [mark]


def test_a_body_that_breaks_off_is_a_judge_that_cannot_be_asked(server, monkeypatch):
    """Of an error too, which is read after the status is known."""
    monkeypatch.setattr(judge_module, "_TRIES", 1)
    for status in (200, 500):
        server.reply = lambda prompt, status=status: (status, "{", 100)
        with pytest.raises(RewardError, match=r"raised JudgeError\('http.*IncompleteRead"):
            marks(server, ["x"])


def test_a_judge_is_asked_once_before_anything_takes_long(server):
    judge = Judge(JudgeSettings(server.url))
    judge.check([Question("b", "Which?", "one", ("one", "two")), Question("c", "Why?", rule="refusal"), QUESTION])
    assert ["Question: Why?" in asked["messages"][0]["content"] for asked in server.asked] == [True]
    assert judge.find_model() == "a-judge"
    with pytest.raises(UserError, match=rf"--judge-url {server.url}: has no effect, as all items have choices or a rule"):
        judge.check([Question("b", "Which?", "one", ("one", "two"))])
    server.reply = lambda prompt: (404, "no such\nmodel")
    with pytest.raises(UserError, match=rf"--judge-url {server.url}: cannot be asked \(.*: status 404: no such"):
        judge.check([QUESTION])


def test_what_marks_depend_on_is_described_by_the_judge_its_scale_and_what_it_is_told(server, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ answer }}{% for turn in question.turns %}{{ turn.text }}{% endfor %}")
    settings = JudgeSettings(server.url, template=path)
    described = Judge(settings).describe()
    assert described.startswith("a-judge, ")
    path.write_text("{{ answer }}{% for turn in question.turns %}{{ turn.role }}{% endfor %}")
    others = [settings, JudgeSettings(server.url), JudgeSettings(server.url, "b"), JudgeSettings(server.url, scale=5.0)]
    assert len({described, *(Judge(other).describe() for other in others)}) == 5
    # An address is where a judge is, not which.
    assert Judge(JudgeSettings("http://elsewhere", "a-judge", path)).describe() == Judge(settings).describe()


def test_the_conversation_before_a_question_is_told(server):
    turns = (Turn("user", "I fell."), Turn("assistant", "How come?"))
    shown = Judge(JudgeSettings(server.url)).prompt(Question("a", "Ice. What now?", turns=turns), "Rest.")
    said = "Said before by the user: I fell.\nSaid before by the assistant: How come?\nQuestion: Ice. What now?\n"
    assert said in shown
    assert "Said before" not in Judge(JudgeSettings(server.url)).prompt(QUESTION, "Rest.")


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(judge_module, "_WAIT", 0.0)
    absent = JudgeServer()
    absent.server_close()
    with pytest.raises(RewardError, match=r"raised JudgeError\('http://127.0.0.1:\d+/v1/models: .*refused"):
        marks(absent, ["x"])


def test_templates(server, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Grade {{ answer }} for {{ question.category }}{{ question.rubric }} up to {{ scale }}.")
    server.reply = lambda prompt: "Mark: 1"
    assert marks(server, ["x"], template=path, scale=2.0) == [0.5]
    assert server.asked[-1]["messages"][0]["content"] == "Grade x for be kind up to 2."
    for text, said in (
        ("{{ answers }}", "cannot be used .'answers' is undefined.; it may name"),
        ("{% for %}", "cannot be used"),
        ("{{ answer }}{{ 1/0 }}", "cannot be used .division by zero.; it may name"),
        ("{{ answer }}{{ question.text + 1 }}", "cannot be used .can only concatenate"),
        ("{{ answer }}{% include 'x' %}", "cannot be used .no loader"),
        ("{{ answer }}{{ range(10**9) }}", "cannot be used .Range too big"),
        ("grade", "leaves the answer out; write {{ answer }}"),
        (None, "cannot be used .*No such file"),
    ):
        path.unlink(missing_ok=True) if text is None else path.write_text(text)
        with pytest.raises(UserError, match=f"--judge-template {path}: {said}") as failure:
            Judge(JudgeSettings("http://x", template=path))
        assert "\n" not in str(failure.value)
    # What only some questions have.
    path.write_text("{{ answer }}{% if question.rubric %}{{ question.turns[0].text }}{% endif %}")
    with pytest.raises(RewardError, match=rf"JudgeError\(.--judge-template {path}: .*has no element 0"):
        marks(server, ["x"], template=path)
