"""Which written items are worth speaking: those like the ones that a model takes up differently spoken and written.

SALAD's active selection (arXiv 2510.13632, stage 2). The corpus is clustered by sentence embeddings; a few items of each
cluster are spoken, and the model's next-token distributions behind recording and text are compared; the budget of items to be
spoken goes to clusters in proportion. This project's own: the compared tokens are the model's greedy answer to the text, the
divergence is KL(written || spoken) in nats a token over the whole vocabulary, and the spoken probes are part of the choice, so
that a budget counts all speech that is made.

Everything follows from corpus, model, settings and seed. The order in which a cluster's items are taken is a hash of seed and
id, so a larger budget of the same clusters adds items and takes none away.

Shapes: C items of the corpus, E embedding size, T tokens.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tars_kernels import linear_distillation_loss

from tars_fast.data.splits import data_fingerprint
from tars_fast.learning.rewards.behaviour import load_text_similarity
from tars_fast.models.preset import Preset
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, choose_device, load_model
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.cli import first_line
from tars_fast.support.files import write_atomically
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import Modality, Prompt, Question, Recording, UserError

CHOICE_FILE = "choice.json"
MOST_CLUSTERS = 64
"""Default bound of their number."""
_PROBED_SHARE = 4
"""By default probes take at most one part in so many of the budget."""
_PASS = 4
"""Completions in one forward pass, so that memory does not grow with their number."""
_SMALLEST_SCORE = 1e-9
"""A cluster's misalignment where none is measured in any: all get the same share."""

SpeakProbes = Callable[[Sequence[Question]], Mapping[str, Recording]]
"""Speaks items; returns the recording of each that could be spoken, by id."""


@dataclass(frozen=True)
class ChoiceSettings:
    """What a choice follows from, beside the corpus."""

    budget: int
    """Items to be spoken."""
    select_for: str | None
    """The model; None: items are drawn uniformly."""
    embedder: str | None
    """Of the clusters; None: that of the model's preset."""
    clusters: int | None
    """None: as many as leave three quarters of the budget to the choice, at most `MOST_CLUSTERS`."""
    probes: int
    """Items of each cluster that are spoken and measured."""
    seed: int


@dataclass(frozen=True)
class Cluster:
    """A part of the corpus."""

    ids: list[str]
    """In the order in which they are taken; the first of them are the probes."""
    misalignment: dict[str, float | None]
    """Of its probes, KL(written || spoken) in nats a token; None for one that could not be spoken or encoded."""

    @property
    def measured(self) -> float | None:
        """Mean over its probes; None where none was measured."""
        values = [value for value in self.misalignment.values() if value is not None]
        return sum(values) / len(values) if values else None


def choose_items(folder: Path, questions: Sequence[Question], settings: ChoiceSettings, speak: SpeakProbes) -> list[str]:
    """Ids of the items to be spoken, in corpus order; read from the folder's choice.json, or made and written there.

    Raises:
        UserError: the budget does not fit the corpus, model or embedder cannot be loaded, no probe could be measured, or
            choice.json is damaged or of another choice.
    """
    path = folder / CHOICE_FILE
    made_with = asdict(settings) | {"corpus": data_fingerprint(questions)}
    if path.is_file():
        return read_choice(path, made_with, questions)
    num_clusters = check_settings(settings, len(questions))
    clusters: list[Cluster] = []
    budgets: list[int] = []
    if settings.select_for is None:
        chosen = set(in_order_of_choice([question.id for question in questions], settings.seed)[: settings.budget])
    else:
        clusters = measure_clusters(questions, settings, num_clusters, speak)
        budgets = share_out(clusters, settings.budget)
        chosen = {id for cluster, budget in zip(clusters, budgets, strict=True) for id in cluster.ids[:budget]}
    ids = [question.id for question in questions if question.id in chosen]
    listed = [
        {"budget": budget, "misalignment": cluster.measured, "probes": cluster.misalignment, "ids": cluster.ids}
        for cluster, budget in zip(clusters, budgets, strict=True)
    ]
    write_atomically(path, json.dumps({"settings": made_with, "clusters": listed, "chosen": ids}, indent=1) + "\n")
    return ids


def read_choice(path: Path, made_with: Mapping[str, Any], questions: Sequence[Question]) -> list[str]:
    """The ids in choice.json. Raises UserError where it is damaged, or was made with other settings or of another corpus."""
    try:
        choice = json.loads(path.read_text(encoding="utf-8"))
        settings, ids = choice["settings"], choice["chosen"]
        changed = [name for name in made_with if settings[name] != made_with[name]]
        if not changed and not set(ids) <= {question.id for question in questions}:
            raise ValueError("it names items that are not in the corpus")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--output-dir: {path} is damaged ({first_line(error)}); remove it, and repeat the command, which chooses again"
        ) from error
    if changed:
        listed = ", ".join(
            "another corpus" if name == "corpus" else f"--{name.replace('_', '-')} {settings[name]!s:.60}" for name in changed
        )
        raise UserError(f"--output-dir: {path} was made with {listed}; give the same, or name a new folder")
    return ids


def check_settings(settings: ChoiceSettings, num_items: int) -> int:
    """The number of clusters. Raises UserError where corpus, budget, clusters and probes do not go together."""
    budget = settings.budget
    if budget > num_items:
        raise UserError(f"--budget {budget}: the corpus has {num_items} different items; lower it")
    default = max(1, min(MOST_CLUSTERS, budget // (_PROBED_SHARE * settings.probes)))
    num_clusters = settings.clusters or default
    if settings.select_for is not None and num_clusters * settings.probes > budget:
        raise UserError(
            f"--budget {budget}: {num_clusters} clusters with --probes {settings.probes} have {num_clusters * settings.probes} "
            "items spoken before anything is chosen; raise it, or lower --clusters or --probes"
        )
    return num_clusters


def in_order_of_choice(ids: Sequence[str], seed: int) -> list[str]:
    """Items by a hash of seed and id, which does not depend on the other items."""
    return sorted(ids, key=lambda id: hashlib.sha256(json.dumps([seed, "choice", id]).encode()).digest())


def cluster_items(vectors: Any, num_clusters: int, seed: int) -> list[list[int]]:
    """Partition the rows of [C, E] vectors, dense or sparse, by k-means; clusters in order of their first item, none empty.

    Fewer clusters than asked for where fewer vectors differ.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        labels = KMeans(num_clusters, n_init=4, random_state=seed % 2**32).fit_predict(vectors)
    members: dict[int, list[int]] = {}
    for number, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(number)
    return list(members.values())


def share_out(clusters: Sequence[Cluster], budget: int) -> list[int]:
    """Items of each cluster, in proportion to its misalignment, by Webster's method; at least its probes, at most all it has.

    A cluster without a measured probe counts as the mean of the others.
    """
    measured = [cluster.measured for cluster in clusters]
    known = [value for value in measured if value is not None]
    mean = sum(known) / len(known)
    scores = [max(_SMALLEST_SCORE, mean if value is None else value) for value in measured]
    given = [len(cluster.misalignment) for cluster in clusters]

    def claim(number: int) -> tuple[float, int]:
        return -scores[number] / (2 * given[number] + 1), number

    claims = [claim(number) for number, cluster in enumerate(clusters) if given[number] < len(cluster.ids)]
    heapq.heapify(claims)
    for _ in range(budget - sum(given)):
        _, number = heapq.heappop(claims)
        given[number] += 1
        if given[number] < len(clusters[number].ids):
            heapq.heappush(claims, claim(number))
    return given


def measure_clusters(
    questions: Sequence[Question], settings: ChoiceSettings, num_clusters: int, speak: SpeakProbes
) -> list[Cluster]:
    """Cluster the corpus, have the probes of each cluster spoken, and measure them.

    Raises:
        UserError: see `choose_items`.
    """
    assert settings.select_for is not None, "else nothing is measured"
    preset = find_preset(settings.select_for)
    device, dtype = choose_device("auto", "auto", uses_lora=preset.lora_rank > 0)
    embedder = load_text_similarity(settings.embedder or preset.behaviour_model, device, flag="--embedder")
    with explain_out_of_memory("embedding the corpus"):
        vectors = embedder.embed([question.text for question in questions])
    del embedder
    by_id = {question.id: question for question in questions}
    members = [
        in_order_of_choice([questions[number].id for number in numbers], settings.seed)
        for numbers in cluster_items(vectors, num_clusters, settings.seed)
    ]
    probes = [by_id[id] for ids in members for id in ids[: settings.probes]]
    recordings = speak(probes)
    spoken = [replace(question, audio=recordings[question.id]) for question in probes if question.id in recordings]
    with explain_out_of_memory("measuring probes"):
        values, refusal = measure(load_model(preset, preset.source, device, dtype), preset, spoken)
    if not values:
        reason = refusal or "see preparation/failed.jsonl"
        raise UserError(
            f"--select-for {settings.select_for}: none of {len(probes)} probes could be spoken and encoded ({reason}); prepare "
            "the corpus without it first"
        )
    return [Cluster(ids, {id: values.get(id) for id in ids[: settings.probes]}) for ids in members]


def measure(model: SpeechModel, preset: Preset, questions: Sequence[Question]) -> tuple[dict[str, float], str | None]:
    """(misalignment of each item whose recording can be used, by id; why the first of the others cannot)."""
    with closing(TransformersEngine(model, preset.rollout_batch_size)) as engine:
        values: dict[str, float] = {}
        refusal = None
        for start in range(0, len(questions), _PASS):
            part = questions[start : start + _PASS]
            spoken = encode_speech(model, engine, prepare_speech(model, part), preset.max_new_tokens)
            pairs = [(question, prompt) for question, prompt in zip(part, spoken, strict=True) if isinstance(prompt, Prompt)]
            refusal = refusal or next((str(prompt) for prompt in spoken if not isinstance(prompt, Prompt)), None)
            if pairs:
                usable = [question for question, _ in pairs]
                means = misalignment(model, engine, usable, [prompt for _, prompt in pairs], preset.max_new_tokens)
                values |= zip([question.id for question in usable], means, strict=True)
    return {id: value for id, value in values.items() if math.isfinite(value)}, refusal


@torch.no_grad()
def misalignment(
    model: SpeechModel, engine: RolloutEngine, questions: Sequence[Question], spoken: Sequence[Prompt], max_new_tokens: int
) -> list[float]:
    """Mean KL(written || spoken) of the next token, in nats, along the model's greedy answer to each written question.

    Args:
        spoken: the spoken prompts of the questions.
        max_new_tokens: of an answer.
    """
    written = model.encode_prompts(questions, Modality.TEXT)
    completions = engine.generate(written, list(range(len(written))), Sampling(1, max_new_tokens, 0.0, 0))
    packed, teacher = (model.pack(prompts, completions) for prompts in (spoken, written))
    divergences_T = linear_distillation_loss(
        model.forward(packed),
        model.forward(teacher),
        model.head,
        bias=model.suppressed_bias,
        teacher_bias=model.suppressed_bias,
        divergence="forward_kl",
    ).divergences
    return [part.double().mean().item() for part in divergences_T.split(packed.completion_lengths)]
