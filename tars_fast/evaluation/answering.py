"""Greedy and sampled evaluation of a model on spoken and written versions of the same items (docs/method.md, Metrics)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tars_kernels import LayerPooler, pooled_similarity

from tars_fast.data.transcription import word_error_rate
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult, Transcribed
from tars_fast.evaluation.scorers import Grade, ScorerError, grade_by_rule, read_completion
from tars_fast.learning.rewards.answers import read_answer
from tars_fast.learning.rewards.behaviour import TextSimilarity, finite_similarities
from tars_fast.learning.rewards.judge import Judge, JudgeError, run_coroutine
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.memory import EVALUATION_TOKENS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import Completion, Modality, Prompt, Question, UserError

ITEMS_AT_ONCE = 128
"""Most items in a slice. An interruption loses at most one slice a process. At 7B the embeddings of 30 s each are 0.8 GB."""
_FEWEST_AT_ONCE = 32
_SLICES = 8
"""A small data set is cut into so many slices, so that as many processes have something to do."""
_MOST_ITEMS_PER_FORWARD = 16
TRANSCRIBE = "Transcribe the recording word for word."


@dataclass(frozen=True)
class EvaluationSettings:
    """How items are answered."""

    max_new_tokens: int
    num_samples: int
    """Number of sampled completions of each prompt; 0 leaves them out."""
    temperature: float
    """Temperature of the sampled completions; the greedy ones have none."""
    seed: int
    """Seed of the sampled completions, and of VoiceBench's guesses."""
    transcribe: bool = False
    """Whether the model also transcribes every recording; every question then needs a transcript."""


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


@dataclass(frozen=True)
class DataSlice:
    """Neighbouring items of one data set, which one process answers together."""

    data: str
    """Name of the data set."""
    start: int
    """Index of the first item within its data set; it seeds the sampled completions."""
    questions: Sequence[Question]


def slice_data(data: str, questions: Sequence[Question]) -> list[DataSlice]:
    """Cut a data set into slices of at most `ITEMS_AT_ONCE` items.

    The size of a slice does not depend on the number of processes: batches, and with them samples and rounding, follow from it.
    """
    size = min(ITEMS_AT_ONCE, max(_FEWEST_AT_ONCE, math.ceil(len(questions) / _SLICES)))
    return [DataSlice(data, start, questions[start : start + size]) for start in range(0, len(questions), size)]


@dataclass(frozen=True)
class Evaluator:
    """A model, and all that it takes to have it answer items."""

    model: SpeechModel
    engine: RolloutEngine
    text_similarity: TextSimilarity
    """Compares the words of spoken and written completions."""
    settings: EvaluationSettings
    workers: Workers = ALONE
    judge: Judge | None = None
    """Grades completions of open questions; None: no one does."""

    def evaluate(
        self,
        questions: Sequence[Question],
        data: str,
        advance: Callable[[int], None],
        refused: Mapping[str, str] | None = None,
    ) -> list[ItemResult]:
        """Answer all items of one data set.

        Args:
            data: name of the data set.
            advance: called after every round with the number of items that all processes together have done in it.
            refused: see `evaluate_slice`.

        Returns:
            One result for each question, in order, the same in every process.
        """
        results: list[ItemResult] = []
        for done in self.evaluate_rounds(slice_data(data, questions), {data: refused or {}}):
            results += done
            advance(len(done))
        return results

    def evaluate_rounds(
        self, slices: Sequence[DataSlice], refused: Mapping[str, Mapping[str, str]]
    ) -> Iterator[list[ItemResult]]:
        """Answer the slices in rounds, in each round one slice in each process.

        The results do not depend on the number of processes.

        Args:
            refused: see `evaluate_slice`; by the name of the data set.

        Yields:
            The results of a round, in the order of `slices`, to every process.
        """
        for first in range(0, len(slices), self.workers.size):
            own: list[ItemResult] = []
            for part in self.workers.share(slices[first : first + self.workers.size]):
                own = self.evaluate_slice(part, refused.get(part.data))
            yield [result for results in self.workers.gather(own) for result in results]

    def evaluate_slice(self, part: DataSlice, refused: Mapping[str, str] | None = None) -> list[ItemResult]:
        """Answer every question from speech and from text, greedily and, where the settings say so, by sampling.

        Args:
            refused: reason by id of the items that are known to be unusable.

        Returns:
            One result for each question, in order. A question fails where its recording cannot be used, or where a scorer or
            the text embedder raises something on its completions; no other one does because of it.
        """
        model, settings = self.model, self.settings
        failed = dict(refused or {})
        questions = [question for question in part.questions if question.id not in failed]
        with torch.no_grad():
            encoded = encode_speech(model, self.engine, prepare_speech(model, questions), settings.max_new_tokens)
            failed |= {
                question.id: str(prompt)
                for question, prompt in zip(questions, encoded, strict=True)
                if isinstance(prompt, UserError)
            }
            questions = [question for question in questions if question.id not in failed]
            spoken = [prompt for prompt in encoded if isinstance(prompt, Prompt)]
            prompts = {Modality.SPEECH: spoken, Modality.TEXT: model.encode_prompts(questions, Modality.TEXT)}
        evaluated = self._evaluate_prompts(questions, prompts, part.start) if questions else []
        done: dict[str, Evaluated] = {}
        for question, item in zip(questions, evaluated, strict=True):
            if isinstance(item, Evaluated):
                done[question.id] = item
            else:
                failed[question.id] = str(item)
        return [
            ItemResult.of(part.data, question, done.get(question.id), failed.get(question.id)) for question in part.questions
        ]

    def _evaluate_prompts(
        self, questions: Sequence[Question], prompts: Mapping[Modality, Sequence[Prompt]], start: int
    ) -> list[Evaluated | ScorerError]:
        """`start` as in `DataSlice`."""
        settings = self.settings
        greedy = Sampling(num_completions=1, max_new_tokens=settings.max_new_tokens, temperature=0.0, seed=settings.seed)
        completions = self._generate(prompts, greedy)
        sampling = Sampling(settings.num_samples, settings.max_new_tokens, settings.temperature, settings.seed + start)
        samples = self._generate(prompts, sampling) if settings.num_samples else None
        transcriptions = self._transcribe(questions, greedy) if settings.transcribe else None
        self.engine.release_memory()
        similarities = self._similarities(*([c.text for c in completions[modality]] for modality in Modality))
        cosines = layer_cosines(self.model, prompts, completions)

        marks = self._judge(questions, completions)

        def answered(modality: Modality, number: int) -> Answered:
            if isinstance(mark := marks[modality][number], ScorerError):
                raise mark
            question, completion = questions[number], completions[modality][number]
            key = f"{settings.seed} {modality} {question.id}"
            readings = read_completion(completion.text, question, key)
            grades = grade_by_rule(completion.text, question, readings) | mark
            sampled_accuracy = None
            if samples is not None and question.has_answer:
                own = samples[modality][number * settings.num_samples : (number + 1) * settings.num_samples]
                right = [float(question.is_right(read_answer(sample.text, question))) for sample in own]
                sampled_accuracy = torch.tensor(right).mean().item()
            return Answered(completion.text, completion.truncated, readings, sampled_accuracy, grades)

        def evaluated(number: int) -> Evaluated | ScorerError:
            similarity = similarities[number]
            if isinstance(similarity, ScorerError):
                return similarity
            try:
                return Evaluated(
                    speech=answered(Modality.SPEECH, number),
                    text=answered(Modality.TEXT, number),
                    behaviour_similarity=similarity,
                    layer_cosine=tuple(cosines[number].tolist()),
                    transcribed=None if transcriptions is None else _compare(questions[number], transcriptions[number]),
                )
            except ScorerError as error:
                return error

        return [evaluated(number) for number in range(len(questions))]

    def _judge(
        self, questions: Sequence[Question], completions: Mapping[Modality, Sequence[Completion]]
    ) -> dict[Modality, list[dict[str, Grade] | ScorerError]]:
        """The judge's grade of each completion of an open question that VoiceBench has no rule for, or why there is none."""
        judge = self.judge
        if judge is None:
            return {modality: [{} for _ in questions] for modality in Modality}

        async def mark(question: Question, completion: Completion, room: asyncio.Semaphore) -> dict[str, Grade] | ScorerError:
            if not question.is_judged:
                return {}
            async with room:
                try:
                    value = await judge.mark(question, completion.text)
                except JudgeError as error:
                    return ScorerError(f"the judge gave no mark ({error})")
            return {} if value is None else {"judge": Grade(value)}

        async def marks() -> list[dict[str, Grade] | ScorerError]:
            room = asyncio.Semaphore(judge.settings.concurrency)
            # Of `asyncio.to_thread`, which else has as few threads as there are cores.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(judge.settings.concurrency))
            pairs = [pair for modality in Modality for pair in zip(questions, completions[modality], strict=True)]
            return await asyncio.gather(*(mark(question, completion, room) for question, completion in pairs))

        found = iter(run_coroutine(marks()))
        return {modality: [next(found) for _ in questions] for modality in Modality}

    def _similarities(self, spoken: Sequence[str], written: Sequence[str]) -> list[float | ScorerError]:
        """Similarity of the words of each pair of completions; a pair that the embedder fails on takes no other with it."""
        try:
            return [*finite_similarities(self.text_similarity, spoken, written).tolist()]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(spoken) == 1:
                return [ScorerError(f"the text embedder raised {error!r:.200} on {spoken[0]!r:.200} and {written[0]!r:.200}")]
        pairs = zip(spoken, written, strict=True)
        return [similarity for one, other in pairs for similarity in self._similarities([one], [other])]

    def _generate(self, prompts: Mapping[Modality, Sequence[Prompt]], sampling: Sampling) -> dict[Modality, list[Completion]]:
        """Complete spoken and written prompts in one batch."""
        both = [(number, prompt) for modality in Modality for number, prompt in enumerate(prompts[modality])]
        completions = iter(self.engine.generate([prompt for _, prompt in both], [number for number, _ in both], sampling))
        return {modality: list(islice(completions, len(prompts[modality]) * sampling.num_completions)) for modality in Modality}

    def _transcribe(self, questions: Sequence[Question], greedy: Sampling) -> list[str]:
        """Have the model write down each recording."""
        with torch.no_grad():
            prompts = self.model.encode_prompts(questions, Modality.SPEECH, TRANSCRIBE)
        return [completion.text for completion in self.engine.generate(prompts, range(len(questions)), greedy)]


def _compare(question: Question, transcription: str) -> Transcribed:
    """Compare what the model wrote down with the transcript."""
    transcript = question.transcript or ""
    try:
        return Transcribed(transcription, transcript, word_error_rate(transcript, transcription))
    except Exception as error:
        raise ScorerError(f"the word error rate raised {error!r:.200} on {transcription!r:.200}") from error
