"""Settings and results of a policy-gradient loss, and its per-token terms, from which every implementation starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypedDict, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from tars_kernels.checks import check_cu_seqlens, check_floats, check_mask, check_same_device, check_shape

LossName = Literal["ppo", "cispo", "sapo", "dppo-tv", "dppo-kl", "vespo", "gmpo", "reinforce"]
RatioLevel = Literal["token", "sequence", "sequence-token"]
Normalise = Literal["token-mean", "sequence-mean", "sequence-sum", "constant"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "vespo", "gmpo"]
KlEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
Level = Literal["token", "sequence"]


class Formula(NamedTuple):
    """What a name of the field stands for."""

    loss: LossName
    ratio_level: RatioLevel
    normalise: Normalise


PRESETS: dict[LossType, Formula] = {
    "grpo": Formula("ppo", "token", "sequence-mean"),
    "bnpo": Formula("ppo", "token", "token-mean"),
    "dr_grpo": Formula("ppo", "token", "constant"),
    "dapo": Formula("ppo", "token", "token-mean"),
    "luspo": Formula("ppo", "sequence", "sequence-sum"),
    "gspo": Formula("ppo", "sequence", "sequence-mean"),
    "cispo": Formula("cispo", "token", "token-mean"),
    "sapo": Formula("sapo", "token", "sequence-mean"),
    "vespo": Formula("vespo", "token", "token-mean"),
    "gmpo": Formula("gmpo", "sequence", "sequence-mean"),
}
"""The names papers gave: grpo arXiv 2402.03300, dapo 2503.14476, dr_grpo 2503.20783, gspo 2507.18071, cispo 2506.13585, sapo
2511.20347, gmpo 2507.20673, dppo 2602.04879; bnpo, luspo and vespo as TRL 1.16 has them."""

MAX_EXPONENT = 40.0
"""Where a log-ratio is larger, the ratio is e to this power, without a gradient: products of two stay finite in fp32."""
VESPO_RANGE = (-18.420680743952367, 20.0)
"""Bounds of logarithms in vespo's weight, from log 1e-8 (TRL)."""
GMPO_FLOOR = 1e-10
"""Added to importance weights before gmpo takes their logarithm (verl)."""

Loss = TypeVar("Loss", bound=Callable[..., Any])


class ObjectiveSettings(TypedDict, total=False):
    """The keywords of `Objective`, for editors and type checkers; a test holds them to its fields, which say what they mean."""

    cu_seqlens: Tensor | None
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    mask: Tensor | None
    advantage_level: Level | None
    loss_type: LossType
    loss: LossName | None
    ratio_level: RatioLevel | None
    normalise: Normalise | None
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None
    constant: float | Tensor | None
    scale: float | Tensor
    clip_low: float
    clip_high: float | None
    dual_clip: float | None
    cispo_low: float
    sapo_temperatures: tuple[float, float]
    vespo_positive: tuple[float, float]
    vespo_negative: tuple[float, float]
    importance_cap: float | None
    importance_floor: float | None
    importance_mode: Literal["truncate", "mask"]
    importance_level: Level
    off_policy_threshold: float | None
    top_entropy_quantile: float
    entropy_coef: float
    kl_coef: float
    kl_estimator: KlEstimator
    kl_bias_correction: bool


class FromKeywords:
    """A dataclass of settings that a loss takes as keywords."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Arguments that a loss has beside its settings."""

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Self:
        """The settings that a loss was called with.

        Raises:
            TypeError: one that does not exist.
        """
        # Of all ways to a dataclass's fields, the one that torch.compile follows.
        known: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]
        for name in keywords:
            if name not in known:
                similar = "".join(f", is {near!r} meant?" for near in get_close_matches(name, (*known, *cls.beside), 1))
                names = f"the settings of the loss are {', '.join(known)}; its other arguments {', '.join(cls.beside)}"
                raise TypeError(f"unexpected keyword {name!r}{similar or ';'} {names}")
        return cls(**keywords)


@dataclass(frozen=True, eq=False)
class Objective(FromKeywords):
    """Settings of `policy_loss`, `linear_policy_loss` and `token_policy_loss`, by keyword. T tokens, N sequences.

    With r = exp(logprob - old), advantage A and importance weight w = exp(old - rollout) within its bounds, the loss of a token
    is `-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) * w + kl_coef * KL * r`, KL = exp(ref - logprob) - (ref - logprob)
    - 1, and the loss of the batch the sum over unmasked tokens divided by their number. `loss`, `ratio_level`, `normalise` and
    `kl_*` change the parts of this formula; docs/policy-losses.md has each of them beside its name in TRL, verl and Liger.

    Raises:
        ValueError: a setting out of range, or a tensor of the wrong shape, dtype or device.
    """

    cu_seqlens: Tensor | None = None
    """[N + 1] boundaries of the packed sequences, from 0 to T; for whatever belongs to sequences."""
    old_logprobs: Tensor | None = None
    """[T] of the policy that the ratio starts from. None: the current policy, so that r is exactly 1."""
    rollout_logprobs: Tensor | None = None
    """[T] as the rollout engine reports them; NaN where it reports none, which gives w = 1. None: w = 1 everywhere."""
    ref_logprobs: Tensor | None = None
    """[T] of the reference policy of the KL term."""
    importance_weights: Tensor | None = None
    """[T] ready-made w, taken as they are, in place of those from `rollout_logprobs`."""
    mask: Tensor | None = None
    """[T] bool; False leaves a token out of everything, whatever its slots hold, NaN included."""
    advantage_level: Level | None = None
    """Whether advantages are one a token or one a sequence. None: what their number says, which must say it (T is not N)."""
    loss_type: LossType = "dapo"
    """The name of a combination of the next three, see `PRESETS`: each of them that is None is taken from it."""
    loss: LossName | None = None
    """ppo: clipped on the side of the advantage. cispo: -clip(r) * A * logprob with the factor held constant. sapo: a sigmoid
    gate of r in place of the clip. dppo-tv, dppo-kl: -r * A * logprob with the factor held constant, 0 where the probability
    moved too far. vespo: the same with a gamma weight of the sequence's ratio. gmpo: r is the geometric mean of the sequence's
    clipped ratios. reinforce: -A * logprob."""
    ratio_level: RatioLevel | None = None
    """sequence: r = exp(mean over the sequence of logprob - old). sequence-token: the same value, but the gradient of a token's
    r goes to that token alone (verl's gspo)."""
    normalise: Normalise | None = None
    """What the sum over unmasked tokens is divided by. token-mean: their number. sequence-mean: the mean over sequences of the
    mean over tokens. sequence-sum: the number of sequences. constant: `constant`."""
    num_tokens: float | Tensor | None = None
    """Unmasked tokens of the whole accumulated batch, a number or 0-d tensor, in place of those here; at least 1. With it, and
    `num_sequences` where these count, the losses of micro-batches add up to the loss of the batch."""
    num_sequences: float | Tensor | None = None
    """The same for sequences. None: N, those that are empty or masked out included (TRL)."""
    constant: float | Tensor | None = None
    """What normalise constant (dr_grpo) divides by: sequences x longest completion."""
    scale: float | Tensor = 1.0
    """The loss is multiplied by it. `policy_loss` writes the gradient of bf16 logits in the forward pass: a factor given here,
    and not applied to its result, rounds that gradient once instead of twice and saves another pass over it."""
    clip_low: float = 0.2
    """ppo: r is held above 1 - clip_low where A < 0. gmpo: log r above -clip_low. dppo: the probability may fall by so much."""
    clip_high: float | None = None
    """ppo: r is held below 1 + clip_high where A > 0; None: 0.28. gmpo: log r below clip_high. cispo: the upper bound of r
    itself (TRL's epsilon_high). dppo: the probability may rise by so much."""
    dual_clip: float | None = None
    """ppo: upper bound of r where A < 0, at least 1 + clip_high (arXiv 2505.07291, eq. 1). dppo: of its constant factor."""
    cispo_low: float = 0.0
    """Lower bound of cispo's factor (verl: 1 - clip_ratio_low)."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """Of the gate where A > 0, and elsewhere."""
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    """Shape k and rate lambda of the gamma weight where A >= 0."""
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    """The same where A < 0."""
    importance_cap: float | None = 2.0
    """Largest w."""
    importance_floor: float | None = None
    """Smallest w."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: w outside of its bounds becomes the bound. mask: it becomes 0 (with both bounds: IcePop)."""
    importance_level: Level = "token"
    """sequence: w is the product over the sequence's unmasked tokens."""
    off_policy_threshold: float | None = None
    """Tokens with A < 0 have no policy loss where the sequence's mean of rollout (else old) - logprob is larger (DeepSeek-V3.2,
    eq. 9)."""
    top_entropy_quantile: float = 1.0
    """Part of the unmasked tokens, those of highest entropy, that policy loss and entropy bonus act on (arXiv 2506.01939)."""
    entropy_coef: float = 0.0
    """The loss falls by this times the mean entropy of unmasked tokens, whose gradient is taken only where this is not 0."""
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    """With d = logprob - ref. k1: d. k2: d^2 / 2. k3: exp(-d) + d - 1. k1+, k3+: their value with the gradient of k2 (verl)."""
    kl_bias_correction: bool = True
    """Multiply KL by r, gradient included (DeepSeek-V3.2; TRL's default, verl has no such factor)."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name in _OPTIONAL_CHOICES):
                raise ValueError(f"{name}: {value!r}; must be one of {', '.join(known)}")
        self._check_numbers()
        self._check_formula()
        if self.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"kl_coef: {self.kl_coef} without ref_logprobs; pass the reference policy's log-probabilities")

    def _check_numbers(self) -> None:
        for name in (
            "clip_low", "clip_high", "dual_clip", "cispo_low", "importance_cap", "importance_floor", "off_policy_threshold",
            "sapo_temperatures", "vespo_positive", "vespo_negative",
        ):  # fmt: skip
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if not 0 <= number < float("inf"):
                    raise ValueError(f"{name}: {value}; must be a finite number, at least 0")
        if min(self.sapo_temperatures) == 0:
            raise ValueError(f"sapo_temperatures: {self.sapo_temperatures}; must be above 0")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile: {self.top_entropy_quantile}; must be above 0, at most 1")
        if None not in (self.importance_floor, self.importance_cap) and self.importance_floor >= self.importance_cap:  # type: ignore[operator]
            raise ValueError(f"importance_floor: {self.importance_floor}; must be below importance_cap, {self.importance_cap}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                check_shape(name, value, ())
            elif value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value}; must be a finite number, at least 0")
        for name in ("constant", "scale"):
            if not isinstance(getattr(self, name), Tensor) and getattr(self, name) == 0:
                raise ValueError(f"{name}: 0; must be above 0")

    def _check_formula(self) -> None:
        loss, ratio_level, normalise = self.formula
        if self.clip_high is None and loss in ("cispo", "dppo-tv", "dppo-kl"):
            remedy = "as the upper bound of the ratio itself (e.g. 5.0)" if loss == "cispo" else "as the largest divergence"
            raise ValueError(f"clip_high: None; {loss} needs it, {remedy}")
        if loss == "ppo" and self.clip_low >= 1:
            raise ValueError(f"clip_low: {self.clip_low}; must be below 1, the ratio is held above 1 - clip_low")
        if loss == "cispo" and self.cispo_low > self.high:
            raise ValueError(f"cispo_low: {self.cispo_low}; must not be above clip_high, {self.high}")
        if self.dual_clip is not None and loss not in ("ppo", "dppo-tv", "dppo-kl"):
            raise ValueError(f"dual_clip: {self.dual_clip}; {loss} has no second clip, leave it out")
        if self.dual_clip is not None and loss == "ppo" and self.dual_clip < 1 + self.high:
            raise ValueError(f"dual_clip: {self.dual_clip}; must be at least 1 + clip_high, {1 + self.high}")
        if ratio_level != "token" and loss in ("dppo-tv", "dppo-kl", "vespo", "reinforce"):
            raise ValueError(f"ratio_level: {ratio_level!r}; {loss} is defined for 'token'")
        if loss == "gmpo" and ratio_level != "sequence":
            raise ValueError(f"ratio_level: {ratio_level!r}; gmpo is defined for 'sequence', which loss_type 'gmpo' implies")
        if loss in ("vespo", "gmpo") and self.importance_level == "sequence":
            raise ValueError(f"importance_level: 'sequence'; {loss} takes weights of tokens into its sequence's weight itself")
        if (normalise == "constant") != (self.constant is not None):
            remedy = "needs it, as sequences x longest completion" if self.constant is None else "does not use it"
            raise ValueError(f"constant: {self.constant}; normalise {normalise!r} (loss_type {self.loss_type!r}) {remedy}")
        if self.num_sequences is not None and not normalise.startswith("sequence"):
            raise ValueError(f"num_sequences: {self.num_sequences}; normalise {normalise!r} does not count sequences")

    @property
    def formula(self) -> Formula:
        """Which loss, ratio and normaliser, the preset's where they were not given."""
        preset = PRESETS[self.loss_type]
        return Formula(self.loss or preset.loss, self.ratio_level or preset.ratio_level, self.normalise or preset.normalise)

    @property
    def high(self) -> float:
        """`clip_high` with its default."""
        return 0.28 if self.clip_high is None else self.clip_high

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """Bounds of r for ppo and cispo, of log r for gmpo; for dppo how far the probability may fall and rise."""
        bounds = {"ppo": (1 - self.clip_low, 1 + self.high), "cispo": (self.cispo_low, self.high)}
        bounds["gmpo"] = (-self.clip_low, self.high)
        return bounds.get(self.formula.loss, (self.clip_low, self.high))

    @property
    def importance_bounds(self) -> tuple[float, float]:
        """Smallest and largest w."""
        return (
            -1.0 if self.importance_floor is None else self.importance_floor,
            float("inf") if self.importance_cap is None else self.importance_cap,
        )

    @property
    def sequence_importance(self) -> bool:
        """Whether w is a product over the sequence."""
        return self.importance_level == "sequence" and self.rollout_logprobs is not None and self.importance_weights is None

    @property
    def by_sequence(self) -> bool:
        """Whether a token's loss depends on log-probabilities of other tokens of its sequence."""
        loss, ratio_level, _ = self.formula
        couples = ratio_level != "token" or loss in ("vespo", "gmpo")
        return couples or self.sequence_importance or self.off_policy_threshold is not None

    def token_terms(self, num_tokens: int, advantages: Tensor, dtype: torch.dtype = torch.float32) -> TokenTerms:
        """Check what belongs to tokens, and spread what belongs to sequences or the batch over them.

        Args:
            num_tokens: T.
            advantages: [T], or [N] with `cu_seqlens`.
            dtype: of the result.

        Raises:
            ValueError: a tensor does not fit, or `cu_seqlens` is missing.
        """
        self._check_tensors(num_tokens, advantages)
        advantages = advantages.detach().to(dtype).contiguous()
        normalise, device = self.formula.normalise, advantages.device
        per_token = self._advantages_per_token(num_tokens, len(advantages))
        numbers = None
        if self.cu_seqlens is not None and (not per_token or self.by_sequence or normalise == "sequence-mean"):
            numbers = sequence_numbers(self.cu_seqlens, num_tokens)
        if not per_token:
            advantages = advantages[numbers]
        keep = None if self.mask is None else self.mask.bool()
        ones = torch.ones(num_tokens, dtype=dtype, device=device) if keep is None else keep.to(dtype)
        num_kept = ones.sum().clamp(min=1)

        def number(value: float | Tensor | None, otherwise: Tensor | int) -> Tensor | float:
            if value is None:
                return otherwise
            return value.to(dtype).clamp(min=1) if isinstance(value, Tensor) else max(1.0, value)

        kept = normaliser = number(self.num_tokens, num_kept)
        if normalise == "constant":
            assert self.constant is not None, "refused above"
            normaliser = self.constant.to(dtype) if isinstance(self.constant, Tensor) else float(self.constant)
        if normalise.startswith("sequence"):
            assert self.cu_seqlens is not None, "refused above"
            num_sequences = normaliser = number(self.num_sequences, len(self.cu_seqlens) - 1)
            if normalise == "sequence-mean":
                assert numbers is not None
                # Sums of whole numbers are exact in any order, so that this is reproducible on CUDA too.
                counts = ones.new_zeros(len(self.cu_seqlens) - 1).index_add(0, numbers, ones)
                normaliser = counts.clamp(min=1)[numbers] * num_sequences
        weights = ones / normaliser
        # Entropy is a mean over tokens whatever the policy term is divided by (TRL).
        mean_weight = 1.0 / (kept if isinstance(kept, Tensor) else ones.new_full((), kept))
        if isinstance(self.scale, Tensor) or self.scale != 1:
            weights, mean_weight = weights * self.scale, mean_weight * self.scale
        return TokenTerms(self, advantages, weights, num_kept, mean_weight, self.entropy_coef * mean_weight, numbers, keep)

    def _check_tensors(self, num_tokens: int, advantages: Tensor) -> None:
        vectors = {name: getattr(self, name) for name in VECTORS}
        for name, vector in vectors.items():
            if vector is not None:
                check_floats(name, vector, (num_tokens,), allow_float64=True)
        if self.mask is not None:
            check_mask(self.mask, num_tokens)
        check_floats("advantages", advantages, (None,), allow_float64=True)
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        check_same_device(
            ("advantages", advantages), **vectors, mask=self.mask, cu_seqlens=self.cu_seqlens,
            **{name: number for name, number in numbers.items() if isinstance(number, Tensor)},
        )  # fmt: skip
        if self.cu_seqlens is not None:
            check_cu_seqlens(self.cu_seqlens, num_tokens)
        elif self.by_sequence or self.formula.normalise.startswith("sequence"):
            loss, ratio_level, normalise = self.formula
            needy = {
                f"ratio_level {ratio_level!r}": ratio_level != "token",
                f"loss {loss!r}": loss in ("vespo", "gmpo"),
                "importance_level 'sequence'": self.sequence_importance,
                "off_policy_threshold": self.off_policy_threshold is not None,
                f"normalise {normalise!r}": normalise.startswith("sequence"),
            }
            what = next(name for name, needs in needy.items() if needs)
            raise ValueError(f"cu_seqlens: None; {what} (loss_type {self.loss_type!r}) needs the boundaries of the sequences")

    def _advantages_per_token(self, num_tokens: int, num_advantages: int) -> bool:
        num_sequences = None if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        fits = {"token": num_advantages == num_tokens, "sequence": num_advantages == num_sequences}
        if self.advantage_level is None and all(fits.values()) and num_tokens:
            raise ValueError(
                f"advantages: {num_advantages} for as many tokens as sequences; say advantage_level='token' or 'sequence'"
            )
        level = self.advantage_level or ("token" if fits["token"] and not fits["sequence"] else "sequence")
        if not fits[level]:
            known = "a sequence, which needs cu_seqlens" if num_sequences is None else f"a sequence ({num_sequences})"
            wanted = f"one a token ({num_tokens}), or one {known}"
            if self.advantage_level is not None:
                wanted = f"one a token ({num_tokens})" if level == "token" else f"one {known}"
            raise ValueError(f"advantages: {num_advantages} of them; must be {wanted}")
        return level == "token"


VECTORS = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "importance_weights")
"""Settings that hold one number a token."""
_NUMBERS = ("num_tokens", "num_sequences", "constant", "scale")
"""Settings that may be 0-d tensors."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": get_args(LossType),
    "loss": get_args(LossName),
    "ratio_level": get_args(RatioLevel),
    "normalise": get_args(Normalise),
    "advantage_level": get_args(Level),
    "importance_mode": ("truncate", "mask"),
    "importance_level": get_args(Level),
    "kl_estimator": get_args(KlEstimator),
}
_OPTIONAL_CHOICES = ("loss", "ratio_level", "normalise", "advantage_level")


def check_token_vectors(logprobs: Tensor, advantages: Tensor, entropy: Tensor | None, objective: Objective) -> Tensor:
    """What `token_policy_loss` starts from; returns the entropies, 0 where none are needed.

    Raises:
        ValueError: a wrong shape, dtype or device, or entropies that are needed and missing.
    """
    check_floats("logprobs", logprobs, (None,), allow_float64=True)
    check_same_device(("logprobs", logprobs), advantages=advantages, entropy=entropy)
    for name, idle in (("entropy_coef", 0), ("top_entropy_quantile", 1)):
        if entropy is None and getattr(objective, name) != idle:
            raise ValueError(f"entropy: None; {name} {getattr(objective, name)} needs it")
    if entropy is None:
        return torch.zeros_like(logprobs)
    check_floats("entropy", entropy, (len(logprobs),), allow_float64=True)
    return entropy if objective.entropy_coef != 0 else entropy.detach()


def from_padded(mask: Tensor, *, drop_padding: bool = False, **vectors: Tensor) -> dict[str, Any]:
    """The keywords of `token_policy_loss` for a padded batch of B completions of at most S tokens.

    Padding stays in the vectors, masked out, so that no shape depends on data and the host waits for nothing;
    `result.token_losses.view_as(mask)` has the padded shape again.

    Args:
        mask: [B, S] of any dtype, not 0 where a token counts.
        drop_padding: leave padding out of the vectors, for `linear_policy_loss`, whose work it saves. Reads the mask on the
            host, and masks nothing any more.
        vectors: [B, S] or [B, S, D] by the names of the loss's arguments; [B, 1] and [B] belong to whole sequences.

    Returns:
        `mask`, `cu_seqlens`, every one of `vectors` with B and S as one dimension, and with `advantages` the
        `advantage_level`.

    Raises:
        ValueError: a shape does not fit.
    """
    check_shape("mask", mask, (None, None))
    if mask.device.type == "cpu" and mask.is_floating_point() and (mask < 0).any():
        raise ValueError("mask: holds numbers below 0; pass one that is not 0 where a token counts, not one that is added")
    batch, longest = mask.shape
    keep = mask.flatten() != 0
    chosen = keep.nonzero()[:, 0] if drop_padding else None
    lengths = (mask != 0).sum(1) if drop_padding else torch.full((batch,), longest, device=mask.device)
    found: dict[str, Any] = {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])}
    if not drop_padding:
        found["mask"] = keep
    for name, vector in vectors.items():
        if name == "advantages" and vector.shape in ((batch,), (batch, 1)):
            found |= {"advantages": vector.flatten(), "advantage_level": "sequence"}
            continue
        if vector.ndim == 1:
            vector = vector[:, None]
        if vector.shape[0] != batch or vector.shape[1] not in (1, longest):
            raise ValueError(f"{name}: shape {tuple(vector.shape)}; must be [{batch}, {longest}], as the mask, or [{batch}]")
        flat = vector.expand(batch, longest, *vector.shape[2:]).flatten(0, 1)
        found[name] = flat if chosen is None else flat[chosen]
        if name == "advantages":
            found["advantage_level"] = "token"
    return found


def shows_settings(loss: Loss, kind: type[Any] = Objective) -> Loss:
    """Let `help` and `inspect.signature` list the settings that `loss` takes as `**`: the fields of `kind`, with defaults."""
    shown = inspect.signature(loss, eval_str=True)
    named = [parameter for parameter in shown.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    # Of all losses, for the message about a keyword that none of them has.
    kind.beside = tuple(dict.fromkeys((*kind.beside, *(parameter.name for parameter in named))))
    kinds = get_type_hints(kind)
    settings = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name])
        for field in fields(kind)
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
    mean_weight: Tensor
    """[] what makes a sum over unmasked tokens a part of the batch's mean, times the loss's scale."""
    entropy_weight: Tensor
    """[] what an unmasked token's entropy is multiplied with."""
    sequence_numbers: Tensor | None
    """[T] int64; None where nothing depends on sequences."""
    keep: Tensor | None
    """[T] bool; None where nothing is masked."""
    acts: Tensor | None = None
    """[T] bool, tokens that policy loss and entropy bonus act on; None: all that are kept."""

    def with_z_loss(self, result: PolicyLoss, logsumexps: Tensor, z_coef: float) -> PolicyLoss:
        """`result` and `z_coef` times the mean squared logsumexp of unmasked tokens."""
        if z_coef == 0:
            return result
        kept = logsumexps if self.keep is None else logsumexps.masked_fill(~self.keep, 0.0)
        return replace(result, loss=result.loss + kept.square().sum() * (z_coef * self.mean_weight))

    def of_top_entropy(self, entropies: Tensor) -> TokenTerms:
        """The same, acting on the tokens of highest entropy only, as `top_entropy_quantile` says."""
        quantile = self.objective.top_entropy_quantile
        if quantile == 1 or not len(entropies):
            return self
        entropies = entropies.detach()
        known = entropies if self.keep is None else entropies.masked_fill(~self.keep, torch.inf)
        ordered = known.sort().values
        place = (1 - quantile) * (self.num_kept - 1)
        below = place.floor()
        low, high = ordered.gather(0, torch.stack([below, place.ceil()]).long()).unbind()
        acts = (entropies >= torch.lerp(low, high, (place - below).to(low.dtype))) & (self.weights != 0)
        num_acting = acts.sum().clamp(min=1)
        return replace(self, acts=acts, entropy_weight=self.entropy_weight * (self.num_kept / num_acting))


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What `policy_loss`, `linear_policy_loss` and `token_policy_loss` return; only `loss` carries a gradient."""

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
    """[] mean over unmasked tokens of exp(old - rollout) before its bounds; 1 without rollout log-probabilities."""
    importance_max: Tensor
    """[] the largest of them; 0 where everything is masked."""
    importance_capped_fraction: Tensor
    """[] part of them outside of their bounds."""
    token_losses: Tensor
    """[T] fp32 loss of each token, KL term included and entropy bonus not, before normaliser and scale; 0 where masked out."""
    kl: Tensor
    """[T] fp32 estimate of KL as it enters the loss, before its coefficient; 0 without reference and where masked out."""


def sequence_numbers(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] which sequence each packed token belongs to."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # The whole of cu_seqlens: torch.compile of torch 2.11 forgets on CUDA where a slice of it would begin.
    numbers = torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True) - 1
    # Only sequences that there are, whatever the boundaries hold: what is gathered with it must exist.
    return numbers.clamp(0, max(0, len(cu_seqlens) - 2))
