"""Policy-gradient losses, from logits, from hidden states and from log-probabilities.

Every loss is one function of a token's log-probability, `_token_loss`; its specification is `token_loss.py`. Ways to it:
- `linear_policy_loss`, which the trainer of tars_fast calls: `linear_logprob.head_terms`, then `_from_logprobs`;
- `token_policy_loss`: `_from_logprobs`;
- `policy_loss`: `_from_logits` in most cases;
- `policy_loss` in the cases below: `_sweep_logits`, then `_from_logprobs`.

`_from_logits` is one launch: it reads a row of logits, computes its token's loss, and reads the row again, from the L2 cache
by then, to write the gradient. The upstream gradient is not known yet, so the backward pass launches a kernel that multiplies
by it, and returns at once if it is 1: a factor that is known before belongs into `scale`. It cannot serve losses that couple
tokens (of a sequence: gspo, sequence-level importance; of the batch: `top_entropy_quantile`), fp16 logits (whose gradient
underflows before a loss scaler has multiplied it) and biases that want a gradient.

Shapes: T tokens, N sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from tars_kernels import backend, reference
from tars_kernels.backend import isolated, operator, runs_kernels
from tars_kernels.checks import (
    check_bias,
    check_floats,
    check_head,
    check_rows_contiguous,
    check_same_device,
    check_softcap,
    check_targets,
    check_temperature,
    check_z_coef,
    head_parameters,
)
from tars_kernels.linear_logprob import head_terms
from tars_kernels.objective import (
    GMPO_FLOOR,
    MAX_EXPONENT,
    VECTORS,
    VESPO_RANGE,
    Objective,
    ObjectiveSettings,
    PolicyLoss,
    TokenTerms,
    check_token_vectors,
    shows_settings,
)
from tars_kernels.rows import (
    LOG2E,
    LogitRows,
    RowSlopes,
    RowTerms,
    fill_row,
    is_aligned,
    load_tile,
    place_row,
    scan_row,
    store_tile,
    sweep_rows,
    tile,
    write_gradient,
    write_rows_gradient,
)
from tars_kernels.vocabulary_parallel import HeadOptions, whole_size

_LOW, _HIGH, _CAPPED = (tl.constexpr(bit) for bit in (1, 2, 4))
"""Bits of a token's `events`: its ratio fell below or rose above its bound, its importance weight was above the cap."""
_BLOCK = 1024
"""Tokens that one program of a per-token kernel handles at once."""
_MAX_EXPONENT = tl.constexpr(MAX_EXPONENT)
_VESPO_LOW, _VESPO_HIGH = (tl.constexpr(bound) for bound in VESPO_RANGE)
_GMPO_FLOOR = tl.constexpr(GMPO_FLOOR)


@triton.jit
def _bounded_exp(x):
    """exp(x) and its derivative; beyond `MAX_EXPONENT` the power is held and the derivative 0."""
    power = tl.exp(tl.where(x > _MAX_EXPONENT, _MAX_EXPONENT, x))
    return power, tl.where(x > _MAX_EXPONENT, 0.0, power)


@triton.jit
def _importance_weight(difference, floor, cap, MASKS: tl.constexpr):
    """exp(difference) before and after its bounds, and whether it was outside; 1 for NaN, where the engine reported nothing."""
    ratio, _ = _bounded_exp(tl.where(difference == difference, difference, 0.0))
    outside = (ratio > cap) | (ratio < floor)
    bounded = tl.where(ratio > cap, cap, tl.where(ratio < floor, floor, ratio))
    if MASKS:
        bounded = tl.where(outside, 0.0, ratio)
    return ratio, bounded, outside


@triton.jit
def _ppo(ratio, ratio_slope, advantage, low, high, dual_clip, HAS_DUAL_CLIP: tl.constexpr):  # noqa: PLR0913
    """Loss, its derivative by the log-ratio, whether the ratio is clipped low, high."""
    bounded = ratio
    bounded_slope = ratio_slope
    if HAS_DUAL_CLIP:
        bounded = tl.where(ratio > dual_clip, dual_clip, ratio)
        bounded_slope = tl.where(ratio > dual_clip, 0.0, ratio_slope)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    clipped_slope = tl.where((ratio < low) | (ratio > high), 0.0, ratio_slope)
    first = bounded * advantage
    second = clipped * advantage
    # Where both sides of the minimum are equal, autograd takes half of each slope.
    chosen = tl.where(first < second, bounded_slope, clipped_slope)
    chosen = tl.where(first == second, 0.5 * (bounded_slope + clipped_slope), chosen)
    loss = -tl.where(second < first, second, first)
    return loss, -chosen * advantage, (bounded < low) & (advantage < 0), (bounded > high) & (advantage > 0)


@triton.jit
def _constant_factor(  # noqa: PLR0913
    logprob, old, ratio, advantage, low, high, dual_clip, LOSS: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr
):
    """Factor of `-factor * A * logprob`, and whether it is held back from below, from above."""
    if LOSS == "reinforce":
        factor = tl.zeros_like(ratio) + 1.0
        is_low = ratio < 0
        is_high = ratio < 0
    elif LOSS == "cispo":
        factor = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        is_low = (ratio < low) & (advantage < 0)
        is_high = (ratio > high) & (advantage > 0)
    else:
        p = tl.exp(logprob)
        old_p = tl.exp(old)
        if LOSS == "dppo-tv":
            fell = p - old_p < -low
            rose = p - old_p > high
        else:
            divergence = old_p * (old - logprob) + (1.0 - old_p) * tl.log((1.0 - old_p + 1e-8) / (1.0 - p + 1e-8))
            fell = (divergence > low) & (p < old_p)
            rose = (divergence > high) & (p > old_p)
        is_low = fell & (advantage <= 0)
        is_high = rose & (advantage > 0)
        factor = ratio
        if HAS_DUAL_CLIP:
            factor = tl.where(ratio > dual_clip, dual_clip, ratio)
        factor = tl.where(is_low | is_high, 0.0, factor)
    return factor, is_low, is_high


@triton.jit
def _token_loss(  # noqa: PLR0913
    logprob, old, log_ratio, advantage, low, high, dual_clip, gate_positive, gate_negative,
    LOSS: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """Loss of a token, without importance weight and KL.

    Returns:
        the loss, its derivatives by the log-ratio and by the log-probability itself, whether the ratio is held back from
        below, from above.
    """
    ratio, ratio_slope = _bounded_exp(log_ratio)
    own_slope = tl.zeros_like(ratio)
    if LOSS == "ppo":
        loss, slope, is_low, is_high = _ppo(ratio, ratio_slope, advantage, low, high, dual_clip, HAS_DUAL_CLIP)
    elif LOSS == "sapo":
        temperature = tl.where(advantage > 0, gate_positive, gate_negative)
        x = temperature * (ratio - 1.0)
        gate = tl.sigmoid(x)
        loss = -gate * 4.0 / temperature * advantage
        slope = -4.0 * gate * tl.sigmoid(-x) * ratio_slope * advantage
        is_low = ratio < 0
        is_high = ratio < 0
    else:
        factor, is_low, is_high = _constant_factor(logprob, old, ratio, advantage, low, high, dual_clip, LOSS, HAS_DUAL_CLIP)
        own_slope = -factor * advantage
        loss = own_slope * logprob
        slope = tl.zeros_like(ratio)
    return loss, slope, own_slope, is_low, is_high


@triton.jit
def _kl_term(logprob, ref_logprob, log_ratio, ESTIMATOR: tl.constexpr, CORRECTED: tl.constexpr):
    """Estimate of KL, its derivatives by the log-ratio and by the log-probability itself."""
    difference = logprob - ref_logprob
    own_slope = difference
    if ESTIMATOR == "k2":
        kl = 0.5 * difference * difference
    elif ESTIMATOR == "k1" or ESTIMATOR == "k1+":
        kl = difference
    else:
        power, power_slope = _bounded_exp(-difference)
        kl = power + difference - 1.0
        if ESTIMATOR == "k3":
            own_slope = 1.0 - power_slope
    if ESTIMATOR == "k1":
        own_slope = tl.zeros_like(difference) + 1.0
    slope = tl.zeros_like(difference)
    if CORRECTED:
        ratio, ratio_slope = _bounded_exp(log_ratio)
        slope = kl * ratio_slope
        own_slope *= ratio
        kl *= ratio
    return kl, slope, own_slope


@triton.jit
def _held_log_ratio(log_ratio, advantage, low, high):
    """gmpo's log-ratio, clipped on the side of the advantage, and whether its gradient passes."""
    held = tl.where(advantage > 0, tl.minimum(log_ratio, high), tl.maximum(log_ratio, low))
    passes = tl.where(advantage > 0, log_ratio <= high, log_ratio >= low) & (advantage != 0)
    return tl.where(advantage == 0, 0.0, held), passes


@triton.jit
def _vespo_weight(log_weight, advantage, positive_shape, positive_rate, negative_shape, negative_rate):
    """Gamma weight of a sequence's ratio."""
    log_weight = tl.minimum(tl.maximum(log_weight, _VESPO_LOW), _VESPO_HIGH)
    shape = tl.where(advantage >= 0, positive_shape, negative_shape)
    rate = tl.maximum(tl.where(advantage >= 0, positive_rate, negative_rate), 1e-4)
    return tl.exp(rate + shape * log_weight - rate * tl.exp(log_weight))


@triton.jit
def _loss_from_logits(  # noqa: PLR0913
    # Written.
    gradient,  # [T, V]
    losses, kls, logprobs, entropies, ratios, events,  # [T]
    # Read.
    logits,  # [T, V]
    bias,  # [V]
    targets, advantages, weights, old_logprobs, rollout_logprobs, ref_logprobs, importance_weights,  # [T]
    entropy_weight,  # []
    V, logits_stride, inverse_temperature,
    # Settings of the objective.
    low, high, dual_clip, gate_positive, gate_negative, importance_floor, importance_cap, kl_coef,
    LOSS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr, KL_ESTIMATOR: tl.constexpr, CORRECTS_KL: tl.constexpr,
    MASKS_IMPORTANCE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    # What there is to read and write.
    HAS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Losses and, scaled by an upstream gradient of 1, their gradient: one program for each token's row of logits."""
    pid = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + pid)
    if weight == 0:
        tl.store(losses + pid, 0.0)
        tl.store(kls + pid, 0.0)
        tl.store(logprobs + pid, 0.0)
        tl.store(entropies + pid, 0.0)
        tl.store(ratios + pid, 0.0)
        tl.store(events + pid, 0)
        if HAS_GRADIENT:
            gradient_row, shift = place_row(gradient, V, ALIGNED)
            fill_row(gradient_row, V, ROWS, LANES, shift)
        return
    row, shift = place_row(logits, logits_stride, ALIGNED)
    scale = inverse_temperature * LOG2E
    target = tl.load(targets + pid).to(tl.int64)
    _, _, logprob, entropy, rest, peak, total = scan_row(
        row, bias, target, V, scale, HAS_BIAS, ROWS, LANES, shift, ALIGNED, "evict_last" if HAS_GRADIENT else "evict_first"
    )

    old = logprob
    if HAS_OLD:
        old = tl.load(old_logprobs + pid).to(tl.float32)
    importance_ratio = 1.0
    importance = 1.0
    is_outside = weight == 0
    if HAS_WEIGHTS:
        importance = tl.load(importance_weights + pid).to(tl.float32)
        importance_ratio = importance
    elif HAS_ROLLOUT:
        difference = old - tl.load(rollout_logprobs + pid).to(tl.float32)
        importance_ratio, importance, is_outside = _importance_weight(
            difference, importance_floor, importance_cap, MASKS_IMPORTANCE
        )
    log_ratio = logprob - old
    loss, ratio_slope, own_slope, is_low, is_high = _token_loss(
        logprob, old, log_ratio, tl.load(advantages + pid), low, high, dual_clip, gate_positive, gate_negative,
        LOSS, HAS_DUAL_CLIP,
    )  # fmt: skip
    loss *= importance
    slope = (ratio_slope + own_slope) * importance
    if HAS_KL:
        ref_logprob = tl.load(ref_logprobs + pid).to(tl.float32)
        kl, kl_ratio_slope, kl_own_slope = _kl_term(logprob, ref_logprob, log_ratio, KL_ESTIMATOR, CORRECTS_KL)
        loss += kl_coef * kl
        slope += kl_coef * (kl_ratio_slope + kl_own_slope)
        tl.store(kls + pid, kl)
    entropy_slope = 0.0
    if HAS_ENTROPY:
        entropy_slope = -tl.load(entropy_weight)
    tl.store(losses + pid, loss)
    tl.store(logprobs + pid, logprob)
    tl.store(entropies + pid, entropy)
    tl.store(ratios + pid, importance_ratio)
    tl.store(events + pid, is_low.to(tl.int32) * _LOW + is_high.to(tl.int32) * _HIGH + is_outside.to(tl.int32) * _CAPPED)
    if HAS_GRADIENT:
        slope *= weight * inverse_temperature
        entropy_slope *= inverse_temperature
        # The gradient, zeros too, may take the place of the logits, whose target some threads may not have read yet.
        tl.debug_barrier()
        gradient_row, _ = place_row(gradient, V, ALIGNED)
        if (slope == 0) & (entropy_slope == 0):
            fill_row(gradient_row, V, ROWS, LANES, shift)
        else:
            write_gradient(
                gradient_row, row, bias, target, V, scale, peak, total, rest, logprob, entropy, slope, entropy_slope,
                HAS_BIAS, HAS_ENTROPY, ROWS, LANES, shift, ALIGNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _loss_from_logprobs(  # noqa: PLR0913
    # Written.
    slopes, losses, kls, ratios, events,  # [T]
    # Read.
    logprobs, advantages, weights, acts, old_logprobs, rollout_logprobs, ref_logprobs, importance_weights,  # [T]
    cu_seqlens,  # [N + 1]
    T,
    # Settings of the objective.
    low, high, dual_clip, gate_positive, gate_negative, importance_floor, importance_cap, kl_coef, off_policy_threshold,
    positive_shape, positive_rate, negative_shape, negative_rate,
    LOSS: tl.constexpr, RATIO_LEVEL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_ROLLOUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_ACTS: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr, HAS_KL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr, CORRECTS_KL: tl.constexpr, MASKS_IMPORTANCE: tl.constexpr,
    SEQUENCE_IMPORTANCE: tl.constexpr, HAS_THRESHOLD: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses and their derivatives by the log-probabilities.

    A program takes a sequence where its tokens depend on each other (BY_SEQUENCE), else a block of tokens.
    """
    pid = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if BY_SEQUENCE:
        # Wrong boundaries must not lead to reads outside of the memory.
        first = tl.maximum(tl.load(cu_seqlens + pid).to(tl.int64), 0)
        last = tl.minimum(tl.load(cu_seqlens + pid + 1).to(tl.int64), T)
    else:
        first = pid * BLOCK
        last = tl.minimum(first + BLOCK, T)

    count = 0.0
    log_ratio_sum = 0.0
    difference_sum = 0.0
    drift_sum = 0.0
    held_sum = 0.0
    log_importance_sum = 0.0
    if BY_SEQUENCE:
        for start in range(first, last, BLOCK):
            tokens = start + offsets
            keep = tl.load(weights + tokens, mask=tokens < last, other=0.0) != 0
            logprob = tl.load(logprobs + tokens, mask=keep, other=0.0)
            old = logprob
            if HAS_OLD:
                old = tl.load(old_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
            count += tl.sum(keep.to(tl.float32), 0)
            log_ratio_sum += tl.sum(logprob - old, 0)
            importance = tl.full([BLOCK], 1.0, tl.float32)
            sampled = old
            if HAS_ROLLOUT:
                sampled = tl.load(rollout_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
                difference = tl.where(sampled == sampled, old - sampled, 0.0)
                difference_sum += tl.sum(difference, 0)
                _, importance, _ = _importance_weight(difference, importance_floor, importance_cap, MASKS_IMPORTANCE)
            if HAS_WEIGHTS:
                importance = tl.load(importance_weights + tokens, mask=keep, other=1.0).to(tl.float32)
            if HAS_THRESHOLD:
                drift_sum += tl.sum(tl.where(keep & (sampled == sampled), sampled - logprob, 0.0), 0)
            if LOSS == "vespo":
                held = tl.minimum(tl.maximum(logprob - old, -20.0), 20.0)
                held += tl.minimum(tl.maximum(tl.log(importance), _VESPO_LOW), _VESPO_HIGH)
                held_sum += tl.sum(tl.where(keep, held, 0.0), 0)
            if LOSS == "gmpo":
                advantage = tl.load(advantages + tokens, mask=keep, other=0.0)
                held, _ = _held_log_ratio(logprob - old, advantage, low, high)
                held_sum += tl.sum(tl.where(keep, held, 0.0), 0)
                log_importance_sum += tl.sum(tl.where(keep, tl.log(importance + _GMPO_FLOOR), 0.0), 0)
        count = tl.maximum(count, 1.0)

    slope_sum = 0.0
    kl_slope_sum = 0.0
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
        if RATIO_LEVEL != "token":
            log_ratio = tl.zeros_like(log_ratio) + log_ratio_sum / count
        importance_ratio = tl.full([BLOCK], 1.0, tl.float32)
        importance = importance_ratio
        is_outside = weight != weight
        if HAS_WEIGHTS:
            importance = tl.load(importance_weights + tokens, mask=keep, other=0.0).to(tl.float32)
            importance_ratio = importance
        elif HAS_ROLLOUT:
            difference = old - tl.load(rollout_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
            if SEQUENCE_IMPORTANCE:
                difference = tl.zeros_like(difference) + difference_sum
            importance_ratio, importance, is_outside = _importance_weight(
                difference, importance_floor, importance_cap, MASKS_IMPORTANCE
            )
        advantage = tl.load(advantages + tokens, mask=keep, other=0.0)
        if LOSS == "gmpo":
            ratio, ratio_slope = _bounded_exp(tl.zeros_like(log_ratio) + held_sum / count)
            loss = -advantage * ratio
            slope = -advantage * ratio_slope
            own_slope = tl.zeros_like(slope)
            is_low = (logprob - old < low) & (advantage < 0)
            is_high = (logprob - old > high) & (advantage > 0)
            importance = tl.zeros_like(importance) + tl.exp(log_importance_sum / count)
        elif LOSS == "vespo":
            own_slope = -advantage * _vespo_weight(
                tl.zeros_like(advantage) + held_sum, advantage, positive_shape, positive_rate, negative_shape, negative_rate
            )
            loss = own_slope * logprob
            slope = tl.zeros_like(own_slope)
            is_low = weight != weight
            is_high = weight != weight
            importance = tl.full([BLOCK], 1.0, tl.float32)
        else:
            loss, slope, own_slope, is_low, is_high = _token_loss(
                logprob, old, log_ratio, advantage, low, high, dual_clip, gate_positive, gate_negative, LOSS, HAS_DUAL_CLIP
            )
        if HAS_ACTS:
            importance = tl.where(tl.load(acts + tokens, mask=inside, other=0) != 0, importance, 0.0)
        if HAS_THRESHOLD:
            drift = tl.zeros_like(advantage) + drift_sum / count
            importance = tl.where((advantage < 0) & (drift > off_policy_threshold), 0.0, importance)
        loss *= importance
        slope *= importance
        own_slope *= importance
        kl = tl.zeros_like(loss)
        if HAS_KL:
            ref_logprob = tl.load(ref_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
            kl, kl_slope, kl_own_slope = _kl_term(logprob, ref_logprob, log_ratio, KL_ESTIMATOR, CORRECTS_KL)
            loss += kl_coef * kl
            own_slope += kl_coef * kl_own_slope
            if RATIO_LEVEL == "sequence":
                kl_slope_sum += tl.sum(tl.where(keep, kl_coef * kl_slope * weight, 0.0), 0)
            else:
                own_slope += kl_coef * kl_slope
        if RATIO_LEVEL == "sequence":
            slope_sum += tl.sum(tl.where(keep, slope * weight, 0.0), 0)
        else:
            own_slope += slope
        event = is_low.to(tl.int32) * _LOW + is_high.to(tl.int32) * _HIGH + is_outside.to(tl.int32) * _CAPPED
        tl.store(slopes + tokens, tl.where(keep, own_slope * weight, 0.0), mask=inside)
        tl.store(losses + tokens, tl.where(keep, loss, 0.0), mask=inside)
        tl.store(kls + tokens, tl.where(keep, kl, 0.0), mask=inside)
        tl.store(ratios + tokens, tl.where(keep, importance_ratio, 0.0), mask=inside)
        tl.store(events + tokens, tl.where(keep, event, 0), mask=inside)
    if RATIO_LEVEL == "sequence":
        tl.debug_barrier()
        # The sequence's log-ratio is a mean: every token's log-probability counts 1 / count in it.
        for start in range(first, last, BLOCK):
            tokens = start + offsets
            keep = tl.load(weights + tokens, mask=tokens < last, other=0.0) != 0
            slope = tl.load(slopes + tokens, mask=keep, other=0.0)
            share = tl.zeros_like(slope) + slope_sum
            if LOSS == "gmpo":
                logprob = tl.load(logprobs + tokens, mask=keep, other=0.0)
                old = logprob
                if HAS_OLD:
                    old = tl.load(old_logprobs + tokens, mask=keep, other=0.0).to(tl.float32)
                advantage = tl.load(advantages + tokens, mask=keep, other=0.0)
                _, passes = _held_log_ratio(logprob - old, advantage, low, high)
                share = tl.where(passes, share, 0.0)
            tl.store(slopes + tokens, slope + (share + kl_slope_sum) / count, mask=keep)


@triton.jit(do_not_specialize=["T"])
def _batch_statistics(  # noqa: PLR0913
    statistics,  # [6]
    losses, weights, ratios, events,  # [T]
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
        weight = tl.load(weights + tokens, mask=inside, other=0.0)
        loss += tl.sum(tl.load(losses + tokens, mask=inside, other=0.0) * weight, 0)
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
def _scale_gradient(gradient, scale, V, ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Multiply gradient [T, V] by scale [], in place; there is nothing to do for the 1 of `loss.backward()`."""
    factor = tl.load(scale)
    if factor != 1:
        row, shift = place_row(gradient, V, ALIGNED)
        for start in range(0, V + shift, ROWS * LANES):
            x = load_tile(row, row, start, V, False, ROWS, LANES, shift, ALIGNED, "evict_first")
            store_tile(row, x * factor, start, V, ROWS, LANES, shift)


class _TokenResults(NamedTuple):
    """What a loss kernel writes for every token, [T] each."""

    losses: Tensor
    kls: Tensor
    ratios: Tensor
    events: Tensor

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> _TokenResults:
        """Zeros, because tokens that belong to no sequence are not written."""
        types = (*3 * (torch.float32,), torch.int32)
        return cls(*(torch.zeros(num_tokens, dtype=dtype, device=device) for dtype in types))

    def statistics(self, weights: Tensor, num_kept: Tensor) -> Tensor:
        """[6] loss, clip_low_fraction, clip_high_fraction, importance_mean, importance_max, importance_capped_fraction."""
        statistics = self.losses.new_empty(6)
        _batch_statistics[(1,)](
            statistics, self.losses, weights, self.ratios, self.events, num_kept, len(self.losses), BLOCK=4 * _BLOCK
        )
        return statistics


def _loss_arguments(terms: TokenTerms) -> dict[str, Any]:
    """The arguments that both loss kernels have, by name, and what statistics need."""
    objective = terms.objective
    low, high = objective.clip_bounds
    floor, cap = objective.importance_bounds
    vectors = {name: getattr(objective, name) for name in VECTORS}
    # Whole numbers would be compiled for as such.
    numbers = {
        "low": low,
        "high": high,
        "dual_clip": objective.dual_clip or 0.0,
        "gate_positive": objective.sapo_temperatures[0],
        "gate_negative": objective.sapo_temperatures[1],
        "importance_floor": floor,
        "importance_cap": cap,
        "kl_coef": objective.kl_coef,
    }
    return {
        **{name: None if vector is None else vector.detach().contiguous() for name, vector in vectors.items()},
        **{name: float(number) for name, number in numbers.items()},
        "advantages": terms.advantages,
        "weights": terms.weights,
        "num_kept": terms.num_kept,
        "LOSS": objective.formula.loss,
        "HAS_OLD": objective.old_logprobs is not None,
        "HAS_ROLLOUT": objective.rollout_logprobs is not None,
        "HAS_WEIGHTS": objective.importance_weights is not None,
        "HAS_DUAL_CLIP": objective.dual_clip is not None,
        "HAS_KL": objective.ref_logprobs is not None,
        "KL_ESTIMATOR": objective.kl_estimator,
        "CORRECTS_KL": objective.kl_bias_correction,
        "MASKS_IMPORTANCE": objective.importance_mode == "mask",
    }


def _sequence_arguments(terms: TokenTerms) -> dict[str, Any]:
    """The arguments that only the kernel over log-probabilities has, by name."""
    objective = terms.objective
    (positive_shape, positive_rate), (negative_shape, negative_rate) = objective.vespo_positive, objective.vespo_negative
    by_sequence = objective.by_sequence
    return {
        "acts": terms.acts,
        "cu_seqlens": objective.cu_seqlens.contiguous() if by_sequence and objective.cu_seqlens is not None else None,
        "off_policy_threshold": float(objective.off_policy_threshold or 0.0),
        "positive_shape": float(positive_shape),
        "positive_rate": float(positive_rate),
        "negative_shape": float(negative_shape),
        "negative_rate": float(negative_rate),
        "RATIO_LEVEL": objective.formula.ratio_level,
        "HAS_ACTS": terms.acts is not None,
        "SEQUENCE_IMPORTANCE": objective.sequence_importance,
        "HAS_THRESHOLD": objective.off_policy_threshold is not None,
        "BY_SEQUENCE": by_sequence,
    }


class _Packed(NamedTuple):
    """The arguments of a loss kernel by kind, as operators can take them."""

    tensors: list[Tensor | None]
    numbers: list[float]
    names: str
    """Of the tensors, of the numbers, and of flags with their values; separated by semicolons."""

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Packed:
        numbers = {name: value for name, value in arguments.items() if isinstance(value, float)}
        flags = [f"{name}={value}" for name, value in arguments.items() if isinstance(value, bool | str)]
        tensors = {name: value for name, value in arguments.items() if value is None or isinstance(value, Tensor)}
        names = ";".join(" ".join(kind) for kind in (tensors, numbers, flags))
        return cls(list(tensors.values()), list(numbers.values()), names)

    def arguments(self) -> dict[str, Any]:
        """By name."""
        tensors, numbers, flags = (names.split(" ") for names in self.names.split(";"))
        values = {"True": True, "False": False}
        constants = {name: values.get(value, value) for name, _, value in (flag.partition("=") for flag in flags)}
        return {
            **dict(zip(tensors, self.tensors, strict=True)), **dict(zip(numbers, self.numbers, strict=True)), **constants,
        }  # fmt: skip


def _launch_from_logits(
    gradient: Tensor | None,
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse_temperature: float,
    packed: _Packed,
) -> tuple[Tensor, ...]:
    """Loss, [T] log-probabilities, [T] entropies, statistics, [T] losses, [T] KL; writes `gradient`, which may be `logits`."""
    num_tokens, vocabulary = logits.shape
    results = _TokenResults.zeros(num_tokens, logits.device)
    logprobs, entropies = torch.empty_like(results.losses), torch.empty_like(results.losses)
    arguments = packed.arguments()
    num_kept = arguments.pop("num_kept")
    if num_tokens:
        _loss_from_logits[(num_tokens,)](
            gradient=gradient, logprobs=logprobs, entropies=entropies, **results._asdict(), logits=logits, bias=bias,
            targets=targets, V=vocabulary, logits_stride=logits.stride(0), inverse_temperature=inverse_temperature,
            HAS_GRADIENT=gradient is not None, HAS_BIAS=bias is not None,
            ALIGNED=is_aligned(logits, logits if gradient is None else gradient), **arguments, **tile(vocabulary),
        )  # fmt: skip
    statistics = results.statistics(arguments["weights"], num_kept)
    loss = statistics[0].clone()
    if arguments["HAS_ENTROPY"]:
        loss -= entropies.sum() * arguments["entropy_weight"]
    return loss, logprobs, entropies, statistics, results.losses, results.kls


def _from_logits(  # noqa: PLR0913
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse_temperature: float,
    wants_gradient: bool,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_launch_from_logits` returns, and the gradient, which is empty where it is not wanted."""
    gradient = torch.empty_like(logits) if wants_gradient else logits.new_empty(0, logits.shape[1])
    packed = _Packed(list(tensors), list(numbers), names)
    loss, logprobs, entropies, statistics, losses, kls = _launch_from_logits(
        gradient if wants_gradient else None, logits, bias, targets, inverse_temperature, packed
    )
    return loss, logprobs, entropies, statistics, losses, kls, gradient


def _from_logits_outputs(logits, bias, targets, inverse_temperature, wants_gradient, *_):
    vectors = [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4)]
    loss, statistics = (logits.new_empty(shape, dtype=torch.float32) for shape in ((), (6,)))
    gradient = torch.empty_like(logits) if wants_gradient else logits.new_empty(0, logits.shape[1])
    return loss, *vectors[:2], statistics, *vectors[2:], gradient


def _save_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _from_logits_backward(ctx, upstream, *_):
    (gradient,) = ctx.saved_tensors
    if upstream is None:
        return (None,) * 8
    if detect_fake_mode(gradient) is not None and not backend.walks_launches:
        # Whoever traces this plans the memory.
        return gradient * upstream, *(None,) * 7
    # In place: a second backward pass finds it changed, and is refused by autograd.
    _scale_gradient_operator(gradient, upstream)
    return gradient, *(None,) * 7


def _scale_rows(gradient: Tensor, upstream: Tensor) -> None:
    num_tokens, vocabulary = gradient.shape
    if num_tokens:
        _scale_gradient[(num_tokens,)](gradient, upstream, vocabulary, is_aligned(gradient), **tile(vocabulary))


_scale_gradient_operator = operator("scale_gradient", _scale_rows, lambda *_: None, mutates=("gradient",))
_from_logits_operator = operator("policy_loss", _from_logits, _from_logits_outputs)
_from_logits_operator.register_autograd(_from_logits_backward, setup_context=_save_gradient)


class _InPlaceLoss(torch.autograd.Function):
    """`_from_logits` with the gradient in the place of the logits, which no operator may return."""

    @staticmethod
    @isolated
    def forward(ctx, logits, *arguments):
        results = _launch_from_logits(logits, logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        ctx.gradient = logits
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        if ctx.gradient is None:
            raise RuntimeError("policy_loss: backward a second time; its gradient was handed out the first time")
        gradient, ctx.gradient = ctx.gradient, None
        _scale_rows(gradient, upstreams[0])
        return gradient, None, None, None, None


def _sweep_logits(
    logits: Tensor, bias: Tensor | None, targets: Tensor, inverse_temperature: float, entropy_gradient: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowTerms` of logits; their gradient is a launch of its own."""
    terms = RowTerms.empty(len(logits), logits.device)
    sweep_rows(LogitRows(logits, bias, targets, inverse_temperature), terms)
    return terms


def _write_logits_gradient(  # noqa: PLR0913
    gradient: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse_temperature: float,
    terms: Sequence[Tensor],
    slopes: Tensor,
    entropy_slopes: Tensor | None,
) -> None:
    rows = LogitRows(logits, bias, targets, inverse_temperature)
    entropy_slopes = None if entropy_slopes is None else entropy_slopes.contiguous()
    write_rows_gradient(gradient, rows, RowTerms(*terms), RowSlopes(slopes.contiguous(), entropy_slopes, None))


def _save_logits(ctx, inputs, output):
    logits, bias, targets, ctx.inverse_temperature, ctx.entropy_gradient, ctx.inplace = inputs
    ctx.save_for_backward(logits, bias, targets, *output)
    ctx.mark_non_differentiable(*output[2 if ctx.entropy_gradient else 1 :])
    ctx.set_materialize_grads(False)


def _sweep_logits_backward(ctx, slopes, entropy_slopes, *_):
    entropy_slopes = entropy_slopes if ctx.entropy_gradient else None
    if slopes is None and entropy_slopes is None:
        return (None,) * 6
    logits, bias, targets, *terms = ctx.saved_tensors
    slopes = torch.zeros_like(entropy_slopes) if slopes is None else slopes
    # Overwritten logits are noticed by autograd, which refuses to come here a second time.
    gradient = logits if ctx.inplace else torch.empty_like(logits)
    _write_logits_gradient_operator(gradient, logits, bias, targets, ctx.inverse_temperature, terms, slopes, entropy_slopes)
    bias_gradient = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if ctx.needs_input_grad[1] else None
    return gradient, bias_gradient, *(None,) * 4


_write_logits_gradient_operator = operator("logits_gradient", _write_logits_gradient, lambda *_: None, mutates=("gradient",))
_sweep_logits_operator = operator(
    "logits_logprob",
    _sweep_logits,
    lambda logits, *_: tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in RowTerms._fields),
)
_sweep_logits_operator.register_autograd(_sweep_logits_backward, setup_context=_save_logits)


def _from_logprobs(
    logprobs: Tensor,
    entropies: Tensor,
    entropy_gradient: bool,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, [T] losses, [T] KL, its derivatives by log-probabilities and, if wanted, entropies."""
    num_tokens = len(logprobs)
    results = _TokenResults.zeros(num_tokens, logprobs.device)
    slopes = torch.zeros_like(logprobs)
    arguments = _Packed(list(tensors), list(numbers), names).arguments()
    num_kept, entropy_weight = (arguments.pop(name) for name in ("num_kept", "entropy_weight"))
    cu_seqlens, weights, acts = (arguments[name] for name in ("cu_seqlens", "weights", "acts"))
    programs = triton.cdiv(num_tokens, _BLOCK) if cu_seqlens is None else len(cu_seqlens) - 1
    if programs:
        _loss_from_logprobs[(programs,)](
            slopes=slopes, logprobs=logprobs, T=num_tokens, **results._asdict(), **arguments, BLOCK=_BLOCK, num_warps=8
        )
    statistics = results.statistics(weights, num_kept)
    loss = statistics[0].clone()
    entropy_slopes = slopes.new_zeros(num_tokens if entropy_gradient else 0)
    if entropy_gradient:
        is_idle = weights == 0 if acts is None else ~acts
        entropy_slopes = (entropy_slopes - entropy_weight).masked_fill(is_idle, 0.0)
        loss += (entropies.masked_fill(is_idle, 0.0) * entropy_slopes).sum()
    return loss, statistics, results.losses, results.kls, slopes, entropy_slopes


def _from_logprobs_outputs(logprobs, entropies, entropy_gradient, *_):
    vectors = [torch.empty_like(logprobs) for _ in range(3)]
    slopes = logprobs.new_empty(logprobs.shape[0] if entropy_gradient else 0)
    return logprobs.new_empty(()), logprobs.new_empty(6), *vectors, slopes


def _save_slopes(ctx, inputs, output):
    ctx.entropy_gradient = inputs[2]
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _from_logprobs_backward(ctx, upstream, *_):
    slopes, entropy_slopes = ctx.saved_tensors
    if upstream is None:
        return (None,) * 6
    return slopes * upstream, entropy_slopes * upstream if ctx.entropy_gradient else None, *(None,) * 4


_from_logprobs_operator = operator("token_policy_loss", _from_logprobs, _from_logprobs_outputs)
_from_logprobs_operator.register_autograd(_from_logprobs_backward, setup_context=_save_slopes)


def _policy_loss_from_logprobs(logprobs: Tensor, entropies: Tensor, terms: TokenTerms) -> PolicyLoss:
    terms = terms.of_top_entropy(entropies)
    packed = _Packed.of(_loss_arguments(terms) | _sequence_arguments(terms) | {"entropy_weight": terms.entropy_weight})
    results = _from_logprobs_operator(logprobs, entropies, terms.objective.entropy_coef != 0, *packed)
    if terms.keep is not None:
        logprobs, entropies = (vector.detach().masked_fill(~terms.keep, 0.0) for vector in (logprobs, entropies))
    loss, *others = results[:4]
    return _as_policy_loss(loss, logprobs, entropies, *others)


def _as_policy_loss(*results: Tensor) -> PolicyLoss:
    """Of loss, log-probabilities, entropies, statistics, losses of tokens and KL."""
    loss, logprobs, entropies, statistics, token_losses, kl = results
    _, low, high, mean, largest, outside = statistics.unbind()
    return PolicyLoss(loss, logprobs.detach(), entropies.detach(), low, high, mean, largest, outside, token_losses, kl)


@shows_settings
def token_policy_loss(
    logprobs: Tensor, advantages: Tensor, *, entropy: Tensor | None = None, **objective: Unpack[ObjectiveSettings]
) -> PolicyLoss:
    if not runs_kernels(logprobs) or logprobs.dtype == torch.float64:
        return reference.token_policy_loss(logprobs, advantages, entropy=entropy, **objective)
    settings = Objective.from_keywords(objective)
    entropy = check_token_vectors(logprobs, advantages, entropy, settings)
    terms = settings.token_terms(len(logprobs), advantages)
    return _policy_loss_from_logprobs(logprobs.float().contiguous(), entropy.float().contiguous(), terms)


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
    check_same_device(("logits", logits), targets=targets, bias=bias, advantages=advantages)
    check_targets(targets, len(logits), logits.shape[1], settings.mask)
    check_bias(bias, logits.shape[1])
    check_temperature(temperature)
    terms = settings.token_terms(len(targets), advantages)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    recording = torch.is_grad_enabled()
    differentiable_bias = recording and bias is not None and bias.requires_grad
    if inplace and not logits.is_contiguous():
        raise ValueError(f"inplace: True for logits with row stride {logits.stride(0)}; pass logits.contiguous()")
    # Permission that a compiled graph, which plans its memory itself, makes no use of.
    inplace = inplace and not torch.compiler.is_compiling()
    wants_gradient, inverse_temperature = recording and logits.requires_grad, 1.0 / temperature
    wants_entropy = settings.entropy_coef != 0
    couples_tokens = settings.by_sequence or settings.top_entropy_quantile < 1
    if couples_tokens or differentiable_bias or logits.dtype == torch.float16:
        swept = _sweep_logits_operator(logits, bias, targets, inverse_temperature, wants_entropy, inplace)
        # Copies, because the gradient needs the originals and the caller may change these.
        return _policy_loss_from_logprobs(swept[0].clone(), swept[1].clone(), terms)
    packed = _Packed.of(_loss_arguments(terms) | {"entropy_weight": terms.entropy_weight, "HAS_ENTROPY": wants_entropy})
    if inplace and wants_gradient:
        return _as_policy_loss(*_InPlaceLoss.apply(logits, bias, targets, inverse_temperature, packed))
    results = _from_logits_operator(logits, bias, targets, inverse_temperature, wants_gradient, *packed)
    return _as_policy_loss(*results[:6])


@shows_settings
def linear_policy_loss(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_coef: float = 0.0,
    group: ProcessGroup | None = None,
    **objective: Unpack[ObjectiveSettings],
) -> PolicyLoss:
    if not runs_kernels(hidden):
        return reference.linear_policy_loss(
            hidden, weight, targets, advantages, bias=bias, temperature=temperature, softcap=softcap, z_coef=z_coef,
            group=group, **objective,
        )  # fmt: skip
    settings = Objective.from_keywords(objective)
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=False)
    check_rows_contiguous("weight", weight)
    check_same_device(("hidden", hidden), targets=targets, advantages=advantages)
    check_targets(targets, len(hidden), whole_size(weight, group), settings.mask)
    check_temperature(temperature)
    check_softcap(softcap)
    check_z_coef(z_coef)
    hidden = hidden.to(weight.dtype)
    terms = settings.token_terms(len(targets), advantages)
    if terms.keep is not None:
        # Masked slots may hold anything: a NaN state would reach the head's gradient, a target be outside the vocabulary.
        hidden = hidden.masked_fill(~terms.keep[:, None], 0.0)
        targets = targets.masked_fill(~terms.keep, 0)
    options = HeadOptions(temperature, softcap or 0.0, entropy_gradient=settings.entropy_coef != 0, group=group)
    logprobs, entropies, logsumexps = head_terms(hidden, weight, bias, targets, options)
    return terms.with_z_loss(_policy_loss_from_logprobs(logprobs, entropies, terms), logsumexps, z_coef)


token_policy_loss.__doc__ = reference.token_policy_loss.__doc__
policy_loss.__doc__ = reference.policy_loss.__doc__
linear_policy_loss.__doc__ = reference.linear_policy_loss.__doc__
