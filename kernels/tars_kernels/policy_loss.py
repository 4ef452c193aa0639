"""Clipped asymmetric policy-gradient losses, from logits and from hidden states.

Every loss type is one function of a token's log-probability, `_token_loss`. Formulas are TRL's, see `Objective`. Three ways
lead to it:
- `linear_policy_loss`, which the trainer of tars_fast calls: `linear_logprob.logprob_and_entropy`, then `_LossFromLogprobs`;
- `policy_loss`: `_LossFromLogits` in most cases;
- `policy_loss` in the cases below: `_LogprobFromLogits`, then `_LossFromLogprobs`.

`_LossFromLogits` is one launch: it reads a row of logits, computes its token's loss, and reads the row again, from the L2 cache
by then, to write the gradient. The upstream gradient is not known yet, so the backward pass launches a kernel that multiplies
by it, and returns at once if it is 1. It cannot serve losses that couple the tokens of a sequence (gspo, sequence-level
importance), fp16 logits (whose gradient underflows before a loss scaler has multiplied it) and biases that want a gradient.

Shapes: T tokens, N sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

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
from tars_kernels.linear_logprob import logprob_and_entropy
from tars_kernels.objective import Objective, ObjectiveSettings, PolicyLoss, TokenTerms, shows_settings
from tars_kernels.rows import (
    LOG2E,
    LogitRows,
    RowTerms,
    fill_row,
    load_tile,
    scan_row,
    store_tile,
    sweep_rows,
    tile,
    write_gradient,
    write_rows_gradient,
)

_LOW, _HIGH, _CAPPED = (tl.constexpr(bit) for bit in (1, 2, 4))
"""Bits of a token's `events`: its ratio fell below or rose above its bound, its importance weight was above the cap."""
_BLOCK = 1024
"""Tokens that one program of a per-token kernel handles at once."""


@triton.jit
def _importance_weight(difference, cap, MASKS: tl.constexpr):
    """exp(difference) before and after the cap; 1 for NaN, where the engine reported no log-probability."""
    ratio = tl.exp(tl.where(difference == difference, difference, 0.0))
    capped = tl.where(ratio > cap, 0.0 if MASKS else cap, ratio)
    return ratio, capped


@triton.jit
def _token_loss(  # noqa: PLR0913
    logprob, ratio, advantage, importance, ref_logprob, low, high, dual_clip, kl_coef,
    IS_CISPO: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
):  # fmt: skip
    """Loss of a token.

    Returns:
        the loss, its derivatives by the log-ratio and (KL term) by the log-probability, whether the ratio is clipped low, high.
    """
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
def _loss_from_logits(  # noqa: PLR0913
    # Written.
    gradient,  # [T, V]
    losses, logprobs, entropies, ratios, events,  # [T]
    # Read.
    logits,  # [T, V]
    bias,  # [V]
    targets, advantages, weights, old_logprobs, rollout_logprobs, ref_logprobs,  # [T]
    entropy_weight,  # []
    V, logits_stride, inverse_temperature,
    # Settings of the objective.
    low, high, dual_clip, importance_cap, kl_coef,
    HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
    IS_CISPO: tl.constexpr, MASKS_IMPORTANCE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    # What there is to read and write.
    HAS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Losses and, scaled by an upstream gradient of 1, their gradient: one program for each token's row of logits."""
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
        importance_ratio, importance = _importance_weight(difference, importance_cap, MASKS_IMPORTANCE)
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
        # The gradient, zeros too, may take the place of the logits, whose target some threads may not have read yet.
        tl.debug_barrier()
        if (slope == 0) & (entropy_slope == 0):
            fill_row(gradient + pid * V, V, ROWS, LANES)
        else:
            write_gradient(
                gradient + pid * V, row, bias, target, V, scale, peak, total, rest, logprob, entropy, slope, entropy_slope,
                HAS_BIAS, HAS_ENTROPY, ROWS, LANES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _loss_from_logprobs(  # noqa: PLR0913
    # Written.
    slopes, losses, ratios, events,  # [T]
    # Read.
    logprobs, advantages, weights, old_logprobs, rollout_logprobs, ref_logprobs,  # [T]
    cu_seqlens,  # [N + 1]
    T,
    # Settings of the objective.
    low, high, dual_clip, importance_cap, kl_coef,
    HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
    IS_CISPO: tl.constexpr, MASKS_IMPORTANCE: tl.constexpr, SEQUENCE_RATIO: tl.constexpr, SEQUENCE_IMPORTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses and their derivatives by the log-probabilities.

    A program takes a sequence where its tokens depend on each other (SEQUENCE_RATIO, SEQUENCE_IMPORTANCE), else a block of
    tokens.
    """
    pid = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if SEQUENCE_RATIO or SEQUENCE_IMPORTANCE:
        # Wrong boundaries must not lead to reads outside of the memory.
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
            importance_ratio, importance = _importance_weight(difference, importance_cap, MASKS_IMPORTANCE)
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
        # The sequence's log-ratio is a mean: every token's log-probability counts 1 / count in it.
        for start in range(first, last, BLOCK):
            tokens = start + offsets
            keep = tl.load(weights + tokens, mask=tokens < last, other=0.0) != 0
            slope = tl.load(slopes + tokens, mask=keep, other=0.0)
            tl.store(slopes + tokens, slope + slope_sum / count, mask=keep)


@triton.jit(do_not_specialize=["T"])
def _batch_statistics(  # noqa: PLR0913
    statistics,  # [6]
    losses, ratios, events,  # [T]
    num_kept,  # []
    T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of the batch, see `_TokenResults.statistics`, by one program, so that sums are taken in one order."""
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
def _scale_gradient(gradient, scale, V, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Multiply gradient [T, V] by scale [], in place; there is nothing to do for the 1 of `loss.backward()`."""
    factor = tl.load(scale)
    if factor != 1:
        row = gradient + tl.program_id(0).to(tl.int64) * V
        for start in range(0, V, ROWS * LANES):
            store_tile(row, load_tile(row, row, start, V, False, ROWS, LANES) * factor, start, V, ROWS, LANES)


class _TokenResults:
    """What a loss kernel writes for every token, and statistics of it."""

    def __init__(self, num_tokens: int, device: torch.device):
        # Zeros, because tokens that belong to no sequence are not written.
        self.losses = torch.zeros(num_tokens, dtype=torch.float32, device=device)
        self.ratios = torch.zeros_like(self.losses)
        self.events = torch.zeros(num_tokens, dtype=torch.int32, device=device)

    def statistics(self, terms: TokenTerms) -> Tensor:
        """[6] loss, clip_low_fraction, clip_high_fraction, importance_mean, importance_max, importance_capped_fraction."""
        statistics = self.losses.new_empty(6)
        _batch_statistics[(1,)](
            statistics, self.losses, self.ratios, self.events, terms.num_kept, len(self.losses), BLOCK=4 * _BLOCK
        )
        return statistics


def _loss_arguments(terms: TokenTerms, results: _TokenResults) -> dict[str, Any]:
    """The arguments that both loss kernels have, by name."""
    objective = terms.objective
    low, high = objective.ratio_bounds
    vectors = {
        "old_logprobs": objective.old_logprobs,
        "rollout_logprobs": objective.rollout_logprobs,
        "ref_logprobs": objective.ref_logprobs,
    }
    return {
        **{name: None if vector is None else vector.detach().contiguous() for name, vector in vectors.items()},
        "advantages": terms.advantages,
        "weights": terms.weights,
        "losses": results.losses,
        "ratios": results.ratios,
        "events": results.events,
        "low": low,
        "high": high,
        "dual_clip": objective.dual_clip or 0.0,
        "importance_cap": objective.importance_cap,
        "kl_coef": objective.kl_coef,
        "HAS_OLD": objective.old_logprobs is not None,
        "HAS_ROLLOUT": objective.rollout_logprobs is not None,
        "HAS_DUAL_CLIP": objective.dual_clip is not None,
        "HAS_KL": objective.kl_coef != 0,
        "IS_CISPO": objective.loss_type == "cispo",
        "MASKS_IMPORTANCE": objective.importance_mode == "mask",
    }


class _LogitsOptions(NamedTuple):
    """What to do with logits, beside the objective."""

    inverse_temperature: float
    gradient: bool
    """Whether the gradient by the logits is wanted."""
    inplace: bool
    """Whether it takes the memory of the logits."""


class _LossFromLogits(torch.autograd.Function):
    """(loss, [T] log-probabilities, [T] entropies, statistics) in one launch, gradient included."""

    @staticmethod
    @isolated
    def forward(ctx, logits, bias, targets, terms, options):
        num_tokens, vocabulary = logits.shape
        results = _TokenResults(num_tokens, logits.device)
        logprobs, entropies = torch.empty_like(results.losses), torch.empty_like(results.losses)
        gradient = None
        if options.gradient:
            gradient = logits if options.inplace else torch.empty_like(logits)
        if num_tokens:
            _loss_from_logits[(num_tokens,)](
                gradient=gradient, logprobs=logprobs, entropies=entropies, logits=logits, bias=bias, targets=targets,
                entropy_weight=terms.entropy_weight, V=vocabulary, logits_stride=logits.stride(0),
                inverse_temperature=options.inverse_temperature, HAS_GRADIENT=options.gradient, HAS_BIAS=bias is not None,
                HAS_ENTROPY=terms.objective.entropy_coef != 0, **_loss_arguments(terms, results), **tile(vocabulary),
            )  # fmt: skip
        if options.gradient and options.inplace:
            torch.autograd.graph.increment_version(logits)
        ctx.gradient = gradient
        statistics = results.statistics(terms)
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
            _scale_gradient[(num_tokens,)](gradient, upstreams[0], vocabulary, **tile(vocabulary))
        return gradient, None, None, None, None


class _LogprobFromLogits(torch.autograd.Function):
    """([T] log-probabilities, [T] entropies) of logits, with the gradient in a launch of its own."""

    @staticmethod
    @isolated
    def forward(ctx, logits, bias, targets, options, entropy_gradient):
        terms = RowTerms.empty(len(logits), logits.device)
        sweep_rows(LogitRows(logits, bias, targets, options.inverse_temperature), terms)
        # Copies of what is returned, because the caller may change it.
        saved = terms._replace(logprobs=terms.logprobs.clone(), entropies=terms.entropies.clone())
        ctx.save_for_backward(logits, bias, targets, *saved)
        ctx.options = options
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(terms.entropies)
        ctx.set_materialize_grads(False)
        return terms.logprobs, terms.entropies

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        slopes, entropy_slopes = upstreams
        logits, bias, targets, *saved = ctx.saved_tensors
        terms = RowTerms(*saved)
        slopes = torch.zeros_like(terms.logprobs) if slopes is None else slopes.contiguous()
        has_entropy = ctx.entropy_gradient and entropy_slopes is not None
        entropy_slopes = entropy_slopes.contiguous() if has_entropy else None
        gradient = logits if ctx.options.inplace else torch.empty_like(logits)
        rows = LogitRows(logits, bias, targets, ctx.options.inverse_temperature)
        write_rows_gradient(gradient, rows, terms, slopes, entropy_slopes)
        if ctx.options.inplace:
            # The logits are overwritten, so autograd must refuse to come here a second time.
            torch.autograd.graph.increment_version(logits)
        bias_gradient = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return gradient, bias_gradient, None, None, None


class _LossFromLogprobs(torch.autograd.Function):
    """(loss, statistics) from log-probabilities and entropies [T]."""

    @staticmethod
    @isolated
    def forward(ctx, logprobs, entropies, terms):
        objective, num_tokens = terms.objective, len(logprobs)
        results = _TokenResults(num_tokens, logprobs.device)
        slopes = torch.zeros_like(logprobs)
        cu_seqlens = objective.cu_seqlens.contiguous() if objective.by_sequence else None
        programs = triton.cdiv(num_tokens, _BLOCK) if cu_seqlens is None else len(cu_seqlens) - 1
        if programs:
            _loss_from_logprobs[(programs,)](
                slopes=slopes, logprobs=logprobs, cu_seqlens=cu_seqlens, T=num_tokens,
                SEQUENCE_RATIO=objective.loss_type == "gspo",
                SEQUENCE_IMPORTANCE=objective.by_sequence and objective.importance_level == "sequence",
                **_loss_arguments(terms, results), BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
        statistics = results.statistics(terms)
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
        return slopes * upstream, None if entropy_slopes is None else entropy_slopes * upstream, None


def _as_policy_loss(loss: Tensor, logprobs: Tensor, entropies: Tensor, statistics: Tensor) -> PolicyLoss:
    _, low, high, mean, largest, capped = statistics.unbind()
    return PolicyLoss(loss, logprobs.detach(), entropies.detach(), low, high, mean, largest, capped)


def _policy_loss_from_logprobs(logprobs: Tensor, entropies: Tensor, terms: TokenTerms) -> PolicyLoss:
    loss, statistics = _LossFromLogprobs.apply(logprobs, entropies, terms)
    if terms.keep is not None:
        logprobs, entropies = (vector.detach().masked_fill(~terms.keep, 0.0) for vector in (logprobs, entropies))
    return _as_policy_loss(loss, logprobs, entropies, statistics)


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
    options = _LogitsOptions(1.0 / temperature, recording and logits.requires_grad, inplace)
    if settings.by_sequence or differentiable_bias or logits.dtype == torch.float16:
        logprobs, entropies = _LogprobFromLogits.apply(logits, bias, targets, options, settings.entropy_coef != 0)
        return _policy_loss_from_logprobs(logprobs, entropies, terms)
    return _as_policy_loss(*_LossFromLogits.apply(logits, bias, targets, terms, options))


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
        # Masked slots may hold anything: a NaN state would reach the head's gradient, a target be outside the vocabulary.
        hidden = hidden.masked_fill(~terms.keep[:, None], 0.0)
        targets = targets.masked_fill(~terms.keep, 0)
    logprobs, entropies = logprob_and_entropy(
        hidden, weight, bias, targets, temperature, entropy_gradient=settings.entropy_coef != 0
    )
    return _policy_loss_from_logprobs(logprobs, entropies, terms)


policy_loss.__doc__ = reference.policy_loss.__doc__
linear_policy_loss.__doc__ = reference.linear_policy_loss.__doc__
