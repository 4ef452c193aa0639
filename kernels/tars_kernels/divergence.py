"""Settings and results of a token distillation loss, and its weights by token, from which every implementation starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tars_kernels.checks import (
    check_cu_seqlens,
    check_floats,
    check_head,
    check_mask,
    check_same_device,
    check_shape,
    head_parameters,
)
from tars_kernels.objective import FromKeywords, sequence_numbers

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]
_KINDS = ("reverse_kl", "forward_kl", "jsd")
LOWEST_LOGIT = -1.0e30
"""Logits below count as this, so that a token suppressed in both distributions adds nothing, rather than inf - inf."""


class DistillationSettings(TypedDict, total=False):
    """The keywords of `Distillation`, for editors and type checkers; a test holds them to its fields, which explain them."""

    divergence: DivergenceKind
    beta: float
    teacher_bias: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None
    token_weights: Tensor | None
    top_tokens: int
    top_weight: float
    decay: float
    normalise: Literal["token", "sequence"]
    num_tokens: float | Tensor | None


class Heads(NamedTuple):
    """The output heads of student and teacher."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    teacher_weight: Tensor
    """[V, the teacher's D], without a gradient, as is its bias."""
    teacher_bias: Tensor | None
    """[V]"""


@dataclass(frozen=True, eq=False)
class Distillation(FromKeywords):
    """Settings of `linear_distillation_loss`, by keyword. T tokens, N sequences, V vocabulary.

    With p the student's distribution of a token and q the teacher's, both at `temperature`, the loss of the batch is the sum
    over unmasked tokens of weight x divergence, divided by what `normalise` says. No factor of temperature squared is applied.

    Raises:
        ValueError: a setting out of range, or a tensor of the wrong shape, dtype or device.
    """

    divergence: DivergenceKind = "reverse_kl"
    """reverse_kl: KL(p || q), what on-policy distillation takes. forward_kl: KL(q || p). jsd: beta KL(q || m) + (1 - beta)
    KL(p || m) with m = beta q + (1 - beta) p (generalised Jensen-Shannon, arXiv 2306.13649, eq. 1)."""
    beta: float = 0.5
    """Of jsd, between 0 and 1."""
    teacher_bias: Tensor | None = None
    """[V] added to the teacher's logits; None: what the teacher's head brings, or without a head of its own the student's."""
    cu_seqlens: Tensor | None = None
    """[N + 1] boundaries of the packed sequences, from 0 to T; for `top_tokens`, `decay` and normalise "sequence"."""
    mask: Tensor | None = None
    """[T] bool; False leaves a token out of everything, whatever its slots hold, NaN included."""
    token_weights: Tensor | None = None
    """[T] weights of your own, multiplied with the others; they carry no gradient."""
    top_tokens: int = 0
    """The tokens of largest divergence in each sequence that count `top_weight`; CORD (arXiv 2601.16547): 20."""
    top_weight: float = 2.0
    decay: float = 1.0
    """Weight of a sequence's first unmasked token, falling linearly to 1 at its last; CORD: 2."""
    normalise: Literal["token", "sequence"] = "token"
    """token: divided by unmasked tokens, or by `num_tokens`. sequence: mean over sequences of the mean over their tokens."""
    num_tokens: float | Tensor | None = None
    """Unmasked tokens of the whole accumulated batch, a number or 0-d tensor, in place of those here; at least 1."""

    def __post_init__(self) -> None:
        if self.divergence not in _KINDS:
            raise ValueError(f"divergence: {self.divergence!r}; must be one of {', '.join(_KINDS)}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta}; must lie between 0 and 1, whose ends are forward_kl and reverse_kl")
        if self.normalise not in ("token", "sequence"):
            raise ValueError(f"normalise: {self.normalise!r}; must be 'token' or 'sequence'")
        if isinstance(self.top_tokens, bool) or not isinstance(self.top_tokens, int) or self.top_tokens < 0:
            raise ValueError(f"top_tokens: {self.top_tokens!r}; must be a whole number, 0 for no difference")
        for name in ("top_weight", "decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)}; must be a finite number, at least 0")
        if self.num_tokens is not None and self.normalise == "sequence":
            raise ValueError(
                f"num_tokens: {self.num_tokens}; normalise 'sequence' has no token normaliser, scale its loss instead"
            )
        if isinstance(self.num_tokens, Tensor):
            check_shape("num_tokens", self.num_tokens, ())
        elif self.num_tokens is not None and not 0 <= self.num_tokens < float("inf"):
            raise ValueError(f"num_tokens: {self.num_tokens}; must be a number of tokens")

    def heads(self, weight: Tensor | nn.Module, bias: Tensor | None, teacher_weight: Tensor | nn.Module | None) -> Heads:
        """Both heads, given as weights or modules.

        Raises:
            ValueError: a head with an adapter, or a module that is no linear layer.
        """
        weight, bias = head_parameters(weight, bias)
        if teacher_weight is None:
            teacher_weight, teacher_bias = weight, bias if self.teacher_bias is None else self.teacher_bias
        else:
            teacher_weight, teacher_bias = head_parameters(teacher_weight, self.teacher_bias, "teacher_weight")
        return Heads(weight, bias, teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach())

    def check(self, hidden: Tensor, teacher_hidden: Tensor, heads: Heads, *, allow_float64: bool) -> None:
        """Raises ValueError for what does not fit hidden [T, D] and the heads, or boundaries that are missing."""
        num_tokens = len(hidden)
        check_head(hidden, heads.weight, heads.bias, allow_float64=allow_float64)
        check_head(teacher_hidden, heads.teacher_weight, heads.teacher_bias, allow_float64=allow_float64, prefix="teacher_")
        check_shape("teacher_hidden", teacher_hidden, (num_tokens, None))
        check_shape("teacher_weight", heads.teacher_weight, (len(heads.weight), None))
        if self.mask is not None:
            check_mask(self.mask, num_tokens)
        if self.token_weights is not None:
            check_floats("token_weights", self.token_weights, (num_tokens,), allow_float64=True)
        check_same_device(
            ("hidden", hidden),
            teacher_hidden=teacher_hidden,
            mask=self.mask,
            token_weights=self.token_weights,
            cu_seqlens=self.cu_seqlens,
            num_tokens=self.num_tokens if isinstance(self.num_tokens, Tensor) else None,
        )
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, num_tokens)
        elif self.top_tokens or self.decay != 1 or self.normalise == "sequence":
            what = "normalise 'sequence'" if self.normalise == "sequence" else "top_tokens" if self.top_tokens else "decay"
            raise ValueError(f"cu_seqlens: None; {what} needs the boundaries of the sequences")

    def blank(self, hidden: Tensor) -> Tensor:
        """`hidden` [T, D] with masked rows of 0: what they hold, NaN included, must not reach a product with the head."""
        return hidden if self.mask is None else hidden.masked_fill(~self.mask.bool()[:, None], 0.0)

    def loss(self, divergences: Tensor) -> DistillationLoss:
        """The loss from divergences [T], in plain PyTorch: nothing here is as large as a row of the vocabulary."""
        if self.mask is not None:
            divergences = divergences.masked_fill(~self.mask.bool(), 0.0)
        weights = self._weights(divergences.detach())
        return DistillationLoss((divergences * weights).sum(), divergences, weights)

    def _weights(self, divergences: Tensor) -> Tensor:
        """[T] what a token's divergence is multiplied with before the sum; 0 where masked out."""
        keep = torch.ones_like(divergences, dtype=torch.bool) if self.mask is None else self.mask.bool()
        weights = keep.to(divergences.dtype)
        counts_before = F.pad(keep.long().cumsum(0), (1, 0))
        normaliser = weights.new_zeros(()) + keep.sum().clamp(min=1)
        if self.num_tokens is not None:
            normaliser = torch.zeros_like(normaliser) + torch.as_tensor(self.num_tokens).clamp(min=1)
        if self.cu_seqlens is not None:
            numbers = sequence_numbers(self.cu_seqlens, len(keep))
            # On CUDA nobody has looked at the boundaries: what they index must exist.
            boundaries = self.cu_seqlens.long().clamp(0, len(keep))
            starts = counts_before[boundaries]
            lengths = starts.diff()[numbers]
            if self.top_tokens:
                # Masked tokens rank last in their sequence; of equal ones the first in the sequence ranks first.
                order = divergences.masked_fill(~keep, -torch.inf).argsort(descending=True, stable=True)
                order = order[numbers[order].argsort(stable=True)]
                ranks = torch.arange(len(keep), device=keep.device) - boundaries[numbers[order]]
                is_top = torch.zeros_like(keep).scatter(0, order, ranks < self.top_tokens)
                weights = torch.where(is_top, weights * self.top_weight, weights)
            if self.decay != 1:
                places = (counts_before[:-1] - starts[numbers]) / (lengths - 1).clamp(min=1)
                weights = weights * (self.decay + (1.0 - self.decay) * places.to(weights.dtype))
            if self.normalise == "sequence":
                normaliser = (lengths.clamp(min=1) * (len(self.cu_seqlens) - 1)).to(weights.dtype)
        if self.token_weights is not None:
            own = self.token_weights.detach().to(weights.dtype)
            weights = weights * own.masked_fill(~keep, 0.0)
        return weights / normaliser


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """What `linear_distillation_loss` returns; `loss` and `divergences` carry a gradient."""

    loss: Tensor
    """[] the part of the batch's loss that these tokens contribute."""
    divergences: Tensor
    """[T] fp32, in nats; 0 where masked out. A loss of your own may be made of them."""
    weights: Tensor
    """[T] fp32, what each divergence counts in the loss, normaliser included; 0 where masked out."""
