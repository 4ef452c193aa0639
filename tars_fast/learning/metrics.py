"""Figures of a step's tokens and completions, from the rollouts of all processes, and the checks that stop a run on them.

Shapes: N completions, G groups.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from tars_kernels import PolicyLoss
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import centred_advantages, disagreeing_groups, group_means
from tars_fast.learning.scored import ScoredRollout
from tars_fast.types import Modality, TrainingError

MAX_LOGPROB_DIFF = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""Default of --max-logprob-diff: far above rounding (about 1e-7 and 4e-3 nats here), below what a different policy makes."""
ALIGNMENT = ("representation", "behaviour")
"""R_rep and R_beh, of spoken completions alone."""
_NO_REWARDS = ("length", "truncated", "is_speech", "without_reference", "trained", "group", "centred", "staleness")
"""Columns beside R and its terms."""
MAX_EMPTY_STEPS = 3
"""Consecutive steps with every completion cut off, after which waiting longer is pointless."""
LOOKED_BACK = 1000
"""Steps whose metrics are kept for `check_progress`; a bound, because a run may have any number."""
MAX_UNANIMOUS_STEPS = 10
"""Consecutive steps in which no group disagreed in its rewards before a warning repeats."""


class BackwardPass(NamedTuple):
    """What one backward pass went through."""

    loss: Tensor
    """[] of all terms."""
    policy: PolicyLoss | None
    """None without a policy gradient."""
    num_tokens: int
    """Unmasked tokens."""
    anchor_sum: Tensor | None = None
    """[] divergences of `--text-anchor kl`, summed over distilled tokens."""


def token_sums(losses: Sequence[BackwardPass], scored: ScoredRollout) -> dict[str, float]:
    """Sums over the unmasked tokens of a rollout, from which `token_metrics` makes means.

    Args:
        losses: of each backward pass.
    """
    completions = scored.rollout.completions
    device = scored.logprobs[0].device
    mask = torch.tensor([not c.truncated for c in completions for _ in c.token_ids], device=device)
    is_speech = torch.tensor([c.modality is Modality.SPEECH for c in completions for _ in c.token_ids], device=device)
    rollout_logprobs = torch.tensor([x for c in completions for x in c.rollout_logprobs], device=device)
    entropy = torch.cat(scored.entropies).float()
    difference = (torch.cat(scored.logprobs) - rollout_logprobs).masked_fill_(~mask, 0.0)
    zero = torch.zeros((), device=device)
    policies = [(part.policy, part.num_tokens) for part in losses if part.policy is not None]
    distilled = [values for values in scored.divergences if len(values)]
    sums = {
        "loss": sum((part.loss for part in losses), zero),
        "tokens": mask.sum(),
        "tokens/speech": (mask & is_speech).sum(),
        "entropy/speech": (entropy * (mask & is_speech)).sum(),
        "entropy/text": (entropy * (mask & ~is_speech)).sum(),
        "trained": zero + sum(part.num_tokens for part in losses),
        "clip/low": sum((policy.clip_low_fraction * count for policy, count in policies), zero),
        "clip/high": sum((policy.clip_high_fraction * count for policy, count in policies), zero),
        "kl": sum((policy.kl.sum() for policy, _ in policies), zero),
        "distilled": zero + sum(map(len, distilled)),
        "divergence/speech": torch.cat(distilled).sum() if distilled else zero,
        "divergence/text": sum((part.anchor_sum for part in losses if part.anchor_sum is not None), zero),
        "importance_ratio": (difference.exp() * mask).sum(),
        "logprob_diff_mean": difference.abs().sum(),
        "logprob_diff_max": difference.abs().max() if len(difference) else zero,
    }
    # One wait for the device instead of one a figure.
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))


def token_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Token-level metrics of a step from the `token_sums` of every process.

    Clip fractions and KL are of trained tokens, divergences of distilled ones.
    """
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    counts = {"entropy/speech": total["tokens/speech"], "entropy/text": total["tokens"] - total["tokens/speech"]}
    counts |= {"clip/low": total["trained"], "clip/high": total["trained"], "kl": total["trained"]}
    counts |= {"divergence/speech": total["distilled"], "divergence/text": total["distilled"]}
    means = ["entropy/speech", "entropy/text", "clip/low", "clip/high", "kl", "divergence/speech", "divergence/text"]
    means += ["importance_ratio", "logprob_diff_mean"]
    metrics = {name: total[name] / max(1.0, counts.get(name, total["tokens"])) for name in means}
    return {"loss": total["loss"], **metrics, "logprob_diff_max": max(part["logprob_diff_max"] for part in parts)}


def check_agreement(metrics: Mapping[str, float], config: RunConfig, dtype: torch.dtype) -> None:
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


def check_written(metrics: Mapping[str, float], config: RunConfig) -> None:
    """Raises TrainingError where written answers have moved further than `--max-written-kl`."""
    moved = metrics.get("written_kl", 0.0)
    # By a comparison that stops for NaN.
    if not moved <= config.max_written_kl:
        raise TrainingError(
            f"step {metrics['step']}: written answers have moved by {moved:.3g} nats a token from the model before training, "
            f"more than --max-written-kl {config.max_written_kl}; use --teacher frozen, --text-anchor kl or a lower "
            "--learning-rate"
        )


def completion_columns(scored: ScoredRollout) -> dict[str, Tensor]:
    """[N] by name: what `completion_metrics` needs of a rollout, small enough to be sent to every process."""
    rollout = scored.rollout
    columns = {
        "reward": scored.rewards_N,
        "length": torch.tensor([float(len(completion.token_ids)) for completion in rollout.completions]),
        "truncated": torch.tensor([float(completion.truncated) for completion in rollout.completions]),
        "is_speech": torch.tensor([completion.modality is Modality.SPEECH for completion in rollout.completions]),
        "without_reference": torch.tensor([float(reference is None) for reference in rollout.references]),
        "trained": scored.trained_N.float(),
        "group": rollout.groups_N,
        "centred": scored.centred_N,
        "staleness": torch.full((len(rollout.completions),), float(rollout.staleness)),
    }
    return scored.terms | columns


def completion_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Completion-level metrics by modality, from the `completion_columns` of every process.

    Means of rewards are over completions that they apply to; there is no such figure where there are none.
    """
    first_group = 0
    shifted = []
    for part in parts:
        # Every process counts its groups from 0.
        shifted.append(part | {name: part[name] + first_group for name in ("group", "centred")})
        first_group += int(part["group"].max()) + 1
    columns = {name: torch.cat([part[name] for part in shifted]) for name in parts[0]}
    groups_N, is_speech_N = columns["group"], columns["is_speech"]
    is_graded_N, is_rewarded_N = ~columns["accuracy"].isnan(), ~columns["reward"].isnan()
    modalities = [
        (m, chosen_N) for m, chosen_N in ((Modality.SPEECH, is_speech_N), (Modality.TEXT, ~is_speech_N)) if chosen_N.any()
    ]
    disagreeing_accuracy_G = disagreeing_groups(columns["accuracy"], groups_N)
    trained_G = group_means(columns["trained"], groups_N)
    metrics: dict[str, float] = {}
    for modality, chosen_N in modalities:
        for name in columns:
            if name in ("trained", "group", "centred", "is_speech", "staleness", "without_reference", *ALIGNMENT):
                continue
            known_N = chosen_N & ~columns[name].isnan()
            if known_N.any():
                metrics[f"{name}/{modality}"] = columns[name][known_N].mean().item()
        if (chosen_N & is_graded_N).any():
            graded = groups_N[chosen_N & is_graded_N].unique()
            metrics[f"disagreeing/{modality}"] = disagreeing_accuracy_G[graded].float().mean().item()
        metrics[f"without_backward/{modality}"] = 1.0 - trained_G[groups_N[chosen_N].unique()].mean().item()
    compared_N = is_speech_N & is_graded_N
    if not is_speech_N.all() and compared_N.any():
        for name in (*ALIGNMENT, "without_reference"):
            if name in columns:
                metrics[f"reward/{name}"] = columns[name][compared_N].mean().item()
    metrics["staleness"] = columns["staleness"].max().item()
    if is_rewarded_N.any():
        centred_N = columns["centred"][is_rewarded_N].unique(return_inverse=True)[1]
        disagreeing_G = disagreeing_groups(columns["reward"][is_rewarded_N], centred_N)
        metrics["disagreeing/any"] = disagreeing_G.float().mean().item()
    return metrics | _spread(columns, modalities)


def _spread(columns: Mapping[str, Tensor], modalities: Sequence[tuple[Modality, Tensor]]) -> dict[str, float]:
    """By reward and modality the mean over groups of its population deviation, and the share of completions that it does not
    apply to."""
    metrics = {}
    for name, values_N in columns.items():
        for modality, chosen_N in modalities if name not in _NO_REWARDS else ():
            known_N = chosen_N & ~values_N.isnan()
            metrics[f"not_applicable/{name}/{modality}"] = 1.0 - (known_N.sum() / chosen_N.sum()).item()
            if not known_N.any():
                continue
            groups_N = columns["group"][known_N].unique(return_inverse=True)[1]
            squares_N = centred_advantages(values_N[known_N], groups_N).double().square()
            metrics[f"deviation/{name}/{modality}"] = group_means(squares_N, groups_N).sqrt().mean().item()
    return metrics


def heartbeat_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How evenly several processes work: of the seconds of each phase the least, the median and the most that one of them took.

    Args:
        parts: of every process its `seconds/<phase>`, and what went on `beside` an earlier step; a phase that it was not in
            took it 0 s.
    """
    if len(parts) == 1:
        return {}
    names = sorted({name for part in parts for name in part})
    phases = {name.removeprefix("seconds/"): [part.get(name, 0.0) for part in parts] for name in names}
    metrics: dict[str, float] = {}
    for phase, values in phases.items():
        figures = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        metrics |= {f"heartbeat/{phase}/{figure}": value for figure, value in figures.items()}
    return metrics


def check_progress(history: Sequence[Mapping[str, float]], warn: Callable[[str], None]) -> None:
    """Warn of what makes the last step useless, and stop where it will not get better by itself.

    Args:
        history: metrics of the last steps since the start, or since the run was resumed.

    Raises:
        TrainingError: every completion was cut off for several steps.
    """

    def is_empty(metrics: Mapping[str, float]) -> bool:
        # Distillation may train on completions that were cut off.
        names = [f"{name}/{modality}" for name in ("truncated", "without_backward") for modality in Modality]
        return all(metrics.get(name, 1) == 1 for name in names)

    if is_empty(history[-1]):
        warn(f"step {history[-1]['step']}: every completion was cut off; raise --max-new-tokens")
        earlier, recent = list(history)[:-MAX_EMPTY_STEPS], list(history)[-MAX_EMPTY_STEPS:]
        if len(recent) == MAX_EMPTY_STEPS and all(is_empty(metrics) for metrics in recent):
            remedy = "raise --max-new-tokens"
            if not all(is_empty(metrics) for metrics in earlier):
                remedy = "before that some ended: lower --learning-rate, and take --teacher frozen where the objective distils"
            raise TrainingError(f"every completion was cut off for {MAX_EMPTY_STEPS} steps; {remedy}")
        return
    unanimous = 0
    for metrics in reversed(history):
        # A teacher teaches where rewards are the same, too.
        if metrics.get("disagreeing/any") != 0 or "divergence/speech" in metrics or is_empty(metrics):
            break
        unanimous += 1
    if unanimous and (unanimous - 1) % MAX_UNANIMOUS_STEPS == 0:
        truncated, modality = max((history[-1].get(f"truncated/{modality}", 0.0), modality) for modality in Modality)
        remedy = (
            f"{100 * truncated:.0f} % of the {modality} completions were cut off, raise --max-new-tokens"
            if truncated > 0.5
            else "raise --temperature or choose items of middling difficulty"
        )
        warn(f"step {history[-1]['step']}: no group disagrees in its rewards, so there is nothing to learn; {remedy}")
