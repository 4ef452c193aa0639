"""METHOD steps 2 (R_rep) to 5 on one rollout: packed forward passes, rewards, advantages, loss, backward, optimiser step.

Every token goes through one forward pass, which gives log-probability, entropy and, pooled by hooks as layers run, R_rep.
Only with several updates a rollout does a pass without gradients come first, whose log-probabilities are the old ones of all.
Groups that cannot have an advantage (written answers that all earn the same, most of them) are known before the pass: they go
through it without gradients, and have no backward pass.

Shapes: N completions of a batch or micro-batch, T completion tokens, L layers that R_rep looks at, D hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from tars_kernels import LayerPooler, PolicyLoss, linear_logprob, linear_policy_loss
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import centred_advantages, disagreeing_groups, group_means
from tars_fast.learning.batch import Rollout
from tars_fast.learning.rewards import representation_rewards
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.architecture import find_layers
from tars_fast.models.speech_model import PackedBatch, SpeechModel
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Modality, Prompt, TrainingError

MAX_LOGPROB_DIFF = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""Default of --max-logprob-diff: far above rounding (about 1e-7 and 4e-3 nats here), below what a different policy makes."""


@dataclass
class Scored:
    """What the first forward pass over a rollout adds."""

    representation_N: Tensor
    """R_rep."""
    behaviour_N: Tensor
    """R_beh."""
    rewards_N: Tensor
    advantages_N: Tensor
    trained_N: Tensor
    """bool: whether the last update had a backward pass through it."""
    logprobs: list[Tensor]
    """[N] old log-probabilities of each completion's tokens."""
    entropies: list[Tensor]
    """[N] of the distributions that they were drawn from, in nats."""

    @classmethod
    def empty(cls, num_completions: int) -> Scored:
        representation_N, behaviour_N, rewards_N, advantages_N = torch.zeros(4, num_completions)
        return cls(
            representation_N,
            behaviour_N,
            rewards_N,
            advantages_N,
            trained_N=torch.zeros(num_completions, dtype=torch.bool),
            logprobs=[torch.empty(0)] * num_completions,
            entropies=[torch.empty(0)] * num_completions,
        )


@dataclass(frozen=True)
class _Pass:
    """One forward pass over some completions of a rollout."""

    rows: list[int]
    """[N] which."""
    layout: PackedBatch
    hidden_TD: Tensor
    pooled_LND: Tensor | None


def micro_batches(rollout: Rollout, max_tokens: int) -> list[list[int]]:
    """Completions by number, whole questions together, so that every spoken one stands beside its reference.

    Questions are packed longest first, each into the first micro-batch that has room for it. One that is longer than
    `max_tokens` stands alone.
    """
    rows: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for number, completion in enumerate(rollout.completions):
        rows.setdefault(completion.question, []).append(number)
    for question, numbers in rows.items():
        prompts = {id(rollout.prompts[number]): len(rollout.prompts[number].token_ids) for number in numbers}
        sizes[question] = sum(prompts.values()) + sum(len(rollout.completions[number].token_ids) for number in numbers)
    packed: list[list[int]] = []
    tokens: list[int] = []
    for question in sorted(rows, key=lambda question: -sizes[question]):
        place = next((place for place, held in enumerate(tokens) if held + sizes[question] <= max_tokens), None)
        if place is None:
            packed.append([])
            tokens.append(0)
            place = -1
        packed[place] += rows[question]
        tokens[place] += sizes[question]
    return packed


def known_without_gradient(rollout: Rollout, config: RunConfig) -> list[bool]:
    """[N] whether a completion's group can be seen not to have a gradient before R_rep and R_beh are known.

    Either is 0 without a reference; where all rewards of a group then agree, so do its advantages, and a completion that was
    cut off is masked out of the loss.
    """
    groups = rollout.groups_N.tolist()
    aligned = config.representation_weight or config.behaviour_weight
    undecided = {
        group for group, reference in zip(groups, rollout.references, strict=True) if aligned and reference is not None
    }
    disagreeing = disagreeing_groups(rollout.answers.base, rollout.groups_N).tolist()
    finished = {group for group, completion in zip(groups, rollout.completions, strict=True) if not completion.truncated}
    return [group not in finished or (group not in undecided and not disagreeing[group]) for group in groups]


def reward_pooler(model: SpeechModel, config: RunConfig) -> LayerPooler:
    """Of the layers that R_rep looks at."""
    layers = model.language_model.layers
    return LayerPooler(layers, model.language_model.norm, layers=find_layers(config.representation_layers, len(layers)))


@torch.no_grad()
def score_rollout(model: SpeechModel, rollout: Rollout, config: RunConfig, timer: PhaseTimer) -> Scored:
    """Rewards, advantages and old log-probabilities without gradients, for several updates on the same rollout."""
    pooler = reward_pooler(model, config)
    scored = Scored.empty(len(rollout.completions))
    for rows in micro_batches(rollout, config.tokens_per_micro_batch):
        one = run_forward(model, rollout, rows, timer, pooler)
        score(rollout, [one], scored, config, timer)
        measure(model, one, scored, config, timer)
    return scored


def update_policy(
    model: SpeechModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout | None,
    scored: Scored | None,
    config: RunConfig,
    timer: PhaseTimer,
    workers: Workers = ALONE,
    before_step: Callable[[], None] = lambda: None,
) -> tuple[Scored | None, dict[str, float]]:
    """One optimiser step on a rollout.

    Args:
        rollout: this process's share; None where nothing of it could be used.
        scored: from `score_rollout` where this is one of several updates. None: measured on the way.
        workers: all processes with rollouts of this step, whose gradients are summed.
        before_step: waits until the weights may change.

    Returns:
        (what is known of the rollout now, metrics of this update).
    """
    losses: list[tuple[PolicyLoss, int]] = []
    optimizer.zero_grad(set_to_none=True)
    shares = workers.gather((0, 0) if rollout is None else (rollout.num_tokens, rollout.staleness))
    num_tokens, is_fresh = sum(tokens for tokens, _ in shares), not any(staleness for _, staleness in shares)
    if rollout is not None:
        pooler = None if scored is not None else reward_pooler(model, config)
        scored = scored or Scored.empty(len(rollout.completions))
        scored.trained_N.zero_()
        without_gradient = known_without_gradient(rollout, config)
        for rows in micro_batches(rollout, config.tokens_per_micro_batch):
            silent = [row for row in rows if without_gradient[row]]
            live = [row for row in rows if not without_gradient[row]]
            if pooler is not None:
                loss = score_and_descend(model, rollout, silent, live, scored, config, timer, num_tokens, pooler)
            else:
                trained = rows_with_gradient(rollout, scored, live)
                loss = descend_again(model, rollout, trained, scored, config, timer, num_tokens)
            losses += [] if loss is None else [loss]
    with timer.phase("rollout"):
        before_step()
    with timer.phase("optimiser"):
        for parameter in model.trainable_parameters():
            # As from a backward pass over advantages of 0: momentum and weight decay go on.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        workers.sum_gradients(model.trainable_parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), config.max_grad_norm)
        sums = None if rollout is None or scored is None else token_sums(losses, rollout, scored)
        metrics = token_metrics([part for part in workers.gather(sums) if part is not None])
        metrics["grad_norm"] = grad_norm.item()
        if is_fresh:
            check_agreement(metrics, config, model.module.dtype)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise TrainingError(
                f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not finite; lower --learning-rate; "
                "the last checkpoint, if there is one, is good"
            )
        if num_tokens:
            optimizer.step()
    return scored, metrics


def score_and_descend(
    model: SpeechModel,
    rollout: Rollout,
    silent: list[int],
    live: list[int],
    scored: Scored,
    config: RunConfig,
    timer: PhaseTimer,
    num_tokens: int,
    pooler: LayerPooler,
) -> tuple[PolicyLoss, int] | None:
    """Rewards and backward pass of a micro-batch in one forward pass a token; see `descend`.

    Args:
        silent: completions that cannot have a gradient.
        live: the others.
    """
    passes: list[_Pass] = []
    if silent:
        with torch.no_grad():
            passes.append(run_forward(model, rollout, silent, timer, pooler))
    if live:
        passes.append(run_forward(model, rollout, live, timer, pooler))
    score(rollout, passes, scored, config, timer)
    trained = passes.pop() if rows_with_gradient(rollout, scored, live) else None
    for one in passes:
        measure(model, one, scored, config, timer)
    return None if trained is None else descend(model, rollout, trained, scored, config, timer, num_tokens, first=True)


def descend_again(
    model: SpeechModel,
    rollout: Rollout,
    rows: list[int],
    scored: Scored,
    config: RunConfig,
    timer: PhaseTimer,
    num_tokens: int,
) -> tuple[PolicyLoss, int] | None:
    """Forward and backward pass of a micro-batch whose rewards are known; None where nothing has a gradient."""
    if not rows:
        return None
    one = run_forward(model, rollout, rows, timer, None)
    return descend(model, rollout, one, scored, config, timer, num_tokens, first=False)


def rows_with_gradient(rollout: Rollout, scored: Scored, rows: Sequence[int]) -> list[int]:
    """Those whose group has an advantage in a completion that was not cut off."""
    if not rows:
        return []
    groups = rollout.groups_N[rows]
    kept = torch.tensor([not rollout.completions[row].truncated for row in rows])
    alive = groups[(scored.advantages_N[rows] != 0) & kept].unique()
    return [row for row, is_alive in zip(rows, torch.isin(groups, alive).tolist(), strict=True) if is_alive]


def run_forward(model: SpeechModel, rollout: Rollout, rows: list[int], timer: PhaseTimer, pooler: LayerPooler | None) -> _Pass:
    """One packed forward pass over these completions; with a gradient where that is enabled.

    A tower that is trained hears again, where the loss needs its gradient or the rollout heard with older weights.
    """
    prompts, completions = [rollout.prompts[row] for row in rows], [rollout.completions[row] for row in rows]
    if model.audio_is_trained and (torch.is_grad_enabled() or rollout.staleness):
        with timer.phase("encode"):
            prompts = reencode_audio(model, rollout, rows)
    with timer.phase("forward"):
        layout = model.pack(prompts, completions)
        if pooler is None:
            return _Pass(rows, layout, model.forward(layout), None)
        with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
            hidden_TD = model.forward(layout)
        return _Pass(rows, layout, hidden_TD, pooler.pooled)


def reencode_audio(model: SpeechModel, rollout: Rollout, rows: Sequence[int]) -> list[Prompt]:
    """The same prompts with what the tower hears now."""
    completions = [rollout.completions[row] for row in rows]
    numbers = sorted({completion.question for completion in completions if completion.modality is Modality.SPEECH})
    by_number = dict(zip(numbers, model.encode([rollout.spoken[number] for number in numbers]), strict=True))
    return [
        by_number[completion.question] if completion.modality is Modality.SPEECH else rollout.prompts[row]
        for row, completion in zip(rows, completions, strict=True)
    ]


def score(rollout: Rollout, passes: Sequence[_Pass], scored: Scored, config: RunConfig, timer: PhaseTimer) -> None:
    """Add R_rep, rewards and advantages of a micro-batch's completions (METHOD steps 2 and 3)."""
    with timer.phase("reward"):
        rows = [row for one in passes for row in one.rows]
        places = {row: place for place, row in enumerate(rows)}
        references = [None if (reference := rollout.references[row]) is None else places[reference] for row in rows]
        pooled_LND = torch.cat([one.pooled_LND for one in passes if one.pooled_LND is not None], dim=1)
        scored.representation_N[rows] = representation_rewards(pooled_LND, references).cpu()
        scored.behaviour_N[rows] = rollout.behaviour.result()[rows]
        scored.rewards_N[rows] = (
            rollout.answers.base[rows]
            + config.representation_weight * scored.representation_N[rows]
            + config.behaviour_weight * scored.behaviour_N[rows]
        )
        # Questions are whole, and with them groups, whose numbers start from 0 again.
        groups = rollout.groups_N[rows].unique(return_inverse=True)[1]
        scored.advantages_N[rows] = centred_advantages(scored.rewards_N[rows], groups)


@torch.no_grad()
def measure(model: SpeechModel, one: _Pass, scored: Scored, config: RunConfig, timer: PhaseTimer) -> None:
    """Add log-probabilities and entropies of a pass that has no loss."""
    with timer.phase("forward"):
        logprobs, entropies = linear_logprob(
            one.hidden_TD,
            model.head,
            one.layout.targets,
            bias=model.suppressed_bias,
            temperature=config.temperature,
            return_entropy=True,
        )
    keep(one, scored, logprobs, entropies)


def keep(one: _Pass, scored: Scored, logprobs_T: Tensor, entropies_T: Tensor) -> None:
    """Cut both into completions."""
    lengths = [length for group in one.layout.groups.completion_lengths for length in group]
    for row, logprobs, entropies in zip(one.rows, logprobs_T.split(lengths), entropies_T.split(lengths), strict=True):
        scored.logprobs[row], scored.entropies[row] = logprobs, entropies


def descend(
    model: SpeechModel,
    rollout: Rollout,
    one: _Pass,
    scored: Scored,
    config: RunConfig,
    timer: PhaseTimer,
    num_tokens: int,
    *,
    first: bool,
) -> tuple[PolicyLoss, int]:
    """Loss and backward pass (METHOD step 4), and the unmasked tokens in it.

    Args:
        num_tokens: unmasked tokens of the whole batch, which there are where this is called.
        first: the pass itself has the old log-probabilities, which are kept.
    """
    completions = [rollout.completions[row] for row in one.rows]
    with timer.phase("forward"):
        loss = linear_policy_loss(
            one.hidden_TD,
            model.head,
            one.layout.targets,
            scored.advantages_N[one.rows].to(model.device),
            cu_seqlens=one.layout.cu_seqlens,
            old_logprobs=None if first else torch.cat([scored.logprobs[row] for row in one.rows]),
            rollout_logprobs=torch.tensor([x for c in completions for x in c.rollout_logprobs], device=model.device),
            # Overlong filtering: a truncated completion teaches nothing, not even to be shorter.
            mask=torch.tensor([not c.truncated for c in completions for _ in c.token_ids], device=model.device),
            bias=model.suppressed_bias,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            temperature=config.temperature,
            num_tokens=num_tokens,
        )
    with timer.phase("backward"):
        loss.loss.backward()
    if first:
        keep(one, scored, loss.logprobs, loss.entropy)
    scored.trained_N[one.rows] = True
    num_tokens = sum(len(completion.token_ids) for completion in completions if not completion.truncated)
    return dataclasses.replace(loss, loss=loss.loss.detach()), num_tokens


def token_sums(losses: Sequence[tuple[PolicyLoss, int]], rollout: Rollout, scored: Scored) -> dict[str, float]:
    """Sums over the unmasked tokens of a rollout, from which `token_metrics` makes means.

    Args:
        losses: of each backward pass, with its unmasked tokens.
    """
    completions = rollout.completions
    device = scored.logprobs[0].device
    mask = torch.tensor([not c.truncated for c in completions for _ in c.token_ids], device=device)
    is_speech = torch.tensor([c.modality is Modality.SPEECH for c in completions for _ in c.token_ids], device=device)
    rollout_logprobs = torch.tensor([x for c in completions for x in c.rollout_logprobs], device=device)
    entropy = torch.cat(scored.entropies).float()
    difference = (torch.cat(scored.logprobs) - rollout_logprobs).masked_fill_(~mask, 0.0)
    none = torch.zeros((), device=device)
    sums = {
        "loss": sum((loss.loss for loss, _ in losses), none),
        "tokens": mask.sum(),
        "tokens/speech": (mask & is_speech).sum(),
        "entropy/speech": (entropy * (mask & is_speech)).sum(),
        "entropy/text": (entropy * (mask & ~is_speech)).sum(),
        "trained": none + sum(number for _, number in losses),
        "clip/low": sum((loss.clip_low_fraction * number for loss, number in losses), none),
        "clip/high": sum((loss.clip_high_fraction * number for loss, number in losses), none),
        "importance_ratio": (difference.exp() * mask).sum(),
        "logprob_diff_mean": difference.abs().sum(),
        "logprob_diff_max": difference.abs().max() if len(difference) else none,
    }
    # One wait for the device, not one a figure.
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))


def token_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Token-level metrics of a step from the `token_sums` of every process; clip fractions are of tokens with a gradient."""
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    counts = {"entropy/speech": total["tokens/speech"], "entropy/text": total["tokens"] - total["tokens/speech"]}
    counts |= {"clip/low": total["trained"], "clip/high": total["trained"]}
    means = ("entropy/speech", "entropy/text", "clip/low", "clip/high", "importance_ratio", "logprob_diff_mean")
    metrics = {name: total[name] / max(1.0, counts.get(name, total["tokens"])) for name in means}
    return {"loss": total["loss"], **metrics, "logprob_diff_max": max(part["logprob_diff_max"] for part in parts)}


def check_agreement(metrics: dict[str, float], config: RunConfig, dtype: torch.dtype) -> None:
    """Raises TrainingError where trainer and rollout engine compute two different policies."""
    limit = config.max_logprob_diff or MAX_LOGPROB_DIFF[dtype]
    if metrics["logprob_diff_mean"] > limit:
        raise TrainingError(
            f"trainer and rollout engine differ by {metrics['logprob_diff_mean']:.3g} nats a token (mean; most "
            f"{metrics['logprob_diff_max']:.3g}), more than --max-logprob-diff {limit}. Likely causes: one of them has other "
            "weights (replaced parameters, a stale prefix cache), another dtype or temperature, audio at other places, or a "
            "wrong kernel; --engine transformers and --kernels reference tell them apart. Only where all of that is ruled out "
            "is it rounding, and the setting to be raised"
        )


def rollout_metrics(parts: Sequence[tuple[Rollout, Scored]]) -> dict[str, float]:
    """Completion-level metrics by modality, of the rollouts of every process."""
    completions = [completion for rollout, _ in parts for completion in rollout.completions]
    lengths_N = torch.tensor([float(len(completion.token_ids)) for completion in completions])
    truncated_N = torch.tensor([float(completion.truncated) for completion in completions])
    is_speech_N = torch.tensor([completion.modality is Modality.SPEECH for completion in completions])
    has_reference_N = torch.tensor([reference is not None for rollout, _ in parts for reference in rollout.references])
    rewards_N = torch.cat([scored.rewards_N for _, scored in parts])
    representation_N = torch.cat([scored.representation_N for _, scored in parts])
    behaviour_N = torch.cat([scored.behaviour_N for _, scored in parts])
    trained_N = torch.cat([scored.trained_N for _, scored in parts])
    answers = {
        name: torch.cat([getattr(rollout.answers, name) for rollout, _ in parts]) for name in ("accuracy", "format", "unparsed")
    }
    # Processes number their groups alike.
    starts = accumulate((int(rollout.groups_N.max()) + 1 for rollout, _ in parts), initial=0)
    groups_N = torch.cat([rollout.groups_N + start for (rollout, _), start in zip(parts, starts, strict=False)])
    disagreeing_G = disagreeing_groups(rewards_N, groups_N)
    trained_G = group_means(trained_N.float(), groups_N)
    disagreeing_accuracy_G = disagreeing_groups(answers["accuracy"], groups_N)
    metrics: dict[str, float] = {}
    for modality, chosen_N in ((Modality.SPEECH, is_speech_N), (Modality.TEXT, ~is_speech_N)):
        for name, values_N in answers.items():
            metrics[f"{name}/{modality}"] = values_N[chosen_N].mean().item()
        metrics[f"reward/{modality}"] = rewards_N[chosen_N].mean().item()
        metrics[f"length/{modality}"] = lengths_N[chosen_N].mean().item()
        metrics[f"truncated/{modality}"] = truncated_N[chosen_N].mean().item()
        groups = groups_N[chosen_N].unique()
        metrics[f"disagreeing/{modality}"] = disagreeing_accuracy_G[groups].float().mean().item()
        metrics[f"without_backward/{modality}"] = 1.0 - trained_G[groups].mean().item()
    metrics["reward/representation"] = representation_N[is_speech_N].mean().item()
    metrics["reward/behaviour"] = behaviour_N[is_speech_N].mean().item()
    metrics["reward/without_reference"] = 1.0 - has_reference_N[is_speech_N].float().mean().item()
    metrics["staleness"] = max(rollout.staleness for rollout, _ in parts)
    metrics["disagreeing/any"] = disagreeing_G.float().mean().item()
    return metrics
