"""Settings and results of a clipped policy-gradient loss, and its per-token terms, from which every implementation starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from tars_kernels.checks import check_cu_seqlens, check_floats, check_mask, check_same_device, check_shape

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")


Loss = TypeVar("Loss", bound=Callable[..., Any])


class ObjectiveSettings(TypedDict, total=False):
    """The keywords of `Objective`, for editors and type checkers; a test holds them to its fields, which say what they mean."""

    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    mask: Tensor | None
    loss_type: LossType
    clip_low: float
    clip_high: float | None
    dual_clip: float | None
    importance_cap: float
    importance_mode: Literal["truncate", "mask"]
    importance_level: Literal["token", "sequence"]
    kl_coef: float
    entropy_coef: float
    num_tokens: float | Tensor | None


@dataclass(frozen=True, eq=False)
class Objective:
    """Settings of `policy_loss` and `linear_policy_loss`, by keyword. T tokens, N sequences.

    With r = exp(logprob - old), advantage A and importance weight w = exp(old - rollout), bounded by `importance_cap`, the
    loss of a token is `-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) * w + kl_coef * KL`, KL = exp(ref - logprob)
    - (ref - logprob) - 1, and the loss of the batch the sum over unmasked tokens divided by what `loss_type` says. Formulas are
    those of TRL 1.16's GRPOTrainer.

    Raises:
        ValueError: a setting out of range, or a tensor of the wrong shape, dtype or device.
    """

    cu_seqlens: Tensor | None = None
    """[N + 1] boundaries of the packed sequences, from 0 to T; for advantages per sequence, grpo, gspo and sequence-level w."""
    old_logprobs: Tensor | None = None
    """[T] of the policy that the ratio starts from. None: the current policy, so that r is exactly 1."""
    rollout_logprobs: Tensor | None = None
    """[T] as the rollout engine reports them; NaN where it reports none, which gives w = 1. None: w = 1 everywhere."""
    ref_logprobs: Tensor | None = None
    """[T] of the reference policy of the KL term."""
    mask: Tensor | None = None
    """[T] bool; False leaves a token out of everything, whatever its slots hold, NaN included."""
    loss_type: LossType = "dapo"
    """dapo, bnpo: divided by unmasked tokens (DAPO, arXiv 2503.14476, eq. 8). grpo: mean over sequences of the mean over their
    tokens (arXiv 2402.03300, eq. 3). dr_grpo: divided by `num_tokens`, batch x maximum length (arXiv 2503.20783). cispo:
    -min(r, clip_high) * A * logprob with the factor held constant (arXiv 2506.13585, eq. 4). gspo: dapo with
    r = exp(mean over the sequence of logprob - old) (arXiv 2507.18071, eq. 7)."""
    clip_low: float = 0.2
    """r is held above 1 - clip_low where A < 0."""
    clip_high: float | None = None
    """r is held below 1 + clip_high where A > 0; None: 0.28. For cispo the upper bound itself, which must be given."""
    dual_clip: float | None = None
    """Upper bound of r where A < 0 (TRL's delta, arXiv 2505.07291, eq. 1)."""
    importance_cap: float = 2.0
    """Largest w (truncated importance sampling)."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: w above the cap becomes the cap. mask: it becomes 0."""
    importance_level: Literal["token", "sequence"] = "token"
    """sequence: w is the product over the sequence's unmasked tokens."""
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    """The loss falls by this times the mean entropy of unmasked tokens, whose gradient is taken only where this is not 0."""
    num_tokens: float | Tensor | None = None
    """Unmasked tokens of the whole accumulated batch, a number or 0-d tensor, in place of those here; at least 1. With it the
    losses of micro-batches add up to the loss of the batch, except for grpo, which has no token normaliser."""

    def __post_init__(self) -> None:
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(f"loss_type: {self.loss_type!r}; must be one of {', '.join(_LOSS_TYPES)}")
        if self.importance_mode not in ("truncate", "mask"):
            raise ValueError(f"importance_mode: {self.importance_mode!r}; must be 'truncate' or 'mask'")
        if self.importance_level not in ("token", "sequence"):
            raise ValueError(f"importance_level: {self.importance_level!r}; must be 'token' or 'sequence'")
        if self.clip_high is None and self.loss_type == "cispo":
            raise ValueError("clip_high: None; cispo needs it, as the upper bound of the ratio itself (e.g. 5.0)")
        for name in ("clip_low", "clip_high", "importance_cap", "dual_clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value}; must be a finite number, at least 0")
        if self.clip_low >= 1:
            raise ValueError(f"clip_low: {self.clip_low}; must be below 1, the ratio is held above 1 - clip_low")
        if self.dual_clip is not None and self.loss_type == "cispo":
            raise ValueError(f"dual_clip: {self.dual_clip}; cispo has no second clip, leave it out")
        if self.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"kl_coef: {self.kl_coef} without ref_logprobs; pass the reference policy's log-probabilities")
        if self.num_tokens is None and self.loss_type == "dr_grpo":
            raise ValueError("num_tokens: None; dr_grpo needs it, as batch x maximum completion length")
        if self.num_tokens is not None and self.loss_type == "grpo":
            raise ValueError(f"num_tokens: {self.num_tokens}; grpo has no token normaliser, scale its loss instead")
        if isinstance(self.num_tokens, Tensor):
            check_shape("num_tokens", self.num_tokens, ())
        elif self.num_tokens is not None and not 0 <= self.num_tokens < float("inf"):
            raise ValueError(f"num_tokens: {self.num_tokens}; must be a number of tokens")

    @classmethod
    def from_keywords(cls, keywords: ObjectiveSettings) -> Objective:
        """The settings that a loss was called with.

        Raises:
            TypeError: one that does not exist.
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise TypeError(f"unexpected keyword {name!r}; the settings of the loss are {', '.join(known)}")
        return cls(**keywords)

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Smallest and largest ratio that the clip lets through; nothing bounds cispo's from below."""
        # Never None for cispo, see `__post_init__`.
        clip_high = 0.28 if self.clip_high is None else self.clip_high
        return (0.0, clip_high) if self.loss_type == "cispo" else (1 - self.clip_low, 1 + clip_high)

    @property
    def by_sequence(self) -> bool:
        """Whether a token's loss depends on log-probabilities of other tokens of its sequence."""
        return self.loss_type == "gspo" or (self.importance_level == "sequence" and self.rollout_logprobs is not None)

    def token_terms(self, targets: Tensor, advantages: Tensor, dtype: torch.dtype = torch.float32) -> TokenTerms:
        """Check what belongs to tokens, and spread what belongs to sequences or the batch over them.

        Args:
            targets: [T], for their number and device.
            advantages: [T], or [N] with `cu_seqlens`.
            dtype: of the result.

        Raises:
            ValueError: a tensor does not fit, or `cu_seqlens` is missing.
        """
        num_targets = len(targets)
        vectors = {name: getattr(self, name) for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
        for name, vector in vectors.items():
            if vector is not None:
                check_floats(name, vector, (num_targets,), allow_float64=True)
        if self.mask is not None:
            check_mask(self.mask, num_targets)
        check_floats("advantages", advantages, (None,), allow_float64=True)
        check_same_device(
            ("targets", targets),
            **vectors,
            advantages=advantages,
            mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            num_tokens=self.num_tokens if isinstance(self.num_tokens, Tensor) else None,
        )
        per_token = len(advantages) == num_targets
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, num_targets)
            per_token = per_token and len(self.cu_seqlens) - 1 != num_targets
        if not per_token and (self.cu_seqlens is None or len(advantages) != len(self.cu_seqlens) - 1):
            known = (
                "a sequence, which needs cu_seqlens" if self.cu_seqlens is None else f"a sequence ({len(self.cu_seqlens) - 1})"
            )
            raise ValueError(f"advantages: {len(advantages)} of them; must be one a token ({num_targets}), or one {known}")
        if self.cu_seqlens is None and (self.by_sequence or self.loss_type == "grpo"):
            what = self.loss_type if self.loss_type in ("grpo", "gspo") else "importance_level 'sequence'"
            raise ValueError(f"cu_seqlens: None; {what} needs the boundaries of the sequences")

        advantages = advantages.detach().to(dtype).contiguous()
        numbers = None
        if self.cu_seqlens is not None and (not per_token or self.by_sequence or self.loss_type == "grpo"):
            numbers = sequence_numbers(self.cu_seqlens, num_targets)
        if not per_token:
            advantages = advantages[numbers]
        keep = None if self.mask is None else self.mask.bool()
        ones = torch.ones(num_targets, dtype=dtype, device=targets.device) if keep is None else keep.to(dtype)
        num_kept = ones.sum().clamp(min=1)
        if self.num_tokens is None:
            normaliser = num_kept
        elif isinstance(self.num_tokens, Tensor):
            normaliser = self.num_tokens.to(dtype).clamp(min=1)
        else:
            normaliser = torch.full((), max(1.0, self.num_tokens), dtype=dtype, device=targets.device)
        if self.loss_type == "grpo":
            assert self.cu_seqlens is not None, "refused above"
            assert numbers is not None
            num_sequences = len(self.cu_seqlens) - 1
            # Sums of whole numbers are exact in any order, so that this is reproducible on CUDA too.
            counts = ones.new_zeros(num_sequences).index_add(0, numbers, ones)
            weights = ones / (counts.clamp(min=1)[numbers] * num_sequences)
        else:
            weights = ones / normaliser
        # Entropy is a mean over tokens whatever the policy term is divided by (TRL).
        entropy_normaliser = num_kept if self.loss_type in ("grpo", "dr_grpo") else normaliser
        return TokenTerms(self, advantages, weights, num_kept, self.entropy_coef / entropy_normaliser, numbers, keep)


def shows_settings(loss: Loss) -> Loss:
    """Let `help` and `inspect.signature` list the settings that `loss` takes as `**objective`, with their defaults."""
    shown = inspect.signature(loss, eval_str=True)
    named = [parameter for parameter in shown.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = get_type_hints(Objective)
    settings = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name])
        for field in fields(Objective)
    ]
    loss.__signature__ = shown.replace(parameters=[*named, *settings])  # type: ignore[attr-defined]  # read by inspect
    return loss


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """An objective spread over T tokens."""

    objective: Objective
    advantages: Tensor
    """[T]; masked slots hold whatever they held."""
    weights: Tensor
    """[T] what a token's loss is multiplied with before the sum; 0 where masked out."""
    num_kept: Tensor
    """[] unmasked tokens here, at least 1."""
    entropy_weight: Tensor
    """[] what an unmasked token's entropy is multiplied with."""
    sequence_numbers: Tensor | None
    """[T] int64; None where nothing depends on sequences."""
    keep: Tensor | None
    """[T] bool; None where nothing is masked."""


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What `policy_loss` and `linear_policy_loss` return; only `loss` carries a gradient."""

    loss: Tensor
    """[] the part of the batch's loss that these tokens contribute."""
    logprobs: Tensor
    """[T] fp32 log-probability of each target, in nats; 0 where masked out."""
    entropy: Tensor
    """[T] fp32 entropy of the policy's distribution, in nats; 0 where masked out."""
    clip_low_fraction: Tensor
    """[] part of the unmasked tokens whose ratio fell below its bound with a negative advantage."""
    clip_high_fraction: Tensor
    """[] part whose ratio rose above its bound with a positive advantage."""
    importance_mean: Tensor
    """[] mean over unmasked tokens of exp(old - rollout) before the cap; 1 without rollout log-probabilities."""
    importance_max: Tensor
    """[] the largest of them; 0 where everything is masked."""
    importance_capped_fraction: Tensor
    """[] part of them above the cap."""


def sequence_numbers(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] which sequence each packed token belongs to."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # The whole of cu_seqlens: torch.compile of torch 2.11 forgets on CUDA where a slice of it would begin.
    numbers = torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True) - 1
    # Only sequences that there are, whatever the boundaries hold: what is gathered with it must exist.
    return numbers.clamp(0, max(0, len(cu_seqlens) - 2))
