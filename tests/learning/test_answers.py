"""Reading answers (docs/method.md, Rewards): what counts as stated, and that nothing is ever guessed."""

from __future__ import annotations

import pytest
import torch

from tars_fast.learning.rewards.answers import extract_answer, has_format, keeps_format, numbers_in, read_answer, same_text
from tars_fast.learning.rewards.total import completion_rewards, total_reward
from tars_fast.models.prompt_settings import PLAIN
from tars_fast.types import AnswerFormat, Completion, Modality, Question

LETTERS = ("A", "B", "C", "D")
NUMBERS = ("six", "seven", "sixteen", "seventy", "twenty")
"""Three of them begin another one, shorter ones first: the order in which a plain alternation would go wrong."""

THINKING = "<think> three plus six is nine </think>"


@pytest.mark.parametrize(
    ("completion", "choices", "answer"),
    [
        pytest.param(f"{THINKING} <answer> The answer is B. </answer>", LETTERS, "B", id="letter"),
        pytest.param(f"{THINKING} <answer> The answer is D </answer>", LETTERS, "D", id="last letter of the set"),
        pytest.param(f"{THINKING} <answer> The answer is seven. </answer>", NUMBERS, "seven", id="number word"),
        pytest.param("<answer>The answer is (C).</answer>", LETTERS, "C", id="in parentheses"),
        pytest.param("<answer>The answer is **C**</answer>", LETTERS, "C", id="in bold"),
        pytest.param('<answer>The answer is "seven"</answer>', NUMBERS, "seven", id="in quotes"),
        pytest.param("<answer>The correct answer is: [C]</answer>", LETTERS, "C", id="colon and brackets"),
        pytest.param("<answer>So the answer is C.</answer>", LETTERS, "C", id="inside a sentence"),
        pytest.param("<answer>\nWell.\nThe answer is\nC.\n</answer>", LETTERS, "C", id="over several lines"),
        pytest.param("<answer>The answer is C. Again: the answer is C.</answer>", LETTERS, "C", id="stated twice alike"),
        pytest.param("I think the answer is B, because.", LETTERS, "B", id="no tags at all"),
        pytest.param("The answer is Seven", NUMBERS, "seven", id="a word's case does not count"),
        pytest.param("The answer is C++.", ("C", "C++"), "C++", id="choices that are no plain words"),
        pytest.param("The answer is ice cream.", ("ice", "ice cream"), "ice cream", id="choices of several words"),
        # Thinking may weigh other answers; only the answer block speaks.
        pytest.param(
            "<think>The answer is A? No.</think><answer>The answer is B.</answer>", LETTERS, "B", id="thinking ignored"
        ),
        pytest.param("<think>one\n\ntwo\nThe answer is A</think>\n<answer>The answer is B.</answer>", LETTERS, "B", id="lines"),
    ],
)
def test_reads_the_stated_answer(completion, choices, answer):
    assert extract_answer(completion, choices) == answer


@pytest.mark.parametrize(
    ("completion", "choices"),
    [
        pytest.param("", LETTERS, id="empty"),
        pytest.param(f"{THINKING} <answer> B </answer>", LETTERS, id="a letter, but not as The answer is"),
        pytest.param(f"{THINKING} <answer> I do not know. </answer>", LETTERS, id="no answer"),
        pytest.param("<answer>The answer is not A.</answer>", LETTERS, id="denied"),
        pytest.param("<answer>The answer is A. No, the answer is B.</answer>", LETTERS, id="two different ones"),
        pytest.param("The answer is six, or the answer is sixteen", NUMBERS, id="two different words"),
        pytest.param("<answer>The answer is E.</answer>", LETTERS, id="letter outside of the set"),
        pytest.param("<answer>The answer is eight.</answer>", NUMBERS, id="word outside of the set"),
        pytest.param("<answer>The answer is a</answer>", LETTERS, id="lower-case letter"),
        pytest.param("<answer>The answer is a hard one.</answer>", LETTERS, id="the article is no choice"),
        pytest.param("<answer>The answer is Apples.</answer>", LETTERS, id="first letter of a word"),
        pytest.param("<answer>The answer is [CHOICE].</answer>", LETTERS, id="the template itself"),
        pytest.param("<answer>The answer is sixty.</answer>", NUMBERS, id="begins with a choice"),
        pytest.param("<answer>The answer is sixteenth.</answer>", NUMBERS, id="begins with two choices"),
        # Cut off inside the answer block, or the block is there but says nothing: thinking must not stand in for it.
        pytest.param("<think>The answer is A.</think> <answer> The answer", LETTERS, id="cut off before the choice"),
        pytest.param("<think>The answer is A.</think> <answer></answer>", LETTERS, id="empty answer block"),
    ],
)
def test_never_guesses(completion, choices):
    assert extract_answer(completion, choices) is None


@pytest.mark.parametrize("choices", [NUMBERS, tuple(reversed(NUMBERS))])
@pytest.mark.parametrize("answer", NUMBERS)
def test_choice_that_begins_another_is_told_from_it(answer, choices):
    assert extract_answer(f"<answer> The answer is {answer}. </answer>", choices) == answer


def test_answer_of_a_cut_off_block_counts_as_answer_but_not_as_format():
    cut_off = f"{THINKING} <answer> The answer is B"
    assert extract_answer(cut_off, LETTERS) == "B"
    assert not has_format(cut_off, LETTERS)


@pytest.mark.parametrize(
    "completion",
    [
        "<think> a </think> <answer> The answer is B. </answer>",
        "<think>a</think><answer>The answer is B</answer>",
        "\n<think>a\n\nb\nc</think>\n\n<answer>\nAdding up.\nThe answer is B.\nThat is all.\n</answer>\n",
        "<think>The answer is A?</think> <answer>Rather: the answer is B.</answer>",
        "<think></think> <answer>The answer is B.</answer>",
    ],
)
def test_format_kept(completion):
    assert has_format(completion, LETTERS)


WELL_FORMED = "<think> a </think> <answer> The answer is B. </answer>"


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param("", id="empty"),
        pytest.param("The answer is B.", id="no tags"),
        pytest.param("<answer> The answer is B. </answer>", id="no thinking"),
        pytest.param("<think> a </think> The answer is B.", id="no answer block"),
        # "The whole completion matches", so a well-formed part of it is not enough.
        pytest.param(f"Sure! {WELL_FORMED}", id="something before"),
        pytest.param(f"{WELL_FORMED} Bye.", id="something after"),
        pytest.param(WELL_FORMED.replace("</think>", "</think> so"), id="something between"),
        pytest.param(f"{WELL_FORMED} {WELL_FORMED}", id="twice"),
        pytest.param(f"<think> a </think> {WELL_FORMED}", id="thinking twice"),
        pytest.param(f"{WELL_FORMED} <answer> The answer is B. </answer>", id="answered twice"),
        pytest.param(WELL_FORMED.replace(" a ", " <think> a "), id="nested thinking"),
        pytest.param("<answer> The answer is B. </answer> <think> a </think>", id="wrong order"),
        pytest.param(WELL_FORMED.removesuffix("</answer>"), id="answer block not closed"),
        pytest.param(WELL_FORMED.replace("</think>", ""), id="thinking not closed"),
        pytest.param(WELL_FORMED.replace("think>", "THINK>"), id="tags in capitals"),
        pytest.param(WELL_FORMED.replace("The answer is B", "B"), id="answer not stated"),
        pytest.param(WELL_FORMED.replace("B", "E"), id="choice outside of the set"),
        pytest.param(WELL_FORMED.replace("B", "b"), id="lower-case letter"),
        pytest.param(WELL_FORMED.replace("B.", "B. The answer is C."), id="two different answers"),
        pytest.param("<think> The answer is B. </think> <answer> yes </answer>", id="stated in the thinking only"),
    ],
)
def test_format_broken(completion):
    assert not has_format(completion, LETTERS)


def test_format_uses_the_task_s_own_answer_set():
    numbered = WELL_FORMED.replace("B", "sixteen")
    assert has_format(numbered, NUMBERS)
    assert not has_format(numbered, LETTERS)
    assert not has_format(WELL_FORMED, NUMBERS)


def test_base_reward_is_accuracy_plus_half_the_format():
    """Both parts are 0 or 1 (no half credit), so R_base takes exactly the values 0, 0.5, 1 and 1.5."""
    questions = [
        Question("letters", "Which?", "B", LETTERS),
        Question("numbers", "How many?", "sixteen", NUMBERS),
    ]
    # (question, text, accuracy, format, unparsed)
    table = [
        (0, WELL_FORMED, 1, 1, 0),
        (0, WELL_FORMED.replace("B", "C"), 0, 1, 0),
        (0, "The answer is B.", 1, 0, 0),
        (0, "The answer is C.", 0, 0, 0),
        (0, "<think> a </think> <answer> dunno </answer>", 0, 0, 1),
        (0, "The answer is A. The answer is B.", 0, 0, 1),
        # The letter is no answer to the second question, whose own set decides.
        (1, WELL_FORMED, 0, 0, 1),
        (1, WELL_FORMED.replace("B", "sixteen"), 1, 1, 0),
        (1, WELL_FORMED.replace("B", "six"), 0, 1, 0),
        (1, WELL_FORMED.replace("B", "sixty"), 0, 0, 1),
    ]
    completions = [Completion(question, Modality.TEXT, (5,), (0.0,), text, False) for question, text, *_ in table]
    rewards = completion_rewards(completions, questions)
    accuracy, form, unparsed = torch.tensor([row[2:] for row in table], dtype=torch.float32).T
    assert torch.equal(rewards["accuracy"], accuracy)
    assert torch.equal(rewards["format"], form)
    assert torch.equal(rewards["unparsed"], unparsed)
    base = total_reward(rewards, {"accuracy": 1.0, "format": 0.5})
    assert base.tolist() == [1.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 1.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("completion", "choices"),
    [
        pytest.param("The answer is twenty-five.", ("five", "twenty"), id="compound word"),
        pytest.param("The answer is 5.5.", ("5", "6"), id="decimal"),
        pytest.param("The answer is twenty one.", ("twenty", "one"), id="compound with a space"),
        pytest.param("The answer is A | B.", ("A", "B"), id="bar"),
        pytest.param("The answer is A or B.", ("A", "B"), id="alternatives"),
        pytest.param("The answer is A and B.", ("A", "B"), id="both"),
        pytest.param("The answer is (A) / (B).", ("A", "B"), id="slash"),
        pytest.param("<answer>The answer is A.</answer><answer>The answer is B.</answer>", ("A", "B"), id="two blocks"),
        # Letters that Unicode folds to i: matched without regard to case, but no spelling of the choice.
        pytest.param("The answer is s\u0130x.", ("six",), id="dotted capital"),
        pytest.param("The answer is f\u0131ve.", ("five",), id="dotless"),
    ],
)
def test_half_an_answer_is_none(completion, choices):
    assert extract_answer(completion, choices) is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 5.", "5"),
        ("The answer is (A), because B is too small.", "A"),
        ("<answer>The answer is A.</answer><answer>The answer is A.</answer>", "A"),
        ("the correct answer is: **B**", "B"),
    ],
)
def test_whole_answers_still_are(completion, answer):
    assert extract_answer(completion, ("A", "B", "5", "6")) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "<think>t</think> <answer>The answer is A.</answer> more </answer>",
        "<think>t</answer></think> <answer>The answer is A.</answer>",
    ],
)
def test_stray_closing_tags_break_the_format(completion):
    assert not has_format(completion, ("A", "B"))


EQUALS = AnswerFormat("equals.yaml", "End with = and the answer.", r"=\s*(?P<answer>.+?)\s*$", r".*= \S+")


@pytest.mark.parametrize(
    ("format", "completion", "answer", "keeps"),
    [
        (PLAIN, "B", "B", True),
        (PLAIN, "(B).", "B", True),
        (PLAIN, "It bleeds, so the answer is B.", "B", True),
        (PLAIN, "b", None, False),
        (PLAIN, "A or B", None, False),
        (PLAIN, "The answer is A. No, the answer is B.", None, False),
        (PLAIN, "<think> x </think> <answer> The answer is B. </answer>", "B", False),
        (EQUALS, "so it is\n= B", "B", True),
        (EQUALS, "= A = B.", "B", True),
        (EQUALS, "so = the answer is B", "B", False),
        (EQUALS, "The answer is B.", None, False),
    ],
)
def test_other_formats_are_read_as_they_say(format, completion, answer, keeps):
    question = Question("q", "Which?", "B", ("A", "B"), answer_format=format)
    if completion == "= A = B.":
        question = Question("q", "Which?", "B", ("A", "B"), answer_format=AnswerFormat("f", "", r"= (?P<answer>\w)"))
    assert (read_answer(completion, question), keeps_format(completion, question)) == (answer, keeps)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("<answer> The answer is paris. </answer>", "Paris", True),
        ("<answer> The answer is the City of  Paris! That is all. </answer>", "City of Paris", True),
        ("<answer>\nParis\n</answer>", "Paris", True),
        ("<answer> Rome </answer> <answer> Paris </answer>", "Paris", True),
        ("I think the answer is Paris", "Paris", True),
        ("<answer> The answer is Rome. </answer>", "Rome", False),
        ("<answer> Paris or Rome </answer>", "Paris or Rome", False),
        # Neither reasoning nor a text without a statement is an answer.
        ("<think> The answer is Paris. </think> <answer> </answer>", None, False),
        ("Paris", None, False),
    ],
)
def test_words_are_right_where_they_are_an_accepted_answer(completion, answer, right):
    question = Question("q", "Where?", answer_text=("Paris", "City of Paris"))
    assert read_answer(completion, question) == answer
    assert question.is_right(answer) == right
    assert keeps_format(f"<think> so </think> {completion}", question) == (
        completion.count("<answer>") == 1 and answer is not None
    )


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("The answer is 1,250.5.", 1250.5),
        ("one thousand two hundred fifty point five", 1250.5),
        ("$1250.50", 1250.5),
        ("-3/4", -0.75),
        ("\u22125 degrees", -5.0),
        ("1e3", 1000.0),
        ("3 or 4", None),
        ("3 4", None),
        ("none", None),
        ("x2", None),
        # Beyond what floats hold.
        ("1e999", None),
        ("1/" + "9" * 400, None),
        ("9" * 5000, None),
        ("1/" + "9" * 5000 + " or 7", 7.0),
    ],
)
def test_a_number_is_read_where_it_is_the_only_one(said, number):
    question = Question("q", "How many?", answer_number=1250.5)
    answer = read_answer(f"<answer> {said} </answer>", question)
    assert answer == (None if number is None else repr(number))
    assert question.is_right(answer) == (number == 1250.5)
    assert Question("q", "?", answer_number=1e6).is_right("1000000.5")
    assert not Question("q", "?", answer_number=1e6).is_right("1000002")


def test_texts_differ_by_more_than_case_punctuation_and_articles():
    assert same_text("The  Eiffel-Tower", "eiffel tower.")
    assert not same_text("Eiffel", "Eiffel tower")
    assert same_text("+", " + ")
    assert not same_text("+", "-")
    assert not same_text("A", "the")
    assert numbers_in("two of 3") == [3.0], "words count where there are no digits"
