"""Output heads whose vocabulary lies in equal parts on the processes of a group, in the order of their ranks.

Every process holds the same hidden states [T, D] and targets [T], computes log-probability, entropy and logsumexp of its part
of the vocabulary, and learns those of the others in one exchange of [3, T] numbers. The gradient by the hidden states, which
every process has of its own part alone, is added up over the group. What is exchanged is added up by every process in the same
order, so that all have the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class HeadTerms(NamedTuple):
    """What is known of a head's distribution for every token; all [T], in nats."""

    logprobs: Tensor
    """Of the targets."""
    entropies: Tensor
    logsumexps: Tensor
    """Of the logits over the temperature."""


class HeadOptions(NamedTuple):
    """How terms are taken from logits."""

    temperature: float = 1.0
    softcap: float = 0.0
    """Logits, bias included, are held within plus and minus this by tanh; 0: they are not."""
    entropy_gradient: bool = False
    group: dist.ProcessGroup | None = None
    """The processes that hold parts of the vocabulary; None: this one holds all of it."""
    wants_entropy: bool = True
    """The entropy may be left out, where that saves something."""
    wants_logsumexp: bool = True


def whole_size(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Tokens of the whole vocabulary, of which `weight` [V, D] is this process's part."""
    return len(weight) * (1 if group is None else dist.get_world_size(group))


class _SumGradients(torch.autograd.Function):
    """The same tensor; its gradient is the sum of those of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> Any:
        gradient = upstreams[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def shared_by_parts(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`hidden`, whose gradient is the sum of those that the processes find."""
    return hidden if group is None else _SumGradients.apply(hidden, group)


def sum_of_parts(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over processes, which all go on with it alike, of what each has of its part of the vocabulary."""
    return tensor if group is None else gathered(tensor, group).sum(0)


class _Logsumexp(torch.autograd.Function):
    """Logsumexp over processes, of which each goes on with its own part: their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole = gathered(own, group).logsumexp(0)
        ctx.group = group
        ctx.save_for_backward(own, whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> Any:
        own, whole = ctx.saved_tensors
        return gathered(upstreams[0], ctx.group).sum(0) * (own - whole).exp(), None


def logsumexp_of_parts(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T] of the whole vocabulary, from that of this process's part."""
    return _Logsumexp.apply(own, group)


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[processes, ...]; only the part of this process carries a gradient."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = own
    return torch.stack(parts)


def whole_vocabulary(
    part_of: Callable[[Tensor, Tensor], HeadTerms],
    hidden: Tensor,
    targets: Tensor,
    size: int,
    group: dist.ProcessGroup | None,
) -> HeadTerms:
    """Terms of the whole vocabulary.

    Args:
        part_of: terms of this process's part from (hidden, targets within the part).
        hidden: [T, D], the same on every process.
        targets: [T] of the whole vocabulary.
        size: tokens of a part of the vocabulary.
        group: the processes that hold the parts; None: this one holds all of it.
    """
    if group is None:
        return part_of(hidden, targets)
    owners = targets // size
    is_here = owners == dist.get_rank(group)
    part = part_of(shared_by_parts(hidden, group), torch.where(is_here, targets % size, 0))
    # Of a target that lies elsewhere the part has a log-probability too, of its first token.
    logprobs, entropies, logsumexps = gathered(
        torch.stack([part.logprobs.masked_fill(~is_here, 0.0), part.entropies, part.logsumexps]), group
    ).unbind(1)
    return combined(HeadTerms(logprobs, entropies, logsumexps), owners)


def combined(parts: HeadTerms, owners: Tensor) -> HeadTerms:
    """Terms of the whole from those of the parts [parts, T]; `owners` [T] says in which part a token's target lies."""
    logprobs, entropies, logsumexps = parts
    if len(logprobs) == 1:
        return HeadTerms(logprobs[0], entropies[0], logsumexps[0])
    places = owners.clamp(0, len(logprobs) - 1)[None]
    others = logsumexps.scatter(0, places, -torch.inf).logsumexp(0)
    # log(1 + others / own): accurate where the others hold next to nothing.
    logprob = logprobs.gather(0, places)[0] - F.softplus(others - logsumexps.gather(0, places)[0], threshold=50)
    shares = logsumexps.log_softmax(0)
    entropy = (shares.exp() * (entropies - shares)).sum(0)
    return HeadTerms(logprob, entropy, logsumexps.logsumexp(0))


def chosen_terms(
    terms_of: Callable[[Tensor, Tensor], HeadTerms],
    hidden: Tensor,
    targets: Tensor,
    keep: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Tensor | tuple[Tensor, ...]:
    """The wanted ones of `HeadTerms`, 0 for tokens that are not kept, whatever their slots hold."""
    if keep is not None:
        # A NaN state would reach the head's gradient, a target be outside the vocabulary.
        hidden, targets = hidden.masked_fill(~keep[:, None], 0.0), targets.masked_fill(~keep, 0)
    chosen = [term for term, want in zip(terms_of(hidden, targets), wanted, strict=True) if want]
    if keep is not None:
        chosen = [term.masked_fill(~keep, 0.0) for term in chosen]
    return tuple(chosen) if len(chosen) > 1 else chosen[0]
