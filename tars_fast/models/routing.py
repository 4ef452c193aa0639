"""Which experts of a mixture of experts a token goes through: compared with those that the engine chose, or replayed.

Trainer and engine compute the same states but for rounding, and where two experts are about as likely rounding decides. A token
that goes through another expert has another log-probability, by far more than rounding. Replaying the engine's choice in the
trainer's pass removes that (Ma et al., arXiv 2510.11370, "rollout routing replay"). The weights of the chosen experts are the
trainer's own, with their gradient.

Shapes: S tokens of a packed row, L layers, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.modules import Decoder

NOT_KNOWN = -1
"""In the place of an expert's number where the engine chose none: the token did not go through it."""


class ExpertRouting:
    """Compares the experts that the routers of a decoder choose with those that the engine chose, or replays the engine's.

    A forward pass hands the engine's choice to the decoder as the argument `routed_experts`, [S, L, K]; without it the routers
    choose as always.

    Args:
        decoder: some or all of whose layers are mixtures of experts.
    """

    def __init__(self, decoder: Decoder):
        layers: list[Any] = [layer for layer in decoder.layers if has_experts(layer)]
        self.layers = [layer.self_attn.layer_idx for layer in layers]
        """Numbers of the decoder's layers that are mixtures of experts."""
        self._routers = [layer.mlp.gate for layer in layers]
        for layer, router in zip(layers, self._routers, strict=True):
            # A copy of a decoder has copies of its hooks. They keep what they need in their own router, because a copy may
            # run in another thread.
            if not hasattr(router, "counts"):
                router.given_experts, router.replays, router.counts = None, False, []
                # In a tuple, so that it is no submodule.
                layer.self_attn.routers = (router,)
                # Inside of the layer, because one that is computed again in the backward pass runs these hooks again.
                layer.self_attn.register_forward_pre_hook(_take_given, with_kwargs=True)
                router.register_forward_hook(_route)

    def set_replay(self, *, replays: bool) -> None:
        """Whether tokens go through the experts that the engine chose."""
        for router in self._routers:
            router.replays = replays

    def take_counts(self) -> list[tuple[int, int]]:
        """(tokens that would go through other experts than the engine's, tokens compared) of each of `layers` since the last
        call; a layer that is computed twice counts twice."""
        counts = [torch.stack(router.counts).sum(0).tolist() if router.counts else [0, 0] for router in self._routers]
        for router in self._routers:
            router.counts = []
        return [(differ, known) for differ, known in counts]


def _take_given(attention: Any, inputs: Any, named: dict[str, Any]) -> Any:
    """Before a layer's attention, which gets all arguments of the decoder: its router takes its part of `routed_experts`."""
    experts_SLK = named.pop("routed_experts", None)
    (router,) = attention.routers
    router.given_experts = None if experts_SLK is None else experts_SLK[:, attention.layer_idx].long()
    return inputs, named


def _route(router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """After a router: counts, and where it replays chooses the given experts, by their weights of its own."""
    given_SK: Tensor | None = router.given_experts
    if given_SK is None:
        return output
    logits_SE, scores_SK, own_SK = output
    known_S1 = given_SK[:, :1] != NOT_KNOWN
    with torch.no_grad():
        differ_S1 = (own_SK.sort(-1).values != given_SK.sort(-1).values).any(-1, keepdim=True) & known_S1
        router.counts.append(torch.stack([differ_S1.sum(), known_S1.sum()]))
    if not router.replays:
        return output
    given_SK = given_SK.where(known_S1, own_SK)
    given_scores_SK = logits_SE.softmax(-1, dtype=torch.float32).gather(-1, given_SK)
    if router.norm_topk_prob:
        given_scores_SK = given_scores_SK / given_scores_SK.sum(-1, keepdim=True)
    return logits_SE, given_scores_SK.to(scores_SK.dtype), given_SK


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder's layer is a mixture of experts, as transformers implements those of Qwen3."""
    return hasattr(getattr(layer, "mlp", None), "experts")


def pack_routing(
    prompt_lengths: Sequence[int], routed: Sequence[Sequence[Tensor | None]], lengths: Sequence[Sequence[int]]
) -> Tensor | None:
    """[S, L, K] experts that the engine chose for the tokens of a packed row, int16; None where it chose none of them.

    Args:
        prompt_lengths: P of each group.
        routed: for each group of each completion [P + T - 1, L, K], or None.
        lengths: T of each completion.
    """
    shapes = [experts.shape[1:] for group in routed for experts in group if experts is not None]
    if not shapes:
        return None

    def unknown(num_tokens: int) -> Tensor:
        return torch.full((num_tokens, *shapes[0]), NOT_KNOWN, dtype=torch.int16)

    prompts, completions = [], []
    for num_prompt, group, group_lengths in zip(prompt_lengths, routed, lengths, strict=True):
        first = next((experts for experts in group if experts is not None), None)
        prompts.append(unknown(num_prompt) if first is None else first[:num_prompt])
        for experts, length in zip(group, group_lengths, strict=True):
            # The engine does not compute the last token, which predicts nothing.
            completions += [unknown(length)] if experts is None else [experts[num_prompt:], unknown(1)]
    return torch.cat(prompts + completions)
