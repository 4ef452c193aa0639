"""The losses in plain PyTorch, from log-probabilities and entropies: the specification of what kernels compute.

Formulas are held to the code of TRL, verl and Liger by tests. Shapes: T packed tokens, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tars_kernels.objective import GMPO_FLOOR, MAX_EXPONENT, VESPO_RANGE, Objective, PolicyLoss, TokenTerms


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Log-probabilities [T] of unmasked tokens and what a loss takes beside them; 0 where masked out."""

    terms: TokenTerms
    keep: Tensor
    logprobs: Tensor
    old: Tensor
    advantages: Tensor

    @property
    def objective(self) -> Objective:
        return self.terms.objective

    def given(self, vector: Tensor) -> Tensor:
        return vector.detach().to(self.logprobs.dtype).masked_fill(~self.keep, 0.0)

    def sums(self, vector: Tensor) -> Tensor:
        """[T] sum over each token's sequence."""
        numbers, cu_seqlens = self.terms.sequence_numbers, self.objective.cu_seqlens
        assert numbers is not None, "token_terms refuses what needs it"
        assert cu_seqlens is not None
        return vector.new_zeros(len(cu_seqlens) - 1).index_add(0, numbers, vector)[numbers]

    def means(self, vector: Tensor) -> Tensor:
        """[T] mean over the unmasked tokens of each token's sequence."""
        return self.sums(vector) / self.sums(self.keep.to(vector.dtype)).clamp(min=1)

    def log_ratio(self) -> Tensor:
        """[T] logarithm of r at its level."""
        log_ratio, level = self.logprobs - self.old, self.objective.formula.ratio_level
        if level == "token":
            return log_ratio
        if level == "sequence":
            return self.means(log_ratio)
        # Its value is the sequence's, its gradient the token's own.
        return log_ratio - log_ratio.detach() + self.means(log_ratio.detach())


@dataclass(frozen=True, eq=False)
class _Importance:
    """Importance weights [T]."""

    ratio: Tensor
    """As they are."""
    weights: Tensor
    """Within their bounds."""
    outside: Tensor
    """Whether they were outside."""


def _bounded_exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=MAX_EXPONENT).exp()


def _where(condition: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """In the dtype of `like`, not in float32 as numbers alone would be."""
    return torch.full_like(like, other).masked_fill(condition, one)


def _importance(tokens: _Tokens) -> _Importance:
    objective = tokens.objective
    if objective.importance_weights is not None:
        weights = tokens.given(objective.importance_weights)
        return _Importance(weights, weights, torch.zeros_like(tokens.keep))
    ratio = torch.ones_like(tokens.old)
    if objective.rollout_logprobs is not None:
        # The rollout engine has no log-probability to report: no correction (TRL).
        difference = (tokens.old - tokens.given(objective.rollout_logprobs)).nan_to_num(nan=0.0)
        if objective.importance_level == "sequence":
            difference = tokens.sums(difference)
        ratio = _bounded_exp(difference)
    floor, cap = objective.importance_bounds
    outside = (ratio > cap) | (ratio < floor)
    truncates = objective.importance_mode == "truncate"
    weights = ratio.clamp(floor, cap) if truncates else ratio.masked_fill(outside, 0.0)
    return _Importance(ratio, weights, outside)


def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms) -> PolicyLoss:
    """The loss from log-probabilities and entropies [T]."""
    terms = terms.of_top_entropy(entropy)
    objective = terms.objective
    keep = torch.ones_like(logprobs, dtype=torch.bool) if terms.keep is None else terms.keep

    def masked(vector: Tensor) -> Tensor:
        return vector.to(logprobs.dtype).masked_fill(~keep, 0.0)

    logprobs, entropy, advantages = masked(logprobs), masked(entropy), masked(terms.advantages)
    old = logprobs.detach() if objective.old_logprobs is None else masked(objective.old_logprobs.detach())
    tokens = _Tokens(terms, keep, logprobs, old, advantages)
    importance = _importance(tokens)
    log_ratio = tokens.log_ratio()
    losses, clipped_low, clipped_high = _policy_terms(tokens, log_ratio, importance.weights)
    if terms.acts is not None:
        losses = losses * terms.acts
    if objective.off_policy_threshold is not None:
        losses = losses * ((advantages >= 0) | (_drift(tokens) <= objective.off_policy_threshold))
    kl = torch.zeros_like(losses)
    if objective.ref_logprobs is not None:
        kl = _kl_terms(objective, logprobs - tokens.given(objective.ref_logprobs), log_ratio)
    if objective.kl_coef != 0:
        losses = losses + objective.kl_coef * kl
    loss = (losses * terms.weights).sum()
    if objective.entropy_coef != 0:
        loss = loss - ((entropy if terms.acts is None else entropy * terms.acts).sum() * terms.entropy_weight)

    kept_ratio = importance.ratio.masked_fill(~keep, 0.0)
    fractions = [(event & keep).sum() / terms.num_kept for event in (clipped_low, clipped_high, importance.outside)]
    return PolicyLoss(
        loss=loss,
        logprobs=logprobs.detach(),
        entropy=entropy.detach(),
        clip_low_fraction=fractions[0],
        clip_high_fraction=fractions[1],
        importance_mean=kept_ratio.sum() / terms.num_kept,
        importance_max=kept_ratio.max() if len(kept_ratio) else kept_ratio.sum(),
        importance_capped_fraction=fractions[2],
        token_losses=losses.detach().masked_fill(~keep, 0.0),
        kl=kl.detach().masked_fill(~keep, 0.0),
    )


def _policy_terms(tokens: _Tokens, log_ratio: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T] losses without KL, and which tokens were held back from below and from above."""
    objective, advantages, logprobs = tokens.objective, tokens.advantages, tokens.logprobs
    loss, (low, high) = objective.formula.loss, objective.clip_bounds
    never = torch.zeros_like(tokens.keep)
    ratio = _bounded_exp(log_ratio)
    if loss == "ppo":
        bounded = ratio if objective.dual_clip is None else ratio.clamp(max=objective.dual_clip)
        losses = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
        return losses * importance, (bounded < low) & (advantages < 0), (bounded > high) & (advantages > 0)
    if loss == "sapo":
        temperature = _where(advantages > 0, *objective.sapo_temperatures, advantages)
        gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
        return -gate * advantages * importance, never, never
    if loss == "gmpo":
        return _gmpo_terms(tokens, importance)
    # The others are -factor * A * logprob, with a factor that is held constant.
    clipped_low = clipped_high = never
    if loss == "reinforce":
        factor = torch.ones_like(logprobs)
    elif loss == "cispo":
        factor = ratio.detach().clamp(low, high)
        clipped_low, clipped_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    elif loss == "vespo":
        factor, importance = _vespo_weights(tokens, log_ratio.detach(), importance), torch.ones_like(importance)
    else:
        fell, rose = _moved_too_far(objective, logprobs.detach(), tokens.old)
        clipped_low, clipped_high = fell & (advantages <= 0), rose & (advantages > 0)
        factor = ratio.detach() if objective.dual_clip is None else ratio.detach().clamp(max=objective.dual_clip)
        factor = factor.masked_fill(clipped_low | clipped_high, 0.0)
    return -factor * advantages * logprobs * importance, clipped_low, clipped_high


def _gmpo_terms(tokens: _Tokens, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    advantages, log_ratio, (low, high) = tokens.advantages, tokens.logprobs - tokens.old, tokens.objective.clip_bounds
    held = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low)).masked_fill(advantages == 0, 0.0)
    log_importance = tokens.means((importance + GMPO_FLOOR).log().masked_fill(~tokens.keep, 0.0))
    losses = -advantages * _bounded_exp(tokens.means(held)) * log_importance.exp()
    return losses, (log_ratio < low) & (advantages < 0), (log_ratio > high) & (advantages > 0)


def _vespo_weights(tokens: _Tokens, log_ratio: Tensor, importance: Tensor) -> Tensor:
    """[T] gamma weight of each token's sequence, 1 at a ratio of 1."""
    objective = tokens.objective
    log_weight = log_ratio.clamp(-20.0, 20.0) + importance.log().clamp(*VESPO_RANGE)
    log_weight = tokens.sums(log_weight.masked_fill(~tokens.keep, 0.0)).clamp(*VESPO_RANGE)
    parameters = zip(objective.vespo_positive, objective.vespo_negative, strict=True)
    shape, rate = (_where(tokens.advantages >= 0, *pair, log_weight) for pair in parameters)
    rate = rate.clamp(min=1e-4)
    return (rate + shape * log_weight - rate * log_weight.exp()).exp()


def _moved_too_far(objective: Objective, logprobs: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """[T] whether a token's probability fell, or rose, by more than its bound (arXiv 2602.04879)."""
    (low, high), p, old_p = objective.clip_bounds, logprobs.exp(), old.exp()
    if objective.formula.loss == "dppo-tv":
        return p - old_p < -low, p - old_p > high
    divergence = old_p * (old - logprobs) + (1 - old_p) * ((1 - old_p + 1e-8) / (1 - p + 1e-8)).log()
    return (divergence > low) & (p < old_p), (divergence > high) & (p > old_p)


def _drift(tokens: _Tokens) -> Tensor:
    """[T] mean over each token's sequence of how much likelier the tokens were to the policy that sampled them."""
    rollout = tokens.objective.rollout_logprobs
    sampled = tokens.old if rollout is None else tokens.given(rollout)
    return tokens.means((sampled - tokens.logprobs.detach()).nan_to_num(nan=0.0))


def _kl_terms(objective: Objective, difference: Tensor, log_ratio: Tensor) -> Tensor:
    """[T] from logprob - ref."""
    estimator = objective.kl_estimator
    square = 0.5 * difference.square()
    kl = {"1": difference, "2": square, "3": _bounded_exp(-difference) + difference - 1}[estimator[1]]
    if estimator.endswith("+"):
        kl = square - square.detach() + kl.detach()
    return kl * _bounded_exp(log_ratio) if objective.kl_bias_correction else kl
