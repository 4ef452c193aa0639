"""Clipped asymmetric policy-gradient losses, from logits and from hidden states.

From logits, one launch reads a row, computes its token's loss, and writes the gradient over a second sweep of the row, which
by then lies in the L2 cache; the upstream gradient is unknown there, so the backward pass launches a kernel that reads it on
the device and returns at once if it is 1. Losses that couple the tokens of a sequence (gspo, sequence-level importance), fp16
logits (whose gradient underflows before a loss scaler has multiplied it) and differentiable biases take two sweeps in two
launches. From hidden states, the loss stands on `linear_logprob`.

Every loss type is one function of a token's log-probability, `_token_loss`. Formulas are TRL's, see `Objective`.

Shapes: T tokens, N sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tars_kernels import reference
from tars_kernels.backend import isolated, runs_kernels
from tars_kernels.checks import (
    check_bias,
    check_floats,
    check_head,
    check_rows_contiguous,
    check_same_device,
    check_targets,
    check_temperature,
    head_parameters,
)
from tars_kernels.linear_logprob import logprob_and_entropy, rows_forward, rows_gradient
from tars_kernels.objective import Objective, ObjectiveSettings, PolicyLoss, TokenTerms, shows_settings
from tars_kernels.rows import LOG2E, fill_row, load_tile, scan_row, store_tile, tile, write_gradient

_LOW, _HIGH, _CAPPED = (tl.constexpr(bit) for bit in (1, 2, 4))
_BLOCK = 1024
"""Tokens that one program of a per-token kernel handles at once."""


@triton.jit
def _importance(difference, cap, MASKS: tl.constexpr):
    """exp(difference) before and after the cap; a difference of NaN means that there is no log-probability to correct with."""
    ratio = tl.exp(tl.where(difference == difference, difference, 0.0))
    capped = tl.where(ratio > cap, 0.0 if MASKS else cap, ratio)
    return ratio, capped


@triton.jit
def _token_loss(
    logprob, ratio, advantage, importance, ref_logprob, low, high, dual_clip, kl_coef,
    IS_CISPO: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
):  # fmt: skip
    """A token's loss, its slopes by the log-ratio and (KL) by the log-probability, and which bound holds it back."""
    if IS_CISPO:
        slope = -tl.where(ratio > high, high, ratio) * advantage * importance
        loss = slope * logprob
        is_low = ratio < 0
        is_high = (ratio > high) & (advantage > 0)
    else:
        bounded = ratio
        bounded_slope = ratio
        if HAS_DUAL_CLIP:
            bounded = tl.where(ratio > dual_clip, dual_clip, ratio)
            bounded_slope = tl.where(ratio > dual_clip, 0.0, ratio)
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        clipped_slope = tl.where((ratio < low) | (ratio > high), 0.0, ratio)
        first = bounded * advantage
        second = clipped * advantage
        # Where both sides of the minimum are equal, autograd takes half of each slope.
        chosen = tl.where(first < second, bounded_slope, clipped_slope)
        chosen = tl.where(first == second, 0.5 * (bounded_slope + clipped_slope), chosen)
        loss = -tl.where(second < first, second, first) * importance
        slope = -chosen * advantage * importance
        is_low = (bounded < low) & (advantage < 0)
        is_high = (bounded > high) & (advantage > 0)
    kl_slope = 0.0
    if HAS_KL:
        to_reference = ref_logprob - logprob
        power = tl.exp(to_reference)
        loss += kl_coef * (power - to_reference - 1.0)
        kl_slope = kl_coef * (1.0 - power)
    return loss, slope, kl_slope, is_low, is_high


@triton.jit
def _fused_rows(
    gradient,  # [T, V]
    logits,  # [T, V]
    bias,  # [V]
    targets, advantages, weights, old_logprobs, rollout_logprobs, ref_logprobs,  # [T]
    losses, logprobs, entropies, ratios, events,  # [T]
    entropy_weight,  # []
    V, logits_stride, inverse_temperature, low, high, dual_clip, importance_cap, kl_coef,
    HAS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr, IS_CISPO: tl.constexpr,
    MASKS_IMPORTANCE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + pid)
    if weight == 0:
        tl.store(losses + pid, 0.0)
        tl.store(logprobs + pid, 0.0)
        tl.store(entropies + pid, 0.0)
        tl.store(ratios + pid, 0.0)
        tl.store(events + pid, 0)
        if HAS_GRADIENT:
            fill_row(gradient + pid * V, V, ROWS, LANES)
        return
    row = logits + pid * logits_stride
    scale = inverse_temperature * LOG2E
    target = tl.load(targets + pid).to(tl.int64)
    _, _, logprob, entropy, rest, peak, total = scan_row(row, bias, target, V, scale, HAS_BIAS, ROWS, LANES)

    old = logprob
    if HAS_OLD:
        old = tl.load(old_logprobs + pid).to(tl.float32)
    importance_ratio = 1.0
    importance = 1.0
    if HAS_ROLLOUT:
        difference = old - tl.load(rollout_logprobs + pid).to(tl.float32)
        importance_ratio, importance = _importance(difference, importance_cap, MASKS_IMPORTANCE)
    ref_logprob = 0.0
    if HAS_KL:
        ref_logprob = tl.load(ref_logprobs + pid).to(tl.float32)
    loss, slope, kl_slope, is_low, is_high = _token_loss(
        logprob, tl.exp(logprob - old), tl.load(advantages + pid), importance, ref_logprob, low, high, dual_clip, kl_coef,
        IS_CISPO, HAS_DUAL_CLIP, HAS_KL,
    )  # fmt: skip
    loss *= weight
    entropy_slope = 0.0
    if HAS_ENTROPY:
        entropy_slope = -tl.load(entropy_weight)
        loss += entropy_slope * entropy
    tl.store(losses + pid, loss)
    tl.store(logprobs + pid, logprob)
    tl.store(entropies + pid, entropy)
    tl.store(ratios + pid, importance_ratio)
    is_capped = importance_ratio > importance_cap
    tl.store(events + pid, is_low.to(tl.int32) * _LOW + is_high.to(tl.int32) * _HIGH + is_capped.to(tl.int32) * _CAPPED)
    if HAS_GRADIENT:
        slope = (slope + kl_slope) * weight * inverse_temperature
        entropy_slope *= inverse_temperature
        if (slope == 0) & (entropy_slope == 0):
            fill_row(gradient + pid * V, V, ROWS, LANES)
        else:
            # The gradient may take the place of the logits, whose target some threads may not have read yet.
            tl.debug_barrier()
            write_gradient(
                gradient + pid * V, row, bias, target, V, scale, peak, total, rest, logprob, entropy, slope, entropy_slope,
                HAS_BIAS, HAS_ENTROPY, ROWS, LANES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _segments(
    slopes, losses, ratios, events,  # [T]
    logprobs, advantages, weights, old_logprobs, rollout_logprobs, ref_logprobs,  # [T]
    cu_seqlens,  # [N + 1]
    T, low, high, dual_clip, importance_cap, kl_coef,
    HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
    IS_CISPO: tl.constexpr, MASKS_IMPORTANCE: tl.constexpr, SEQUENCE_RATIO: tl.constexpr, SEQUENCE_IMPORTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses and slopes from log-probabilities: a program takes a sequence, or a block of tokens where none are coupled."""
    pid = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if SEQUENCE_RATIO or SEQUENCE_IMPORTANCE:
        # Boundaries that are wrong must not lead outside of the memory.
        first = tl.maximum(tl.load(cu_seqlens + pid).to(tl.int64), 0)
        last = tl.minimum(tl.load(cu_seqlens + pid + 1).to(tl.int64), T)
    else:
        first = pid * BLOCK
        last = tl.minimum(first + BLOCK, T)

    count = 0.0
    log_ratio_sum = 0.0
    difference_sum = 0.0
    if SEQUENCE_RATIO or SEQUENCE_IMPORTANCE:
        for start in range(first, last, BLOCK):
            tokens = start + offsets
            keep = tl.load(weights + tokens, mask=tokens < last, other=0.0) != 0
            logprob = tl.load(logprobs + tokens, mask=keep, other=0.0)
            old = logprob
            if HAS_OLD:
                old = tl.load(old_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
            count += tl.sum(keep.to(tl.float32), 0)
            log_ratio_sum += tl.sum(logprob - old, 0)
            if HAS_ROLLOUT:
                difference = old - tl.load(rollout_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
                difference_sum += tl.sum(tl.where(difference == difference, difference, 0.0), 0)
        count = tl.maximum(count, 1.0)

    slope_sum = 0.0
    for start in range(first, last, BLOCK):
        tokens = start + offsets
        inside = tokens < last
        weight = tl.load(weights + tokens, mask=inside, other=0.0)
        keep = weight != 0
        logprob = tl.load(logprobs + tokens, mask=keep, other=0.0)
        old = logprob
        if HAS_OLD:
            old = tl.load(old_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
        log_ratio = logprob - old
        if SEQUENCE_RATIO:
            log_ratio = tl.zeros_like(log_ratio) + log_ratio_sum / count
        importance_ratio = tl.full([BLOCK], 1.0, tl.float32)
        importance = importance_ratio
        if HAS_ROLLOUT:
            difference = old - tl.load(rollout_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
            if SEQUENCE_IMPORTANCE:
                difference = tl.zeros_like(difference) + difference_sum
            importance_ratio, importance = _importance(difference, importance_cap, MASKS_IMPORTANCE)
        ref_logprob = logprob
        if HAS_KL:
            ref_logprob = tl.load(ref_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
        advantage = tl.load(advantages + tokens, mask=keep, other=0.0)
        loss, slope, kl_slope, is_low, is_high = _token_loss(
            logprob, tl.exp(log_ratio), advantage, importance, ref_logprob, low, high, dual_clip, kl_coef,
            IS_CISPO, HAS_DUAL_CLIP, HAS_KL,
        )  # fmt: skip
        slope_sum += tl.sum(tl.where(keep, slope * weight, 0.0), 0)
        if SEQUENCE_RATIO:
            slope = tl.zeros_like(slope)
        is_capped = importance_ratio > importance_cap
        event = is_low.to(tl.int32) * _LOW + is_high.to(tl.int32) * _HIGH + is_capped.to(tl.int32) * _CAPPED
        tl.store(slopes + tokens, tl.where(keep, (slope + kl_slope) * weight, 0.0), mask=inside)
        tl.store(losses + tokens, tl.where(keep, loss * weight, 0.0), mask=inside)
        tl.store(ratios + tokens, tl.where(keep, importance_ratio, 0.0), mask=inside)
        tl.store(events + tokens, tl.where(keep, event, 0), mask=inside)
    if SEQUENCE_RATIO:
        tl.debug_barrier()
        # Every token moves the sequence's ratio by 1 / count.
        for start in range(first, last, BLOCK):
            tokens = start + offsets
            keep = tl.load(weights + tokens, mask=tokens < last, other=0.0) != 0
            slope = tl.load(slopes + tokens, mask=keep, other=0.0)
            tl.store(slopes + tokens, slope + slope_sum / count, mask=keep)


@triton.jit(do_not_specialize=["T"])
def _summary(
    statistics,  # [6]
    losses, ratios, events,  # [T]
    num_kept,  # []
    T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, fractions and importance statistics by one program, so that sums are taken in one order."""
    loss = 0.0
    low = 0.0
    high = 0.0
    capped = 0.0
    ratio_sum = 0.0
    ratio_max = 0.0
    for start in range(0, T, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < T
        loss += tl.sum(tl.load(losses + tokens, mask=inside, other=0.0), 0)
        event = tl.load(events + tokens, mask=inside, other=0)
        low += tl.sum((event & _LOW).to(tl.float32), 0)
        high += tl.sum((event & _HIGH).to(tl.float32), 0)
        capped += tl.sum((event & _CAPPED).to(tl.float32), 0)
        ratio = tl.load(ratios + tokens, mask=inside, other=0.0)
        ratio_sum += tl.sum(ratio, 0)
        ratio_max = tl.maximum(ratio_max, tl.max(ratio, 0))
    kept = tl.load(num_kept)
    tl.store(statistics + 0, loss)
    tl.store(statistics + 1, low / (_LOW * kept))
    tl.store(statistics + 2, high / (_HIGH * kept))
    tl.store(statistics + 3, ratio_sum / kept)
    tl.store(statistics + 4, ratio_max)
    tl.store(statistics + 5, capped / (_CAPPED * kept))


@triton.jit
def _scale_rows(gradient, scale, V, ROWS: tl.constexpr, LANES: tl.constexpr):
    """gradient [T, V] times scale []; nothing to do for the 1 that `loss.backward()` brings."""
    factor = tl.load(scale)
    if factor != 1:
        row = gradient + tl.program_id(0).to(tl.int64) * V
        for start in range(0, V, ROWS * LANES):
            store_tile(row, load_tile(row, row, start, V, False, ROWS, LANES) * factor, start, V, ROWS, LANES)


class _TokenOutputs:
    """What per-token kernels write, and the statistics of it."""

    def __init__(self, num_tokens: int, device: torch.device):
        # Tokens that belong to no sequence count for nothing.
        self.losses = torch.zeros(num_tokens, dtype=torch.float32, device=device)
        self.ratios = torch.zeros_like(self.losses)
        self.events = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def statistics(self, terms: TokenTerms) -> Tensor:
        """[6] loss, clip_low_fraction, clip_high_fraction, importance_mean, importance_max, importance_capped_fraction."""
        statistics = self.losses.new_empty(6)
        _summary[(1,)](statistics, self.losses, self.ratios, self.events, terms.num_kept, len(self.losses), BLOCK=4 * _BLOCK)
        return statistics


def _scalars(objective: Objective) -> tuple[float, ...]:
    low, high = objective.ratio_bounds
    return low, high, objective.dual_clip or 0.0, objective.importance_cap, objective.kl_coef


def _flags(objective: Objective) -> dict[str, bool]:
    return {
        "HAS_OLD": objective.old_logprobs is not None,
        "HAS_ROLLOUT": objective.rollout_logprobs is not None,
        "HAS_DUAL_CLIP": objective.dual_clip is not None,
        "HAS_KL": objective.kl_coef != 0,
        "IS_CISPO": objective.loss_type == "cispo",
        "MASKS_IMPORTANCE": objective.importance_mode == "mask",
    }


def _vectors(objective: Objective) -> list[Tensor | None]:
    vectors = (objective.old_logprobs, objective.rollout_logprobs, objective.ref_logprobs)
    return [None if vector is None else vector.detach().contiguous() for vector in vectors]


class _FusedPolicyLoss(torch.autograd.Function):
    @staticmethod
    @isolated
    def forward(ctx, logits, bias, targets, terms, objective, inverse_temperature, has_gradient, inplace):
        num_tokens, vocabulary = logits.shape
        outputs = _TokenOutputs(num_tokens, logits.device)
        logprobs, entropies = torch.empty_like(outputs.losses), torch.empty_like(outputs.losses)
        gradient = None
        if has_gradient:
            gradient = logits if inplace else torch.empty_like(logits)
        if num_tokens:
            _fused_rows[(num_tokens,)](
                gradient, logits, bias, targets, terms.advantages, terms.weights, *_vectors(objective),
                outputs.losses, logprobs, entropies, outputs.ratios, outputs.events, terms.entropy_weight,
                vocabulary, logits.stride(0), inverse_temperature, *_scalars(objective),
                HAS_GRADIENT=has_gradient, HAS_BIAS=bias is not None, HAS_ENTROPY=objective.entropy_coef != 0,
                **_flags(objective), **tile(vocabulary),
            )  # fmt: skip
        if has_gradient and inplace:
            torch.autograd.graph.increment_version(logits)
        ctx.gradient = gradient
        statistics = outputs.statistics(terms)
        ctx.mark_non_differentiable(logprobs, entropies, statistics)
        return statistics[0].clone(), logprobs, entropies, statistics

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        if ctx.gradient is None:
            raise RuntimeError("policy_loss: backward a second time; its gradient was handed out the first time")
        gradient, ctx.gradient = ctx.gradient, None
        num_tokens, vocabulary = gradient.shape
        if num_tokens:
            _scale_rows[(num_tokens,)](gradient, upstreams[0], vocabulary, **tile(vocabulary))
        return gradient, *[None] * 7


class _SoftmaxTerms(torch.autograd.Function):
    """Log-probabilities and entropies of logits that exist, with the gradient in a launch of its own."""

    @staticmethod
    @isolated
    def forward(ctx, logits, bias, targets, inverse_temperature, entropy_gradient, inplace):
        num_tokens, vocabulary = logits.shape
        logprobs, entropies, rests, peaks, totals = (
            torch.empty(num_tokens, dtype=torch.float32, device=logits.device) for _ in range(5)
        )
        if num_tokens:
            rows_forward[(num_tokens,)](
                logits, bias, targets, logprobs, entropies, rests, peaks, totals, None, None, None, vocabulary,
                logits.stride(0), inverse_temperature, HAS_BIAS=bias is not None, HAS_POWERS=False, HAS_ENTROPY=False,
                **tile(vocabulary),
            )  # fmt: skip
        # Copies of what goes out, which may be changed there.
        ctx.save_for_backward(logits, bias, targets, logprobs.clone(), entropies.clone(), rests, peaks, totals)
        ctx.inverse_temperature = inverse_temperature
        ctx.entropy_gradient = entropy_gradient
        ctx.inplace = inplace
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        slopes, entropy_slopes = upstreams
        logits, bias, targets, *row_values = ctx.saved_tensors
        slopes = torch.zeros_like(row_values[0]) if slopes is None else slopes.contiguous()
        has_entropy = ctx.entropy_gradient and entropy_slopes is not None
        # What is overwritten counts as modified, so that autograd refuses to come here a second time.
        gradient = logits if ctx.inplace else torch.empty_like(logits)
        entropy_slopes = entropy_slopes.contiguous() if has_entropy else None
        rows_gradient(gradient, logits, bias, targets, slopes, entropy_slopes, row_values, ctx.inverse_temperature)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        bias_gradient = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return gradient, bias_gradient, None, None, None, None


class _TokenLoss(torch.autograd.Function):
    """The loss from log-probabilities and entropies [T]."""

    @staticmethod
    @isolated
    def forward(ctx, logprobs, entropies, terms, objective):
        num_tokens = len(logprobs)
        outputs = _TokenOutputs(num_tokens, logprobs.device)
        slopes = torch.zeros_like(logprobs)
        cu_seqlens = objective.cu_seqlens.contiguous() if objective.by_sequence else None
        programs = triton.cdiv(num_tokens, _BLOCK) if cu_seqlens is None else len(cu_seqlens) - 1
        if programs:
            _segments[(programs,)](
                slopes, outputs.losses, outputs.ratios, outputs.events, logprobs, terms.advantages, terms.weights,
                *_vectors(objective), cu_seqlens, num_tokens, *_scalars(objective), **_flags(objective),
                SEQUENCE_RATIO=objective.loss_type == "gspo",
                SEQUENCE_IMPORTANCE=objective.by_sequence and objective.importance_level == "sequence",
                BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
        statistics = outputs.statistics(terms)
        loss = statistics[0].clone()
        entropy_slopes = None
        if objective.entropy_coef != 0:
            is_masked = terms.weights == 0
            entropy_slopes = (-terms.entropy_weight).expand(num_tokens).masked_fill(is_masked, 0.0)
            loss += (entropies.masked_fill(is_masked, 0.0) * entropy_slopes).sum()
        ctx.save_for_backward(slopes, entropy_slopes)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        upstream, _ = upstreams
        slopes, entropy_slopes = ctx.saved_tensors
        return slopes * upstream, None if entropy_slopes is None else entropy_slopes * upstream, None, None


def _result(loss: Tensor, logprobs: Tensor, entropies: Tensor, statistics: Tensor) -> PolicyLoss:
    _, low, high, mean, largest, capped = statistics.unbind()
    return PolicyLoss(loss, logprobs.detach(), entropies.detach(), low, high, mean, largest, capped)


def _token_loss_of(logprobs: Tensor, entropies: Tensor, terms: TokenTerms, objective: Objective) -> PolicyLoss:
    loss, statistics = _TokenLoss.apply(logprobs, entropies, terms, objective)
    if terms.keep is not None:
        logprobs, entropies = (vector.detach().masked_fill(~terms.keep, 0.0) for vector in (logprobs, entropies))
    return _result(loss, logprobs, entropies, statistics)


@shows_settings
def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    inplace: bool = False,
    **objective: Unpack[ObjectiveSettings],
) -> PolicyLoss:
    if not runs_kernels(logits):
        return reference.policy_loss(
            logits, targets, advantages, bias=bias, temperature=temperature, inplace=inplace, **objective
        )
    settings = Objective.from_keywords(objective)
    check_floats("logits", logits, (None, None))
    check_rows_contiguous("logits", logits)
    check_same_device(("logits", logits), targets=targets, bias=bias)
    check_targets(targets, len(logits), logits.shape[1], settings.mask)
    check_bias(bias, logits.shape[1])
    check_temperature(temperature)
    terms = settings.token_terms(targets, advantages)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    recording = torch.is_grad_enabled()
    differentiable_bias = recording and bias is not None and bias.requires_grad
    if inplace and not logits.is_contiguous():
        raise ValueError(f"inplace: True for logits with row stride {logits.stride(0)}; pass logits.contiguous()")
    if settings.by_sequence or differentiable_bias or logits.dtype == torch.float16:
        logprobs, entropies = _SoftmaxTerms.apply(logits, bias, targets, 1.0 / temperature, settings.entropy_coef != 0, inplace)
        return _token_loss_of(logprobs, entropies, terms, settings)
    return _result(
        *_FusedPolicyLoss.apply(
            logits, bias, targets, terms, settings, 1.0 / temperature, recording and logits.requires_grad, inplace
        )
    )


@shows_settings
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    **objective: Unpack[ObjectiveSettings],
) -> PolicyLoss:
    if not runs_kernels(hidden):
        return reference.linear_policy_loss(
            hidden, weight, targets, advantages, bias=bias, temperature=temperature, **objective
        )
    settings = Objective.from_keywords(objective)
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=False)
    check_rows_contiguous("weight", weight)
    check_same_device(("hidden", hidden), targets=targets)
    check_targets(targets, len(hidden), len(weight), settings.mask)
    check_temperature(temperature)
    terms = settings.token_terms(targets, advantages)
    if terms.keep is not None:
        # Masked slots may hold anything: nan in a state would reach the head's gradient, a target lie outside the vocabulary.
        hidden = hidden.masked_fill(~terms.keep[:, None], 0.0)
        targets = targets.masked_fill(~terms.keep, 0)
    logprobs, entropies = logprob_and_entropy(
        hidden, weight, bias, targets, temperature, entropy_gradient=settings.entropy_coef != 0
    )
    return _token_loss_of(logprobs, entropies, terms, settings)


policy_loss.__doc__ = reference.policy_loss.__doc__
linear_policy_loss.__doc__ = reference.linear_policy_loss.__doc__
