"""The KV cache of the transformers engine: keys and values of prompts, and of their completions as they grow.

It reaches a decoder's attention as the keyword `key_values`, as `PackedGroups` reach it as `groups` (`packed_attention.py`),
so that transformers keeps no cache and makes no mask. The prompts go through the model as one row, one after the other. Then
every prompt has a row of the cache: its keys, padded on the right, followed by the first token of each of its completions,
then the second of each, and so on. The cache stores a prompt once, and one pass over a row serves all its completions:

    row of prompt r | p p p p - - | a1 b1 c1 d1 | a2 b2 c2 d2 | ...     N = 4 completions a, b, c, d; - is padding

Shapes: R prompts, N completions of each, H heads, H' heads of keys and values, E head size, S tokens of a row, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence


class PromptKeyValues:
    """Attention over prompts, keeping their keys and values.

    Args:
        lengths: [R] tokens of each prompt.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self._running = range(0)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """[R, H', C, E] keys and values."""
        self.heads_per_key = 1
        """H / H'."""

    def passes(self, max_tokens: int) -> Iterator[range]:
        """Split the prompts into passes of at most `max_tokens`, or of one prompt; `attend` works on those yielded last."""
        start = 0
        while start < len(self.lengths):
            end = start + 1
            while end < len(self.lengths) and sum(self.lengths[start : end + 1]) <= max_tokens:
                end += 1
            self._running = range(start, end)
            yield self._running
            start = end

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, S, H, E] causal attention of queries [1, H, S, E] within each prompt; keeps keys and values [1, H', S, E]."""
        lengths = [self.lengths[prompt] for prompt in self._running]
        outputs = [
            scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
            for queries, keys, values in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        ]
        if layer not in self.layers:
            self.heads_per_key = query.shape[1] // key.shape[1]
            shape = (len(self.lengths), key.shape[1], max(self.lengths), key.shape[3])
            self.layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        for held, states in zip(self.layers[layer], (key, value), strict=True):
            rows = pad_sequence(states[0].transpose(0, 1).split(lengths), batch_first=True)
            held[self._running.start : self._running.stop, :, : max(lengths)] = rows.transpose(1, 2)
        return torch.cat(outputs, dim=2).transpose(1, 2)


class CompletionKeyValues:
    """Attention of one new token of every completion, keeping its keys and values; call `grow` before each token.

    Args:
        prompts: the keys and values of the prompts, which this object takes over.
        num_completions: N
        room: tokens of a completion that memory is taken for at a time.
    """

    def __init__(self, prompts: PromptKeyValues, num_completions: int, room: int):
        self._layers = prompts.layers
        self._num_completions, self._room = num_completions, room
        keys = self._layers[0][0]
        self._num_columns = keys.shape[2]
        lengths = torch.tensor(prompts.lengths, device=keys.device)
        padding = torch.arange(self._num_columns, device=keys.device) >= lengths[:, None]
        others = ~torch.eye(num_completions, dtype=torch.bool, device=keys.device)
        self._own_columns = _mask(others.repeat(prompts.heads_per_key, room), keys.dtype)
        """[H / H' * N, room * N] mask under which each completion sees its own columns only."""
        self._mask = _mask(padding, keys.dtype)[:, None, None].expand(-1, -1, len(self._own_columns), -1)
        """[R, 1, H / H' * N, C with room] added to the attention scores."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[R, N, H, E] attention of queries [R, H, N, E] to prompt and completion; keeps keys and values [R, H', N, E]."""
        start, end = self._num_columns - self._num_completions, self._num_columns
        keys, values = self._layers[layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        # Query heads that share a key head are treated as further queries of it, so that no key is copied.
        queries = query.reshape(*key.shape[:2], -1, key.shape[3])
        output = scaled_dot_product_attention(
            queries, keys[:, :, :end], values[:, :, :end], attn_mask=self._mask[..., :end], scale=scale
        )
        return output.reshape(query.shape).transpose(1, 2)

    def grow(self) -> None:
        """Make room for one more token of every completion."""
        if self._num_columns == self._mask.shape[3]:
            self._mask = torch.cat([self._mask, self._own_columns.expand(len(self._mask), 1, -1, -1)], dim=3)
            self._change(lambda held: pad(held, (0, 0, 0, self._own_columns.shape[1])))
        self._num_columns += self._num_completions

    def select(self, rows: Tensor) -> None:
        """Keep the rows of these prompts and drop the others.

        Args:
            rows: int64 numbers of rows.
        """
        self._mask = self._mask[rows]
        self._change(lambda held: held[rows])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        # Layer by layer, so that memory holds no more than one of them twice.
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = change(keys), change(values)


KeyValues = PromptKeyValues | CompletionKeyValues


def _mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask: -inf where `hidden`, else 0."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
