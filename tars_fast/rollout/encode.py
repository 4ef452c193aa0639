"""Recordings of a batch into prompts; one that cannot be used costs no other."""

from __future__ import annotations

from collections.abc import Sequence

from tars_fast.models.speech_model import PreparedPrompt, SpeechModel
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.types import Modality, Prompt, Question, UserError


def prepare_speech(
    model: SpeechModel, questions: Sequence[Question], instruction: str | None = None
) -> list[PreparedPrompt | UserError]:
    """Spoken prompts before the tower hears them, or why a recording cannot be used.

    Args:
        instruction: see `PromptFormat.render`.
    """

    def prepare(question: Question) -> PreparedPrompt | UserError:
        try:
            return model.prepare(question, Modality.SPEECH, instruction)
        except UserError as error:
            return error

    return [prepare(question) for question in questions]


def encode_speech(
    model: SpeechModel, engine: RolloutEngine, prepared: Sequence[PreparedPrompt | UserError], max_new_tokens: int
) -> list[Prompt | UserError]:
    """Spoken prompts, or for each that cannot be used the reason; one bad recording does not cost the others."""
    usable = {number: one for number, one in enumerate(prepared) if isinstance(one, PreparedPrompt)}
    made: dict[int, Prompt | UserError] = {number: one for number, one in enumerate(prepared) if isinstance(one, UserError)}
    try:
        made |= zip(usable, model.encode(list(usable.values())), strict=True)
    except UserError:
        for number, one in usable.items():
            try:
                (made[number],) = model.encode([one])
            except UserError as error:
                made[number] = error
    for number in usable:
        prompt = made[number]
        if isinstance(prompt, Prompt) and (reason := engine.refusal(prompt, max_new_tokens)) is not None:
            made[number] = UserError(reason)
    return [made[number] for number in range(len(prepared))]
