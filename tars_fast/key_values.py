"""Keys and values of prompts whose completions grow side by side, a token at a time.

Handed to a decoder's attention as a keyword, as `PackedGroups` are (`packed_attention.py`), so that transformers keeps no cache
and makes no mask. A row holds the keys of one prompt, padded on the right, and behind them those of its completions: the first
token of each, then the second of each. All rows grow in the same columns, in place; a prompt is held once, and one pass over a
row serves all completions.

Shapes: R prompts, N completions of each, H heads, H' heads of keys and values, E head size, S tokens of a pass, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class KeyValues:
    """Those of one batch. The first pass is that of the prompts; then comes `branch`, and `grow` before every further pass.

    Args:
        prompt_lengths: [R] as they are without padding.
        room: tokens of a completion that memory is taken for at a time.
    """

    def __init__(self, prompt_lengths: Tensor, room: int):
        self._prompt_lengths = prompt_lengths
        self._room = room
        self._num_columns = int(prompt_lengths.max())
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        """[R, H', C with room, E] keys and values."""
        self._queries_per_key = 1
        self._own_columns: Tensor | None = None
        """[1, 1, H / H' * N, room * N] what a completion sees of those that are added at a time: its own."""
        self._mask: Tensor | None = None
        """[R, 1, H / H' * N, C with room] added to the scores."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[R, S, H, E] attention of queries [R, H, S, E] to keys and values [R, H', S, E], which are kept, and earlier ones."""
        if self._mask is None:
            self._layers[layer] = key, value
            self._queries_per_key = query.shape[1] // key.shape[1]
            # Padding stands behind all that is read of this pass, so it needs no mask.
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            return output.transpose(1, 2)
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
        padding = torch.arange(keys.shape[2], device=keys.device) >= self._prompt_lengths[:, None]
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

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        # Layer by layer, so that one at a time is there twice.
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = change(keys), change(values)


def _hidden(where: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores so that these count for nothing."""
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -torch.inf)
