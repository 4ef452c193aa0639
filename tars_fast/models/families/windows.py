"""What families share whose audio tower takes windows of 30 s, of which a longer clip has several.

Shapes: A audio tokens of a clip, D hidden size, N windows, M mel bins, F mel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tars_fast.models.families.base import Features, batch_clips, stack_features
from tars_fast.models.modules import PolicyModule

WINDOW_FRAMES = 3000


def encode_windows(module: PolicyModule, clips: Sequence[Features], embed: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """[A, D] embeddings of each clip, those of its windows one after the other.

    Args:
        clips: of whole windows.
        embed: from ([N, M, F] spectrograms, [N, F] mask) of windows to the embeddings of all their audio tokens, in one row.
    """
    windows = [
        Features(values, mask, 0)
        for clip in clips
        for values, mask in zip(clip.values.split(WINDOW_FRAMES, 1), clip.mask.split(WINDOW_FRAMES), strict=True)
    ]
    embedded = [embed(*stack_features(module, batch)) for batch in batch_clips(windows)]
    lengths = [clip.num_tokens for clip in clips]
    return [clip.clone() for clip in torch.cat(embedded).split(lengths)] if clips else []
