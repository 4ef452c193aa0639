"""Greedy and sampled evaluation of a model on spoken and written versions of the same items (METHOD, Metrics)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tars_kernels import LayerPooler, pooled_similarity

from tars_fast.data.transcription import word_error_rate
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult, Transcribed
from tars_fast.evaluation.scorers import read_completion
from tars_fast.learning.rewards import TextSimilarity, answer_rewards
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.memory import EVALUATION_TOKENS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.types import Completion, Modality, Prompt, Question, UserError

ITEMS_AT_ONCE = 128
"""Most items that a process answers at a time, so also what an interruption costs it; at 7B and 30 s they embed to 0.8 GB."""
_FEWEST_AT_ONCE = 32
_SLICES = 8
"""Of a small data set, so that as many processes have something to do."""
_MOST_ITEMS_PER_FORWARD = 16
TRANSCRIBE = "Transcribe the recording word for word."


@dataclass(frozen=True)
class EvaluationSettings:
    """How items are answered."""

    max_new_tokens: int
    num_samples: int
    """Sampled completions of each prompt; 0 leaves them out."""
    temperature: float
    """Of the sampled completions."""
    seed: int
    """Of the sampled completions, and of VoiceBench's guesses."""
    transcribe: bool = False
    """Also have every recording transcribed; every question needs a transcript."""


@torch.inference_mode()
def layer_cosines(
    model: SpeechModel, prompts: Mapping[Modality, Sequence[Prompt]], completions: Mapping[Modality, Sequence[Completion]]
) -> np.ndarray:
    """[I, L] cosine between the pooled states of an item's spoken and written completions, each under its own prompt."""
    pooler = LayerPooler(model.language_model.layers, model.language_model.norm)
    num_items = len(prompts[Modality.SPEECH])
    width = max(
        len(prompt.token_ids) + len(completion.token_ids)
        for modality in Modality
        for prompt, completion in zip(prompts[modality], completions[modality], strict=True)
    )
    items_per_forward = min(_MOST_ITEMS_PER_FORWARD, max(1, EVALUATION_TOKENS // (2 * width)))
    rows = []
    for start in range(0, num_items, items_per_forward):
        items = slice(start, start + items_per_forward)
        chosen_prompts = [prompt for modality in Modality for prompt in prompts[modality][items]]
        layout = model.pack(chosen_prompts, [c for modality in Modality for c in completions[modality][items]])
        with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
            model.forward(layout)
        count = len(chosen_prompts) // 2
        pairs = torch.stack([torch.arange(count), torch.arange(count, 2 * count)], dim=1).to(model.device)
        rows.append(pooled_similarity(pooler.pooled, pairs).cpu().numpy())
    return np.concatenate(rows)


Part = tuple[str, int, Sequence[Question]]
"""Name of the data, number of the first item within it, items that are evaluated at a time."""


def slices(data: str, questions: Sequence[Question]) -> list[Part]:
    """The items of one data set, part by part.

    How many there are in a part does not depend on the number of processes: batches, and with them draws and rounding, follow
    from it.
    """
    size = min(ITEMS_AT_ONCE, max(_FEWEST_AT_ONCE, math.ceil(len(questions) / _SLICES)))
    return [(data, start, questions[start : start + size]) for start in range(0, len(questions), size)]


def evaluate(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    *,
    data: str,
    advance: Callable[[int], None],
    workers: Workers = ALONE,
    refused: Mapping[str, str] | None = None,
) -> list[ItemResult]:
    """`evaluate_rounds` of all items of one data set.

    Args:
        advance: told how many items are done, by all processes together, each time that some are.
        refused: see `evaluate_slice`.
    """
    results: list[ItemResult] = []
    parts, known = slices(data, questions), {data: refused or {}}
    for done in evaluate_rounds(model, engine, text_similarity, parts, settings, workers=workers, refused=known):
        results += done
        advance(len(done))
    return results


def evaluate_rounds(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    parts: Sequence[Part],
    settings: EvaluationSettings,
    *,
    workers: Workers,
    refused: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[list[ItemResult]]:
    """`evaluate_slice` of every part, at a time one in each process; the same results however many processes there are.

    Args:
        refused: see `evaluate_slice`, by name of the data.

    Yields:
        To every process what all of them have done in a round, in the order of `parts`.
    """
    for first in range(0, len(parts), workers.size):
        own: list[ItemResult] = []
        for data, start, questions in workers.share(parts[first : first + workers.size]):
            known = (refused or {}).get(data)
            own = evaluate_slice(model, engine, text_similarity, questions, settings, data=data, start=start, refused=known)
        yield [result for results in workers.gather(own) for result in results]


def evaluate_slice(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    *,
    data: str,
    start: int,
    refused: Mapping[str, str] | None = None,
) -> list[ItemResult]:
    """Answer every question from speech and from text, greedily and, where asked, by sampling.

    Args:
        questions: at most `ITEMS_AT_ONCE`.
        data: name of the data they come from.
        start: number of the first one within its data, which the sampled completions are seeded by.
        refused: reason by id of items that are known not to be usable.

    Returns:
        One result a question, in order; a question whose recording cannot be used has failed, which costs no other one.
    """
    failed = dict(refused or {})
    asked = [question for question in questions if question.id not in failed]
    with torch.no_grad():
        encoded = encode_speech(model, engine, prepare_speech(model, asked), settings.max_new_tokens)
        failed |= {q.id: str(prompt) for q, prompt in zip(asked, encoded, strict=True) if isinstance(prompt, UserError)}
        asked = [question for question in asked if question.id not in failed]
        spoken = [prompt for prompt in encoded if isinstance(prompt, Prompt)]
        prompts = {Modality.SPEECH: spoken, Modality.TEXT: model.encode_prompts(asked, Modality.TEXT)}
    answered = iter(_answer(model, engine, text_similarity, asked, prompts, settings, start) if asked else [])
    return [
        ItemResult.of(data, question, None if question.id in failed else next(answered), failed.get(question.id))
        for question in questions
    ]


def _answer(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    questions: Sequence[Question],
    prompts: Mapping[Modality, Sequence[Prompt]],
    settings: EvaluationSettings,
    start: int,
) -> list[Evaluated]:
    numbers = range(len(questions))
    greedy = Sampling(num_completions=1, max_new_tokens=settings.max_new_tokens, temperature=0.0, seed=settings.seed)
    completions = _generate(engine, prompts, greedy)
    sampled: dict[Modality, list[float | None]] = {modality: [None] * len(questions) for modality in Modality}
    if settings.num_samples:
        sampling = Sampling(settings.num_samples, settings.max_new_tokens, settings.temperature, settings.seed + start)
        for modality, drawn in _generate(engine, prompts, sampling).items():
            sampled[modality] = answer_rewards(drawn, questions).accuracy.view(len(questions), -1).mean(1).tolist()
    transcribed = _transcribe(model, engine, questions, greedy) if settings.transcribe else [None] * len(questions)
    engine.release_memory()
    similarities = text_similarity.similarity(*([c.text for c in completions[modality]] for modality in Modality))
    cosines = layer_cosines(model, prompts, completions)

    def answered(modality: Modality, number: int) -> Answered:
        question, completion = questions[number], completions[modality][number]
        key = f"{settings.seed} {modality} {question.id}"
        readings = read_completion(completion.text, question.choices, question.answer, key)
        return Answered(completion.text, completion.truncated, readings, sampled[modality][number])

    return [
        Evaluated(
            speech=answered(Modality.SPEECH, number),
            text=answered(Modality.TEXT, number),
            behaviour_similarity=similarities[number].item(),
            layer_cosine=tuple(cosines[number].tolist()),
            transcribed=transcribed[number],
        )
        for number in numbers
    ]


def _generate(
    engine: RolloutEngine, prompts: Mapping[Modality, Sequence[Prompt]], sampling: Sampling
) -> dict[Modality, list[Completion]]:
    """Completions of spoken and written prompts, sampled side by side."""
    both = [(number, prompt) for modality in Modality for number, prompt in enumerate(prompts[modality])]
    drawn = iter(engine.generate([prompt for _, prompt in both], [number for number, _ in both], sampling))
    return {modality: list(islice(drawn, len(prompts[modality]) * sampling.num_completions)) for modality in Modality}


def _transcribe(
    model: SpeechModel, engine: RolloutEngine, questions: Sequence[Question], greedy: Sampling
) -> list[Transcribed]:
    """What the model says was said, beside what was."""
    with torch.no_grad():
        prompts = model.encode_prompts(questions, Modality.SPEECH, TRANSCRIBE)
    texts = [completion.text for completion in engine.generate(prompts, range(len(questions)), greedy)]
    said = [question.transcript or "" for question in questions]
    return [Transcribed(text, words, word_error_rate(words, text)) for words, text in zip(said, texts, strict=True)]
