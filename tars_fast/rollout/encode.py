"""Spoken prompts of a batch, with their audio embeddings; a recording that cannot be used does not fail the others."""

from __future__ import annotations

from collections.abc import Sequence

from tars_fast.models.speech_model import PreparedPrompt, SpeechModel
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.types import Modality, Prompt, Question, UserError


def prepare_speech(
    model: SpeechModel, questions: Sequence[Question], instruction: str | None = None
) -> list[PreparedPrompt | UserError]:
    """All of the spoken prompts that needs no weights; for each item whose recording cannot be used, the reason instead.

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
    """Spoken prompts with their audio embeddings, in order; for each that cannot be used, the reason instead.

    Args:
        prepared: of `prepare_speech`.
        max_new_tokens: of the completions that are to follow, for which the engine must have room.
    """
    usable = {number: prompt for number, prompt in enumerate(prepared) if isinstance(prompt, PreparedPrompt)}
    results: dict[int, Prompt | UserError] = {
        number: error for number, error in enumerate(prepared) if isinstance(error, UserError)
    }
    try:
        results |= zip(usable, model.encode(list(usable.values())), strict=True)
    except UserError:
        # One by one, to find those at fault.
        for number, prepared_prompt in usable.items():
            try:
                (results[number],) = model.encode([prepared_prompt])
            except UserError as error:
                results[number] = error
    for number in usable:
        prompt = results[number]
        if isinstance(prompt, Prompt) and (reason := engine.refusal(prompt, max_new_tokens)) is not None:
            results[number] = UserError(reason)
    return [results[number] for number in range(len(prepared))]
