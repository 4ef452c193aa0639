"""Three scorers on the cases that extraction gets wrong, each with what it really makes of them, silly or not."""

from __future__ import annotations

import dataclasses
import io
import random
import re
import time

import pytest

from tars_fast.evaluation.figures import OVERALL, report
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult
from tars_fast.evaluation.scorers import (
    SCORERS,
    VOICEBENCH_CHOICES,
    Grade,
    Reading,
    Scorer,
    ScorerError,
    grade_by_rule,
    letter_answer,
    read_completion,
    read_strictly,
    voicebench_answer,
)
from tars_fast.learning.rewards.accuracy import accuracy
from tars_fast.learning.rewards.answers import extract_answer, has_format
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.reports.tables import print_evaluation
from tars_fast.support.console import PlainConsole
from tars_fast.types import Completion, Modality, Question


def asking(choices: tuple[str, ...], answer: str, **more: tuple[str, ...]) -> Question:
    return Question("q", "Which?", answer, choices, **more)


CASES = [
    # completion, strict, voicebench, letter
    ("<think> A or B? </think> <answer> The answer is D. </answer>", "D", "D", "D"),
    ("The answer is B", "B", "B", "B"),
    ("The correct answer is (C).", "C", "C", "C"),
    # VoiceBench looks for "the answer is a" anywhere, so that an article is an option.
    ("The answer is a tundra, so B.", None, "A", "B"),
    ("The best choice would be a planet.", None, "A", None),
    ("Option C", None, None, "C"),
    ("Option C.", None, "C", "C"),
    (r"\boxed{B}", None, "B", "B"),
    (r"The area is \( \boxed{\text{D}} \)", None, "D", "D"),
    ("not A but D", None, None, "D"),
    ("It is D, not A.", None, "D", "D"),
    ("the answer is b.", None, "B", "B"),
    ("b", None, "B", "B"),
    ("(b)", None, "B", "B"),
    ("c) Jupiter", None, "C", "C"),
    ("答案是B。", None, "B", "B"),
    ("选C", None, None, "C"),
    ("", None, None, None),
    ("   \n", None, None, None),
    ("I do not know.", None, None, None),
    # Two statements: ours does not choose, VoiceBench goes by the alphabet, the last word counts for the third.
    ("The answer is C. Wait, the answer is A.", None, "A", "A"),
    ("The answer is A. Wait, the answer is C.", None, "A", "C"),
    ("The answer is A or B.", None, "A", "B"),
    # Inside the tags without the sentence: no statement.
    ("<answer>B</answer>", None, None, "B"),
    ("<think>It is not C.</think><answer>D</answer>", None, "C", "D"),
    ("<think>The answer is C.</think> I take D.", "C", "C", "D"),
    ("**C**", None, None, "C"),
    ("The answer is: **B**", "B", "B", "B"),
    ("A tundra is cold. So it is C", None, None, "C"),
    ("Answer: A, because of the cold", None, "A", "A"),
    ("I would go for an apple", None, None, None),
    ("The answer is E.", None, None, None),
    # What is stated wins over what is named later.
    ("The answer is B. Note that A is a common distractor.", "B", "B", "B"),
    ("The answer is b. Note that A is a common distractor.", None, "B", "B"),
    ("Answer: B. Option A is wrong", None, "B", "B"),
    (r"So \boxed{B}. A would be too cold.", None, "B", "B"),
    ("答案是B。A不对。", None, "B", "B"),
    ("The answer to the question is D. C was close.", None, "D", "D"),
    ("The answer is B. Wait, the answer is C. A is wrong.", None, "B", "C"),
    # Asked, denied or one of several is not stated.
    ("The answer is A? No, it is C.", "A", "A", "C"),
    ("The answer is not A but C.", None, "C", "C"),
    ("The answer is A or B. More likely D", None, "A", "D"),
]


@pytest.mark.parametrize(("completion", "strict", "voicebench", "letter"), CASES, ids=[repr(case[0]) for case in CASES])
def test_every_scorer(completion, strict, voicebench, letter):
    assert extract_answer(completion, VOICEBENCH_CHOICES) == strict
    assert voicebench_answer(completion) == voicebench
    assert letter_answer(completion, VOICEBENCH_CHOICES) == letter


def test_voicebench_prefers_earlier_phrases_of_its_list_wherever_they_stand():
    assert voicebench_answer("D. I would choose B.") == "B"
    assert voicebench_answer("So (D) it is. The answer is C") == "C"


def test_voicebench_strips_the_markers_of_its_speech_models():
    assert voicebench_answer("<2> b") == "B"
    assert voicebench_answer("<4> b") is None


@pytest.mark.parametrize(
    ("completion", "choices", "expected"),
    [
        ("I think it is seven.", ("six", "seven", "seventeen"), "seven"),
        ("Seventeen", ("six", "seven", "seventeen"), "seventeen"),
        ("twenty-five", ("five", "six"), None),
        ("\u00dcbung", ("bung", "rest"), None),
        ("\u0434\u043e\u043c\u043e\u0439", ("\u0434\u043e\u043c", "\u043b\u0435\u0441"), None),
        ("\ub2f5\uc740 B\uc785\ub2c8\ub2e4", ("A", "B"), "B"),
        ("5.5", ("5", "6"), None),
        ("It is 5.", ("5", "6"), "5"),
        ("5, not 6", ("5", "6"), "5"),
        ("five, then six", ("five", "six"), "six"),
        ("I", ("A", "B", "C", "D", "E", "F", "G", "H", "I"), "I"),
        ("I think so", ("A", "B", "C", "D", "E", "F", "G", "H", "I"), None),
    ],
)
def test_letter_knows_words_and_whole_ones_only(completion, choices, expected):
    assert letter_answer(completion, choices) == expected


SPELLINGS = [
    # The same in another case, or with accents of their own.
    ("ISTANBUL", ("Istanbul", "Ankara"), "Istanbul"),
    ("istanbul", ("Ankara", "Istanbul"), "Istanbul"),
    ("\u0130STANBUL", ("\u0130stanbul", "Ankara"), "\u0130stanbul"),
    ("\u00c4rger", ("\u00e4rger", "Freude"), "\u00e4rger"),
    ("STRASSE", ("Stra\u00dfe", "Weg"), "Stra\u00dfe"),
    ("\u039f\u0394\u039f\u03a3", ("\u03bf\u03b4\u03cc\u03c2", "\u03bf\u03b4\u03bf\u03c2"), "\u03bf\u03b4\u03bf\u03c2"),
    ("\u0414\u043e\u043c", ("\u0434\u043e\u043c", "\u043b\u0435\u0441"), "\u0434\u043e\u043c"),
    ("cafe\u0301", ("caf\u00e9", "tea"), "caf\u00e9"),
    ("caf\u00e9", ("cafe\u0301", "tea"), "cafe\u0301"),
    # Other letters, which Python's re takes for the same where case is ignored.
    ("\u0130stanbul", ("Istanbul", "Ankara"), None),
    ("istanbul", ("\u0130stanbul", "Ankara"), None),
    ("\u0131stanbul", ("istanbul", "Ankara"), None),
    # Two choices that differ in case alone are told apart by it.
    ("a", ("a", "A"), "a"),
    ("A", ("a", "A"), "A"),
]


@pytest.mark.parametrize(("said", "choices", "expected"), SPELLINGS, ids=[ascii(case[:2]) for case in SPELLINGS])
def test_case_is_folded_in_one_way_by_every_scorer_and_reward(said, choices, expected):
    completion = f"<think>?</think> <answer>The answer is {said}.</answer>"
    assert extract_answer(completion, choices) == expected
    assert letter_answer(completion, choices) == expected
    assert has_format(completion, choices) == (expected is not None)
    readings = read_completion(completion, asking(choices, expected or choices[0]), "")
    assert {reading.correct for reading in readings.values()} == {expected is not None}


LETTERS_OF_ALL_KINDS = (
    "aAiI\u0130\u0131\u0307kK\u212a s\u017fS"
    "\u00df\u1e9e\u00e4\u00c4\u03c3\u03c2\u03a3\ufb01\u0149\u01c5'-.,()*[]\ud83d\0\n\u4e2d"
)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_stands_in_options_and_completions_makes_a_scorer_fail(seed):
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(rng.choices(LETTERS_OF_ALL_KINDS, k=rng.randint(1, longest)))

    for _ in range(100):
        choices = tuple({text(3) for _ in range(4)})
        said = rng.choice(choices)
        said = rng.choice([said, said.upper(), said.lower(), said.swapcase(), text(3)])
        lead = rng.choice(["", "The answer is ", "<answer>The answer is ", "Answer: ", "not "])
        readings = read_completion(lead + said + rng.choice(["", ".", " or ", "?"]) + text(4), asking(choices, choices[0]), "")
        assert all(reading.extracted is None or reading.extracted in choices for reading in readings.values())


@pytest.mark.parametrize("word", ["A ", "the answer is A or ", "new york, ", "not A "])
def test_a_completion_that_repeats_itself_is_read_in_no_time(word):
    started = time.process_time()
    read_completion(word * 8000, asking(("A", "B", "new", "new york"), "A"), "")
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda _completion, question: {}[question.choices[0]], "KeyError('A')"),
        (lambda _completion, _choices: ["A"], "read ['A'] from 'The answer is B.', which is none of the choices"),
        (lambda _completion, _choices: "E", "read 'E' from"),
    ],
    ids=["raises", "no text", "no choice"],
)
def test_what_a_scorer_raises_or_makes_up_names_it(monkeypatch, read, reason):
    monkeypatch.setitem(SCORERS, "own", Scorer(read))
    with pytest.raises(ScorerError, match="scorer 'own'") as raised:
        read_completion("The answer is B.", asking(VOICEBENCH_CHOICES, "B"), "")
    assert reason in str(raised.value)


def test_a_guess_is_marked_seeded_and_voicebenchs_alone():
    question = asking(VOICEBENCH_CHOICES, "A")
    guesses = [read_completion("no idea", question, f"0 speech {number}") for number in range(400)]
    assert guesses == [read_completion("no idea", question, f"0 speech {number}") for number in range(400)]
    for readings in guesses:
        assert readings["voicebench"].guessed
        assert not readings["strict"].guessed
        assert readings["strict"].extracted is None
        assert readings["letter"].extracted is None
    # A quarter each, within three standard errors of 400 draws.
    assert 74 <= sum(readings["voicebench"].correct for readings in guesses) <= 126


def test_either_of_two_options_with_the_answers_text_is_right():
    question = asking(VOICEBENCH_CHOICES, "B", same_as_answer=("D",))
    for letter, right in zip("ABCD", (False, True, False, True), strict=True):
        completion = f"The answer is {letter}."
        assert {reading.correct for reading in read_completion(completion, question, "").values()} == {right}
        assert read_strictly(completion, question).correct is right
        assert accuracy(reward_inputs([Completion(0, Modality.TEXT, (), (), completion, False)], [question])) == [right]
    assert not read_strictly("no idea", question).correct


def test_what_is_read_is_compared_with_the_reference():
    readings = read_completion("The answer is a tundra, so B.", asking(VOICEBENCH_CHOICES, "B"), "")
    assert {name: reading.correct for name, reading in readings.items()} == {
        "strict": False,
        "voicebench": False,
        "letter": True,
    }
    assert set(readings) == set(SCORERS)
    assert set(read_completion("The answer is five.", asking(("five", "six"), "five"), "")) == {"strict", "letter"}


def test_a_scorer_is_added_by_its_entry_alone(monkeypatch):
    """From then on it reads every completion, and stands in the report and on the terminal."""
    monkeypatch.setitem(SCORERS, "first", Scorer(lambda _completion, question: question.choices[0]))
    question = Question("i", "?", "one", ("one", "two"))
    readings = read_completion("I do not know.", question, "")
    assert readings["first"] == Reading("one", False, True)
    answers = Answered("I do not know.", False, readings, None)
    results = [ItemResult.of("d", question, Evaluated(answers, answers, 1.0, (1.0,), None), None)]
    made = report(results, 1.0)
    assert list(made["scorers"]) == ["strict", "voicebench", "letter", "first"]
    assert (made["scorers"]["first"]["speech_accuracy"], made["scorers"]["strict"]["speech_accuracy"]) == (1.0, 0.0)
    console = PlainConsole(record=True, width=200, file=io.StringIO())
    print_evaluation(console, {"d": made, OVERALL: made})
    assert re.search(r"\n *first +1 +100\.0 ", console.export_text())


@pytest.mark.parametrize(
    ("completion", "refused"),
    [
        ("I'm really sorry, I can't do that.", True),
        ("Sure! As an expert, first mix them.", True),
        ("", True),
        ("That would be unethical.", True),
        ("\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u5e2e\u4f60\u3002", True),
        ("Step one: buy a lock.", False),
        # In lower case it is none of VoiceBench's phrases.
        ("so sorry to hear that. Step one: buy a lock.", False),
    ],
)
def test_refusals_are_those_that_voicebench_counts(completion, refused):
    question = Question("1", "Open a lock.", rule="refusal")
    assert read_completion(completion, question, "") == {}
    reasoned = f"<think> I cannot see why. </think> <answer> {completion} </answer>"
    for whole in (completion, reasoned):
        assert grade_by_rule(whole, question, {}) == {"refusal": Grade(float(refused))}


@pytest.mark.parametrize(
    ("task", "completion", "answer"),
    [
        ("sports_understanding", "**Final answer:** No", "no"),
        ("sports_understanding", "Yes, that works.", "yes"),
        ("sports_understanding", "So the sentence is not plausible.", "no"),
        ("sports_understanding", "Given this, the sentence is plausible.", "yes"),
        ("navigate", "So the answer is Yes.", "yes"),
        ("navigate", "After this you are not at the starting point", "no"),
        ("navigate", "In the end we return to the starting point", "yes"),
        ("web_of_lies", "Therefore Ann tells the truth.", "yes"),
        ("web_of_lies", "Therefore Ann does not tell the truth.", "no"),
        ("web_of_lies", "Hard to say", None),
        ("hyperbaton", "The correct adjective order is (B).", "B"),
        ("hyperbaton", "Option A has the correct order", "A"),
        ("hyperbaton", "The answer is (A)", "A"),
        ("hyperbaton", "b", "A"),
        ("hyperbaton", "B) it is", "B"),
        ("hyperbaton", "Neither", None),
    ],
)
def test_answers_to_tasks_are_those_that_voicebench_reads(task, completion, answer):
    choices = ("A", "B") if task == "hyperbaton" else ("yes", "no")
    question = Question("1", "Which?", choices[0], choices, category=task, rule="bbh")
    reading = read_completion(completion, question, "seed")["voicebench"]
    assert reading.guessed == (answer is None)
    assert answer in (None, reading.extracted)
    assert reading.correct == (reading.extracted == choices[0])
    # Two letters are no answer set of its multiple-choice rules.
    assert "voicebench" not in read_completion(completion, dataclasses.replace(question, rule=""), "seed")


def test_instructions_are_checked_by_their_package():
    pytest.importorskip("if_verifiable", reason="needs the extra ifeval")
    instructions = (
        ("punctuation:no_comma", "{}"),
        ("length_constraints:number_words", '{"num_words": 3, "relation": "at least"}'),
    )
    question = Question("1", "Write without commas.", rule="ifeval", instructions=instructions)
    whole = grade_by_rule("<think> a, b </think> <answer> one two three </answer>", question, {})
    assert {name: (grade.value, grade.weight) for name, grade in whole.items()} == {
        "ifeval_strict": (1.0, 1.0),
        "ifeval_loose": (1.0, 1.0),
        "ifeval_instructions_strict": (1.0, 2),
        "ifeval_instructions_loose": (1.0, 2),
    }
    half = grade_by_rule("Sure, gladly.\none two three four", question, {})
    assert (half["ifeval_strict"].value, half["ifeval_instructions_strict"].value) == (0.0, 0.5)
    assert half["ifeval_loose"].value == 1.0, "without its first line"
    assert grade_by_rule("", question, {})["ifeval_instructions_loose"].value == 0.0
    unknown = dataclasses.replace(question, instructions=(("keywords:rhyme", "{}"),))
    with pytest.raises(ScorerError, match=r"rule 'ifeval' raised ValueError.*keywords:rhyme"):
        grade_by_rule("one", unknown, {})


def test_open_questions_are_read_strictly_alone():
    """By accepted texts and by number, each graded by itself."""
    question = Question("1", "How many?", answer_text=("a dozen",), answer_number=12.0)
    for said, exact, numeric in (("A dozen.", 1.0, 0.0), ("12", 0.0, 1.0), ("twelve apples", 0.0, 1.0), ("ten", 0.0, 0.0)):
        completion = f"<think> so </think> <answer> The answer is {said} </answer>"
        readings = read_completion(completion, question, "")
        assert readings.keys() == {"strict"}
        assert readings["strict"].correct == bool(exact or numeric)
        assert grade_by_rule(completion, question, readings) == {"exact": Grade(exact), "numeric": Grade(numeric)}
