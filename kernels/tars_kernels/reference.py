"""Every operation in plain PyTorch: the specification, and what runs where there is no CUDA.

Shapes: T packed tokens, N sequences, D hidden size, V vocabulary, L layers, P pairs. Sequences lie one after the other in the
token dimension; `cu_seqlens` [N + 1] holds where each starts, and the total at the end. Products and sums are taken in fp32
whatever the inputs, or in fp64 for fp64 inputs, which is the truth that tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tars_kernels.backend import isolated
from tars_kernels.checks import (
    check_aligned,
    check_bias,
    check_centre,
    check_floats,
    check_head,
    check_layer_states,
    check_packing,
    check_pairs,
    check_pooling,
    check_same_device,
    check_softcap,
    check_targets,
    check_temperature,
    check_versions,
    check_weights,
    check_z_coef,
    choose_layers,
    head_parameters,
    kept_tokens,
)
from tars_kernels.divergence import LOWEST_LOGIT, Distillation, DistillationLoss, DistillationSettings
from tars_kernels.objective import (
    Objective,
    ObjectiveSettings,
    PolicyLoss,
    check_token_vectors,
    sequence_numbers,
    shows_settings,
)
from tars_kernels.softmax import SoftmaxTerms
from tars_kernels.token_loss import token_loss
from tars_kernels.vocabulary_parallel import (
    HeadOptions,
    HeadTerms,
    chosen_terms,
    logsumexp_of_parts,
    shared_by_parts,
    sum_of_parts,
    whole_size,
    whole_vocabulary,
)

NORM_FLOOR = 1e-8
"""States with a norm below this have no direction: their cosine is 0 and carries no gradient."""


def _accumulated(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@isolated
def linear_logprob(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    entropy_gradient: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each target under `softmax((hidden @ weight.T + bias) / temperature)`.

    Args:
        hidden: [T, D] states that predict `targets`.
        weight: [V, D] output head, or the `nn.Linear` itself, which shows an adapter on it.
        targets: [T] int64. On CUDA one outside the vocabulary gives NaN, since looking would stop the host.
        bias: [V] added to the logits; -inf suppresses a token.
        temperature: the logits are divided by it.
        mask: [T] bool; False makes a token's results 0, whatever its slots hold, NaN and targets outside included.
        ignore_index: targets that are masked out like that, -100 in most losses; None: no target is.
        softcap: logits, bias included, are held within plus and minus this, `softcap * tanh(logits / softcap)` (Gemma 2,
            arXiv 2408.00118, section 2); -inf stays.
        group: processes that hold the vocabulary in equal parts, in the order of their ranks; `weight` and `bias` are then this
            process's part, everything else, results included, is the same on all of them. The hidden states' gradient is summed
            over the group.
        return_entropy: also return the distribution's entropy.
        return_logsumexp: also return the logsumexp of logits / temperature, with a gradient; its square is the z-loss (arXiv
            2204.02311, section 5).
        entropy_gradient: let the entropy carry a gradient, which a frozen head pays for with another product.

    Returns:
        [T] fp32 log-probabilities in nats, then the [T] fp32 entropies and logsumexps that were asked for.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a target outside the vocabulary, a head with an adapter.
    """
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=True)
    check_same_device(("hidden", hidden), targets=targets, mask=mask)
    keep = kept_tokens(targets, mask, ignore_index)
    check_targets(targets, len(hidden), whole_size(weight, group), keep)
    check_temperature(temperature)
    check_softcap(softcap)
    entropy_gradient = return_entropy and entropy_gradient
    options = HeadOptions(temperature, softcap or 0.0, entropy_gradient, group, return_entropy, return_logsumexp)
    return chosen_terms(
        lambda hidden, targets: _head_terms(hidden, weight, bias, targets, options), hidden, targets, keep,
        (True, return_entropy, return_logsumexp),
    )  # fmt: skip


def _head_terms(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions) -> HeadTerms:
    def part_of(hidden: Tensor, targets: Tensor) -> HeadTerms:
        logits, own_bias = F.linear(_accumulated(hidden.to(weight.dtype)), _accumulated(weight)), bias
        wants_logsumexp = options.wants_logsumexp or options.group is not None
        if own_bias is not None and (options.softcap or wants_logsumexp):
            logits, own_bias = logits + own_bias, None
        if options.softcap:
            capped = options.softcap * (logits / options.softcap).tanh()
            logits = torch.where(logits == -torch.inf, logits, capped)
        logprobs, entropies = _softmax_terms(
            logits, targets, own_bias, options.temperature, wants_entropy=options.wants_entropy,
            entropy_gradient=options.entropy_gradient,
        )  # fmt: skip
        logsumexps = (logits / options.temperature).logsumexp(-1) if wants_logsumexp else torch.zeros_like(entropies)
        return HeadTerms(logprobs, entropies, logsumexps)

    return whole_vocabulary(part_of, hidden, targets, len(weight), options.group)


@shows_settings
@isolated
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
    """Policy-gradient loss of a policy given by its logits; kernels let it be differentiated once.

    Args:
        logits: [T, V] that predict `targets`.
        targets: [T] int64 sampled tokens. On CUDA an unmasked one outside the vocabulary gives NaN.
        advantages: [T], or [N] with `cu_seqlens`.
        bias: [V] added to the logits; -inf suppresses a token.
        temperature: the logits are divided by it.
        inplace: allow the memory of `logits` to be overwritten by their gradient, which saves T x V elements. Kernels do so
            already in the forward pass; plain PyTorch never does. Nothing else may read the logits afterwards.
        objective: the settings of `Objective`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a setting out of range, a target outside the vocabulary.
    """
    settings = Objective.from_keywords(objective)
    check_floats("logits", logits, (None, None), allow_float64=True)
    check_same_device(("logits", logits), targets=targets, bias=bias, advantages=advantages)
    check_targets(targets, len(logits), logits.shape[1], settings.mask)
    check_bias(bias, logits.shape[1])
    check_temperature(temperature)
    logits = _accumulated(logits)
    terms = settings.token_terms(len(targets), advantages, logits.dtype)
    if terms.keep is not None:
        logits, targets = logits.masked_fill(~terms.keep[:, None], 0.0), targets.masked_fill(~terms.keep, 0)
    logprobs, entropies = _softmax_terms(logits, targets, bias, temperature, entropy_gradient=settings.entropy_coef != 0)
    return token_loss(logprobs, entropies, terms)


@shows_settings
@isolated
def token_policy_loss(
    logprobs: Tensor, advantages: Tensor, *, entropy: Tensor | None = None, **objective: Unpack[ObjectiveSettings]
) -> PolicyLoss:
    """Policy-gradient loss from log-probabilities, with a gradient through them and, for an entropy bonus, through entropies.

    Args:
        logprobs: [T] of the sampled tokens, in nats; `from_padded` makes them, and what belongs to them, of a padded batch.
        advantages: [T], or [N] with `cu_seqlens`.
        entropy: [T] of the policy's distribution, in nats; for an entropy bonus and `top_entropy_quantile`.
        objective: the settings of `Objective`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a setting out of range, or one that needs `entropy`.
    """
    settings = Objective.from_keywords(objective)
    entropy = check_token_vectors(logprobs, advantages, entropy, settings)
    terms = settings.token_terms(len(logprobs), advantages, _accumulated(logprobs).dtype)
    return token_loss(_accumulated(logprobs), _accumulated(entropy), terms)


@shows_settings
@isolated
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
    """Policy-gradient loss of a linear head's distribution, from the states under it.

    Args:
        hidden: [T, D] states that predict `targets`.
        weight: [V, D] output head, or the `nn.Linear` itself, which shows an adapter on it.
        targets: [T] int64 sampled tokens. On CUDA an unmasked one outside the vocabulary gives NaN.
        advantages: [T], or [N] with `cu_seqlens`.
        bias: [V] added to the logits; -inf suppresses a token.
        temperature: the logits are divided by it.
        softcap: logits are held within plus and minus this, see `linear_logprob`.
        z_coef: of the z-loss: the loss grows by this times the mean over unmasked tokens of the squared logsumexp of logits /
            temperature (arXiv 2204.02311, section 5).
        group: processes that hold the vocabulary in equal parts, see `linear_logprob`.
        objective: the settings of `Objective`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a setting out of range, a target outside the vocabulary, a
            head with an adapter.
    """
    settings = Objective.from_keywords(objective)
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=True)
    check_same_device(("hidden", hidden), targets=targets, advantages=advantages)
    check_targets(targets, len(hidden), whole_size(weight, group), settings.mask)
    check_temperature(temperature)
    check_softcap(softcap)
    check_z_coef(z_coef)
    terms = settings.token_terms(len(targets), advantages, torch.promote_types(weight.dtype, torch.float32))
    if terms.keep is not None:
        # Before the product: 0 * nan would poison the head's gradient.
        hidden, targets = hidden.masked_fill(~terms.keep[:, None], 0.0), targets.masked_fill(~terms.keep, 0)
    options = HeadOptions(
        temperature, softcap or 0.0, entropy_gradient=settings.entropy_coef != 0, group=group, wants_logsumexp=z_coef != 0
    )
    logprobs, entropies, logsumexps = _head_terms(hidden, weight, bias, targets, options)
    return terms.with_z_loss(token_loss(logprobs, entropies, terms), logsumexps, z_coef)


def _softmax_terms(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    *,
    wants_entropy: bool = True,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, both [T]; the entropy is arbitrary where it is not wanted."""
    entropy_gradient = entropy_gradient and torch.is_grad_enabled()
    if logits.dtype == torch.float64 or entropy_gradient or torch.compiler.is_compiling():
        return specified_softmax_terms(logits, targets, bias, temperature, entropy_gradient)
    if not torch.is_grad_enabled():
        # What is kept for a gradient is kept where one could be asked for.
        logits, bias = logits.detach(), None if bias is None else bias.detach()
    return SoftmaxTerms.apply(logits, targets, bias, temperature, wants_entropy)


def specified_softmax_terms(
    logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """What `softmax.SoftmaxTerms` is held to."""
    if bias is not None:
        logits = logits + bias
    if temperature != 1:
        logits = logits / temperature
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(-1, targets[:, None])[:, 0]
    if not entropy_gradient:
        return logprobs, torch.special.entr(all_logprobs.detach().exp()).sum(-1)
    # entr has no finite gradient at 0, where suppressed tokens are.
    finite = all_logprobs.masked_fill(all_logprobs == -torch.inf, 0.0)
    entropy = -(all_logprobs.exp() * finite).sum(-1)
    return logprobs, entropy


@isolated
def linear_distillation_loss(  # noqa: PLR0913
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor | nn.Module,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | nn.Module | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    **distillation: Unpack[DistillationSettings],
) -> DistillationLoss:
    """Divergence between a student's and a teacher's next-token distributions, over the whole vocabulary, from hidden states.

    The teacher, its head and its bias get no gradient, also where they are the student's.

    Args:
        hidden: [T, D] states of the student.
        teacher_hidden: [T, D] states of the teacher that predict the same tokens; of any width with `teacher_weight`.
        weight: [V, D] output head, or the `nn.Linear` itself, which shows an adapter on it.
        bias: [V] added to the logits; -inf suppresses a token.
        teacher_weight: [V, teacher's D] head of the teacher; None: the student's.
        temperature: logits of both are divided by it.
        group: processes that hold the vocabulary in equal parts, see `linear_logprob`; of both heads, which may be one.
        distillation: the settings of `Distillation`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a setting out of range, a head with an adapter.
    """
    settings = Distillation.from_keywords(distillation)
    heads = settings.heads(weight, bias, teacher_weight)
    settings.check(hidden, teacher_hidden, heads, allow_float64=True)
    check_temperature(temperature)
    hidden = shared_by_parts(settings.blank(hidden), group)
    logprobs = _all_logprobs(hidden, heads.weight, heads.bias, temperature, group)
    with torch.no_grad():
        teacher_logprobs = _all_logprobs(
            settings.blank(teacher_hidden), heads.teacher_weight, heads.teacher_bias, temperature, group
        )
    return settings.loss(sum_of_parts(_divergences(logprobs, teacher_logprobs, settings), group))


shows_settings(linear_distillation_loss, Distillation)


def _all_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, group: ProcessGroup | None
) -> Tensor:
    """[T, V], all of them finite; of this process's part of the vocabulary."""
    logits = F.linear(_accumulated(hidden.to(weight.dtype)), _accumulated(weight))
    if bias is not None:
        # It alone suppresses tokens.
        logits = (logits + bias).clamp(min=LOWEST_LOGIT)
    if temperature != 1:
        logits = logits / temperature
    if group is None:
        return logits.log_softmax(-1)
    return logits - logsumexp_of_parts(logits.logsumexp(-1), group)[:, None]


def _divergences(logprobs: Tensor, teacher_logprobs: Tensor, settings: Distillation) -> Tensor:
    """[T] from [T, V]."""
    if settings.divergence == "reverse_kl":
        return F.kl_div(teacher_logprobs, logprobs, reduction="none", log_target=True).sum(-1)
    if settings.divergence == "forward_kl":
        return F.kl_div(logprobs, teacher_logprobs, reduction="none", log_target=True).sum(-1)
    beta = settings.beta
    mixture = torch.logaddexp(logprobs + math.log1p(-beta), teacher_logprobs + math.log(beta))
    own, teachers = (
        F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (logprobs, teacher_logprobs)
    )
    return beta * teachers + (1 - beta) * own


def pool_sequences(states: Tensor, cu_seqlens: Tensor, *, positions: Tensor | None = None, pooling: str = "mean") -> Tensor:
    """One vector for each packed sequence: the mean of its tokens' states, or its last token's; 0 for an empty one.

    Args:
        states: [T, D], or [M, D] with `positions`.
        cu_seqlens: [N + 1].
        positions: [T] int64 rows of `states` that hold the packed tokens, none of them twice; None: the rows themselves.
        pooling: mean or last.

    Returns:
        [N, D] fp32.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or boundaries that do not rise from 0 to T.
    """
    check_floats("states", states, (None, None), allow_float64=True)
    check_packing(states, cu_seqlens, positions)
    check_pooling(pooling)
    if positions is not None:
        states = states[positions]
    states = _accumulated(states)
    lengths = cu_seqlens.diff()
    if pooling == "last":
        padded = torch.cat([states, states.new_zeros(1, states.shape[1])])
        return padded[torch.where(lengths > 0, cu_seqlens[1:] - 1, len(states))]
    sums = states.new_zeros(len(lengths), states.shape[1])
    sums = sums.index_add(0, sequence_numbers(cu_seqlens, len(states)), states)
    return sums / lengths.clamp(min=1)[:, None]


def pooled_similarity(pooled: Tensor, pairs: Tensor, *, weights: Tensor | None = None, centre: Tensor | None = None) -> Tensor:
    """Cosine of pooled states, layer by layer (TARS, R_rep before its mean over layers).

    Args:
        pooled: [L, N, D].
        pairs: [P, 2] int64, sequence numbers.
        weights: [L] factor of each layer's column.
        centre: [L, D] subtracted from the pooled states before the cosine, or [2, L, D] for the first and the second sequence
            of a pair, such as running means of spoken and of written states; without a gradient. TARS has none (None).

    Returns:
        [P, L] fp32; 0 where a state is 0, before the centre is subtracted or after.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a sequence number out of range.
    """
    check_floats("pooled", pooled, (None, None, None), allow_float64=True)
    check_pairs(pairs, pooled.shape[1])
    check_weights(weights, len(pooled))
    check_centre(centre, pooled)
    check_same_device(("pooled", pooled), pairs=pairs, weights=weights, centre=centre)
    sides = _accumulated(pooled)[:, pairs]
    if centre is not None:
        # An empty sequence has no direction, wherever the centre lies.
        is_empty = (sides == 0).all(-1, keepdim=True)
        centre = centre.detach().to(sides.dtype).expand(2, *centre.shape[-2:])
        sides = (sides - centre.permute(1, 0, 2)[:, None]).masked_fill(is_empty, 0.0)
    left, right = sides.unbind(2)
    cosine = _cosine(left, right).T
    return cosine if weights is None else cosine * weights.to(cosine.dtype)


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine over the last dimension; 0, without a gradient, where either state has no direction."""
    squares = [(states * states).sum(-1) for states in (left, right)]
    has_direction = (squares[0] > NORM_FLOOR**2) & (squares[1] > NORM_FLOOR**2)
    norms = [square.masked_fill(~has_direction, 1.0).sqrt() for square in squares]
    return (left * right).sum(-1).masked_fill(~has_direction, 0.0) / (norms[0] * norms[1])


def layer_similarity(  # noqa: PLR0913
    hidden_states: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor,
    pairs: Tensor,
    *,
    layers: Sequence[int] | None = None,
    weights: Tensor | None = None,
    pooling: str = "mean",
    centre: Tensor | None = None,
) -> Tensor:
    """Cosine between pooled states of pairs of packed sequences, for every layer (TARS, R_rep before its mean over layers).

    Args:
        hidden_states: L tensors [T, D], or one [L, T, D].
        cu_seqlens: [N + 1] int64 boundaries, from 0 to T.
        pairs: [P, 2] int64, sequence numbers.
        layers: which of the L layers; None: all of them.
        weights: [chosen layers] factor of each column, e.g. 1 / L for a mean by `.sum(-1)`.
        pooling: mean over a sequence's tokens, or its last token.
        centre: [chosen layers, D] or [2, chosen layers, D], see `pooled_similarity`.

    Returns:
        [P, chosen layers] fp32; 0 where a sequence is empty.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a layer or sequence number out of range.
    """
    states = check_layer_states("hidden_states", hidden_states)
    chosen = choose_layers(layers, len(states))
    pooled = torch.stack([pool_sequences(states[layer], cu_seqlens, pooling=pooling) for layer in chosen])
    return pooled_similarity(pooled, pairs, weights=weights, centre=centre)


def token_similarity(
    x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor], *, layers: Sequence[int] | None = None
) -> Tensor:
    """Cosine between two versions of the same tokens' states, token by token: drift under another prompt or after training.

    Args:
        x_layers: L tensors [T, D], or one [L, T, D].
        y_layers: the same of the other version.
        layers: which of the L layers; None: all of them.

    Returns:
        [chosen layers, T] fp32; 0 where a state is 0.

    Raises:
        ValueError: versions that differ in number or shape of layers, or a layer out of range.
    """
    x, y = check_versions(x_layers, y_layers)
    chosen = choose_layers(layers, len(x))
    return torch.stack([_cosine(_accumulated(x[layer]), _accumulated(y[layer])) for layer in chosen])


def linear_cka(x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment of all pairs of layers (arXiv 1905.00414, eq. 3, on double-centred Gram matrices).

    `CKA = <HKH, HMH> / (|HKH| |HMH|)` with K = X X^T, M = Y Y^T and H the centring matrix. Needs two numbers for each pair of
    tokens and layer: T beyond about 10,000 wants another formula.

    Args:
        x_layers: Lx tensors [T, Dx], or one [Lx, T, Dx].
        y_layers: Ly tensors [T, Dy], or one [Ly, T, Dy]; token t of both belongs together.

    Returns:
        [Lx, Ly] fp32, between 0 and 1; 0 where the centred states of a layer are 0.

    Raises:
        ValueError: the two differ in number of tokens or device.
    """
    x, y = check_aligned(x_layers, y_layers)
    return cka_of_centred(*(torch.stack([_centred(layer) for layer in side]) for side in (x, y)))


def _centred(states: Tensor) -> Tensor:
    states = _accumulated(states)
    return states - states.mean(0)


def _unit_scale(states: Tensor) -> Tensor:
    """Largest entry 1 in every layer, which CKA does not notice, so that fourth powers of large states do not overflow."""
    largest = states.detach().abs().amax((1, 2), keepdim=True) if states.numel() else states.new_ones(())
    return states / largest.masked_fill(largest == 0, 1.0)


@isolated
def cka_of_centred(x: Tensor, y: Tensor) -> Tensor:
    """[Lx, Ly] from states [L, T, D] whose columns have mean 0, so that their Gram matrices are double-centred."""
    x_grams, y_grams = (torch.bmm(states, states.mT).flatten(1) for states in map(_unit_scale, (x, y)))
    products = x_grams @ y_grams.T
    scale = torch.outer(*(grams.square().sum(-1) for grams in (x_grams, y_grams)))
    return products.masked_fill(scale == 0, 0.0) / scale.masked_fill(scale == 0, 1.0).sqrt()
