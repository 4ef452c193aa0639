"""Keys and values of prompts whose completions grow side by side, a token at a time.

Handed to a decoder's attention as a keyword, as `PackedGroups` are (`packed_attention.py`), so that transformers keeps no cache
and makes no mask. The prompts are run as one row, behind each other. Then each has a row: its own keys, padded on the right,
and behind them those of its completions, the first token of each, then the second. All rows grow in the same columns, in
place; a prompt is held once, and one pass over a row serves all completions.

Shapes: R prompts, N completions of each, H heads, H' heads of keys and values, E head size, S tokens of a row, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence


class KeyValues:
    """Those of one batch. The first pass is that of the prompts; then comes `branch`, and `grow` before every further pass.

    Args:
        prompt_lengths: [R]
        room: tokens of a completion that memory is taken for at a time.
    """

    def __init__(self, prompt_lengths: Sequence[int], room: int):
        self._prompt_lengths = list(prompt_lengths)
        self._room = room
        self._num_columns = max(prompt_lengths)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        """[R, H', C with room, E] keys and values."""
        self._queries_per_key = 1
        self._own_columns: Tensor | None = None
        """[1, 1, H / H' * N, room * N] what a completion sees of those that are added at a time: its own."""
        self._mask: Tensor | None = None
        """[R, 1, H / H' * N, C with room] added to the scores."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of queries to their prompt or completion so far; its keys and values are kept.

        Args:
            query: [1, H, S, E] of all prompts, then [R, H, N, E] of a token of every completion.
            key: the same of H' heads, and so `value`.

        Returns:
            [1, S, H, E], then [R, N, H, E].
        """
        if self._mask is None:
            prompts = zip(*(states.split(self._prompt_lengths, dim=2) for states in (query, key, value)), strict=True)
            outputs = [
                scaled_dot_product_attention(*prompt, is_causal=True, scale=scale, enable_gqa=True) for prompt in prompts
            ]
            self._queries_per_key = query.shape[1] // key.shape[1]
            self._layers[layer] = self._by_prompt(key), self._by_prompt(value)
            return torch.cat(outputs, dim=2).transpose(1, 2)
        end, num_new = self._num_columns, key.shape[2]
        keys, values = (held[:, :, :end] for held in self._layers[layer])
        keys[:, :, -num_new:] = key
        values[:, :, -num_new:] = value
        # Heads that share keys are further queries of one head, so that no key is repeated.
        queries = query.reshape(*key.shape[:2], -1, key.shape[3])
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask[..., :end], scale=scale)
        return output.reshape(query.shape).transpose(1, 2)

    def branch(self, num_completions: int) -> None:
        """Every prompt gets so many completions."""
        keys = self._layers[0][0]
        others = ~torch.eye(num_completions, dtype=torch.bool, device=keys.device)
        others = others.repeat(self._queries_per_key, self._room)
        lengths = torch.tensor(self._prompt_lengths, device=keys.device)
        padding = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
        self._own_columns = _hidden(others, keys.dtype)[None, None]
        self._mask = _hidden(padding, keys.dtype)[:, None, None].expand(-1, -1, len(others), -1)

    def grow(self) -> None:
        """Make a place for one more token of every completion."""
        if self._num_columns == self._mask.shape[3]:
            self._mask = torch.cat([self._mask, self._own_columns.expand(len(self._mask), -1, -1, -1)], dim=3)
            self._change(lambda held: pad(held, (0, 0, 0, self._own_columns.shape[3])))
        self._num_columns += self._own_columns.shape[3] // self._room

    def select(self, rows: Tensor) -> None:
        """Only these prompts' completions go on."""
        self._mask = self._mask[rows]
        self._change(lambda held: held[rows])

    def _by_prompt(self, states: Tensor) -> Tensor:
        """[R, H', C, E] of [1, H', S, E]."""
        rows = states[0].transpose(0, 1).split(self._prompt_lengths)
        return pad_sequence(rows, batch_first=True).transpose(1, 2)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        # Layer by layer, so that one at a time is there twice.
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = change(keys), change(values)


def _hidden(where: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores so that these count for nothing."""
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -torch.inf)
