"""Greedy and sampled evaluation of a model on spoken and written versions of the same items (METHOD, Metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tars_kernels import LayerPooler, pooled_similarity

from tars_fast.memory import EVALUATION_TOKENS
from tars_fast.metrics import bootstrap_interval, mean, mean_difference, modality_recovery_rate, total
from tars_fast.models import SpeechModel
from tars_fast.rewards import TextSimilarity, answer_rewards
from tars_fast.sampling import RolloutEngine, Sampling
from tars_fast.types import Completion, Modality, Prompt, Question

_ITEMS_AT_ONCE = 128
"""Items whose audio embeddings are held at a time; at 7B and 30 s that is 0.8 GB."""
_MOST_ITEMS_PER_FORWARD = 16


@dataclass(frozen=True)
class Evaluation:
    """Per-item results, [I] each unless said otherwise, so that every later figure can be paired by item."""

    speech_correct: np.ndarray
    text_correct: np.ndarray
    num_unparsed: np.ndarray
    """0, 1 or 2: unparseable greedy answers of the item."""
    behaviour_similarity: np.ndarray
    layer_cosine: np.ndarray
    """[I, L] cosine of pooled completion states, speech against text, layers 1 .. L."""
    speech_correct_sampled: np.ndarray | None
    text_correct_sampled: np.ndarray | None
    speech_texts: tuple[str, ...]
    """Greedy completions, spoken questions."""
    text_texts: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Plain lists, from which `from_json` makes the same again."""
        values = dataclasses.asdict(self)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Evaluation:
        return cls(
            **{
                name: tuple(value) if name.endswith("_texts") else None if value is None else np.asarray(value)
                for name, value in values.items()
            }
        )

    def report(self, reference_text_correct: np.ndarray) -> dict[str, object]:
        """Figures with `<name>_ci95` beside them: accuracies as fractions, MRR in percent, `unparsed` as a count.

        Args:
            reference_text_correct: [I] of the fixed reference that `mrr` divides by.
        """
        figures = {
            "speech_accuracy": (mean, self.speech_correct),
            "text_accuracy": (mean, self.text_correct),
            "mrr": (modality_recovery_rate, self.speech_correct, reference_text_correct),
            "mrr_same_model": (modality_recovery_rate, self.speech_correct, self.text_correct),
            "behaviour_similarity": (mean, self.behaviour_similarity),
            "unparsed": (total, self.num_unparsed),
        }
        if self.speech_correct_sampled is not None:
            figures["speech_accuracy_sampled"] = (mean, self.speech_correct_sampled)
            figures["text_accuracy_sampled"] = (mean, self.text_correct_sampled)
        report: dict[str, object] = {"num_items": len(self.speech_correct)}
        for name, (statistic, *columns) in figures.items():
            figure, interval = bootstrap_interval(statistic, *columns)
            report[name] = None if np.isnan(figure) else figure
            report[f"{name}_ci95"] = None if np.isnan(interval).any() else interval
        layers = [bootstrap_interval(mean, column) for column in self.layer_cosine.T]
        report["layer_cosine"] = [figure for figure, _ in layers]
        report["layer_cosine_ci95"] = [interval for _, interval in layers]
        return report

    def change_since(self, before: Evaluation) -> dict[str, object]:
        """Paired differences, item by item, with their 95 % intervals."""
        names = ["speech_correct", "text_correct", "behaviour_similarity"]
        if self.speech_correct_sampled is not None and before.speech_correct_sampled is not None:
            names += ["speech_correct_sampled", "text_correct_sampled"]
        change: dict[str, object] = {}
        for name in names:
            key = name.replace("correct", "accuracy")
            change[key], change[f"{key}_ci95"] = bootstrap_interval(mean_difference, getattr(self, name), getattr(before, name))
        return change


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
        layout = model.lay_out(chosen_prompts, [c for modality in Modality for c in completions[modality][items]])
        with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
            model.forward(layout)
        count = len(chosen_prompts) // 2
        pairs = torch.stack([torch.arange(count), torch.arange(count, 2 * count)], dim=1).to(model.device)
        rows.append(pooled_similarity(pooler.pooled, pairs).cpu().numpy())
    return np.concatenate(rows)


def evaluate(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    num_samples: int,
    temperature: float,
    seed: int,
) -> Evaluation:
    """Answer every question from speech and from text, greedily and, where `num_samples` > 0, by sampling."""
    parts = [
        _evaluate_slice(
            model,
            engine,
            text_similarity,
            questions[start : start + _ITEMS_AT_ONCE],
            greedy=Sampling(num_completions=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=seed),
            sampling=Sampling(num_samples, max_new_tokens, temperature, seed + start) if num_samples else None,
        )
        for start in range(0, len(questions), _ITEMS_AT_ONCE)
    ]

    def joined(name: str) -> object:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], tuple):
            return tuple(text for texts in values for text in texts)
        return None if values[0] is None else np.concatenate(values)

    return Evaluation(**{field.name: joined(field.name) for field in dataclasses.fields(Evaluation)})


def _evaluate_slice(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    questions: Sequence[Question],
    greedy: Sampling,
    sampling: Sampling | None,
) -> Evaluation:
    numbers = range(len(questions))
    with torch.no_grad():
        prompts = {modality: model.encode_prompts(questions, modality) for modality in Modality}
    completions = {modality: engine.generate(prompts[modality], numbers, greedy) for modality in Modality}
    rewards = {modality: answer_rewards(completions[modality], questions) for modality in Modality}
    sampled: dict[Modality, np.ndarray | None] = dict.fromkeys(Modality)
    if sampling is not None:
        for modality in Modality:
            drawn = engine.generate(prompts[modality], numbers, sampling)
            accuracy = answer_rewards(drawn, questions).accuracy.view(len(questions), sampling.num_completions)
            sampled[modality] = accuracy.mean(1).numpy()
    engine.release_memory()
    texts = {modality: tuple(completion.text for completion in completions[modality]) for modality in Modality}
    return Evaluation(
        speech_correct=rewards[Modality.SPEECH].accuracy.numpy(),
        text_correct=rewards[Modality.TEXT].accuracy.numpy(),
        num_unparsed=sum(rewards[modality].unparsed.numpy() for modality in Modality),
        behaviour_similarity=text_similarity.similarity(texts[Modality.SPEECH], texts[Modality.TEXT]).numpy(),
        layer_cosine=layer_cosines(model, prompts, completions),
        speech_correct_sampled=sampled[Modality.SPEECH],
        text_correct_sampled=sampled[Modality.TEXT],
        speech_texts=texts[Modality.SPEECH],
        text_texts=texts[Modality.TEXT],
    )
