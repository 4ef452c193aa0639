"""Reading answers (docs/method.md, Rewards): what counts as stated, and that nothing is ever guessed."""

from __future__ import annotations

import pytest
import torch

from tars_fast.learning.rewards.answers import extract_answer, has_format
from tars_fast.learning.rewards.total import completion_rewards, total_reward
from tars_fast.types import Completion, Modality, Question

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
