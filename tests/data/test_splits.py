"""Splits by a hash of the id, and items that are in two of them."""

from __future__ import annotations

import pytest

from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions, shown_options
from tars_fast.data.splits import check_leaks, choose_by_id, split_by_id, without_leaks
from tars_fast.types import Question, UserError


def question(name: str, text: str = "") -> Question:
    return Question(name, text or f"What is {name}?", "one", ("one", "two"))


def test_split_follows_the_hash_of_the_id():
    """The SHA-256 of `a` begins with ca97, that of `b` with 3e23: 0.791 and 0.243 of the way from 0 to 1."""
    a, b = question("a"), question("b")
    assert split_by_id([a, b], 0.25) == ([a], [b])
    assert split_by_id([b, a], 0.79) == ([a], [b])
    for fraction in (0.24, 0.8):
        with pytest.raises(UserError, match="2 items leave nothing to train or to evaluate on; give --eval-data"):
            split_by_id([a, b], fraction)


def test_split_is_stable_under_reordering_and_additions():
    questions = [question(f"item-{number}") for number in range(1000)]
    training, held_out = split_by_id(questions, 0.1)
    assert {q.id for q in training}.isdisjoint(q.id for q in held_out)
    assert len(training) + len(held_out) == 1000
    assert 60 < len(held_out) < 140  # 100, give or take four binomial deviations of 9.5
    reversed_training, reversed_held_out = split_by_id(questions[::-1], 0.1)
    assert (reversed_training[::-1], reversed_held_out[::-1]) == (training, held_out)
    added = [question(f"added-{number}") for number in range(500)]
    more_training, more_held_out = split_by_id([*added, *questions], 0.1)
    assert set(training) < set(more_training)
    assert set(held_out) < set(more_held_out)


def test_recordings_of_one_question_stay_on_one_side():
    items = [question(f"{voice}-{number}", f"What is {number}?") for number in range(40) for voice in "abc"]
    training, held_out = split_by_id(items, 0.3)
    check_leaks(training, held_out)
    assert len(held_out) % 3 == 0
    assert 0 < len(held_out) < 60
    assert split_by_id(items[::-1], 0.3)[1] == held_out[::-1]


def test_some_items_are_chosen_by_id_whatever_their_order():
    questions = [Question(f"q{number}", f"What is {number}?", "A", ("A", "B")) for number in range(50)]
    chosen = choose_by_id(questions, 10)
    assert len(chosen) == 10
    assert chosen != questions[:10]
    assert [question for question in questions if question in chosen] == chosen, "in their order"
    assert set(choose_by_id(questions[::-1], 10)) == set(chosen)
    assert set(choose_by_id(questions, 9)) < set(chosen)
    assert choose_by_id(questions, None) == choose_by_id(questions, 99) == questions


def test_leaks_are_found_by_id_and_by_text():
    training = [question("t1"), question("t2", "What is two plus two?\nA. four\nB. five")]
    check_leaks(training, [question("e1"), question("e2", "What is two plus two?\nA. four\nB. six")])
    with pytest.raises(UserError, match="item 't1' is in both training and evaluation data; remove it from one"):
        check_leaks(training, [question("e1"), question("t1", "Something else entirely?")])
    # Case, punctuation and layout do not make another question.
    with pytest.raises(UserError, match="evaluation item 'e2' asks what training item 't2' asks; remove it from one"):
        check_leaks(training, [question("e2", "  what is TWO plus two\n A: four;\n B: five. ")])


def test_signs_make_another_question():
    check_leaks([question("a", "What is 3 + 4?")], [question("b", "What is 3 - 4?")])


def test_lines_that_a_question_letters_itself_are_part_of_it():
    statements = "Who won?\nA. Anna\nB. Ben"
    assert shown_options(question("a", statements)) == (statements, [])
    turned = "Who won?\nA. Ben\nB. Anna"
    check_leaks([question("a", statements)], [question("b", turned)])
    # Where they are what is answered, their order makes no difference.
    for answers in (("A", "B"), ("Ben", "Anna")):
        with pytest.raises(UserError, match="'b' asks what training item 'a' asks"):
            check_leaks([Question("a", statements, answers[0], answers)], [Question("b", turned, answers[0], answers)])


def test_bundled_items_do_not_leak():
    held_out, training = load_questions(HELD_OUT_DATA), load_questions(TRAINING_DATA)
    assert len(training) >= 800
    assert len(held_out) >= 400
    check_leaks(training, held_out)
    check_leaks(training, load_questions(VALIDATION_DATA))
    check_leaks(load_questions(VALIDATION_DATA), held_out)


def test_leaks_are_left_out():
    items = [question("a"), question("b"), question("c", "What  is b"), question("d")]
    assert without_leaks(items, [question("x", "what is B?"), question("d", "Something else?")]) == items[:1]
    assert without_leaks(items, []) == items
