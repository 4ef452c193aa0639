"""The architectures of speech LLMs that can be trained, and all that differs between them.

Outside this file only presets and vLLM's classes know a model by name: all else asks the family where the language model is,
how it hears, how a prompt holds recordings, what ends a completion, and where vLLM keeps each weight. Templates and special
tokens come from the checkpoint.

Shapes: A audio tokens of a recording, D hidden size, N recordings, M mel bins, F mel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tars_fast.models.architecture import Architecture
from tars_fast.models.modules import Decoder, PolicyModule
from tars_fast.models.weights import EngineNames

_FRAMES_PER_BATCH = 96_000
"""Mel frames in one pass of an audio tower, whose activations grow with them: 32 windows of 30 s."""


@dataclass(frozen=True)
class Features:
    """What an audio tower takes of a clip, on the host."""

    values: Tensor
    """[M, F] log-mel spectrogram; of Phi-4-multimodal [F, M]."""
    mask: Tensor
    """[F] 1 where there is speech."""
    num_tokens: int
    """Audio tokens that the clip becomes."""


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers implements it."""

    model_types: tuple[str, ...]
    """Of config.json."""
    model_class: str
    """Of transformers, with a head."""
    language_model: str
    """The decoder stack inside it: its `layers` are pooled and adapted, its `norm` ends the last."""
    decoder_names: tuple[str, ...]
    """What other releases of transformers, published checkpoints and peft's shortened names call `language_model`."""
    audio_parts: tuple[str, ...]
    """Tower and projector inside it."""
    audio_token: str
    """Stands in a prompt once for each audio token."""
    stop_tokens: tuple[str, ...]
    """End a completion, beside those that the checkpoint names."""
    features: Callable[[Any, np.ndarray], Features]
    """(feature extractor, clip of [samples] at 16 kHz); needs no weights."""
    encode_clips: Callable[[PolicyModule, Sequence[Features]], list[Tensor]]
    """(module, N clips) to [A, D] each."""
    num_audio_tokens: Callable[[Any, int], int]
    """(feature extractor, samples) to A."""
    user_turn: Callable[[int, str], object]
    """(recordings, instruction behind them) to the content of a chat message."""
    default_template: Callable[[], str | None] = lambda: None
    """Chat template of checkpoints that bring none."""
    max_audio_seconds: float | None = None
    """Longest recording it hears at once. None: its feature extractor's window."""
    constants: tuple[str, ...] = ()
    """Parameters of `audio_parts` that are never trained."""
    unused: tuple[str, ...] = ()
    """Parts inside it that neither speech nor text goes through; no memory is spent on them."""
    nested_config: str = ""
    """Where the configuration of a checkpoint of the whole model has the one of `model_class`. Empty: it is that one."""
    published: tuple[tuple[str, str], ...] = ()
    """(beginning of a weight's name in `model_class`, that in published checkpoints), where they differ."""
    nested_prefix: str = ""
    """What a checkpoint of the whole model has before these."""
    without_the_rest: Mapping[str, object] = field(default_factory=dict)
    """Configuration of a whole model that has no other parts."""
    adapter_folder: str = ""
    """LoRA weights inside a checkpoint, without which its base does not understand speech."""
    engine_names: EngineNames | None = None
    """Where vLLM keeps the weights. None: it cannot run the architecture."""
    engine_refusal: str = ""
    """Why not."""

    def config_of(self, config: Any) -> Any:
        """The configuration of `model_class` in the one of a checkpoint."""
        return getattr(config, self.nested_config, config) if self.nested_config else config

    def transformers_class(self) -> Any:
        import transformers

        return getattr(transformers, self.model_class)

    def on_meta(self, config: Any, dtype: torch.dtype | None = None) -> PolicyModule:
        """The model without memory for its parameters; buffers, which are small, are real.

        Args:
            config: of `model_class`.
        """
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            module = self.transformers_class()._from_config(config, attn_implementation="sdpa", dtype=dtype)
        return self.without_unused(module)

    def decoder_of(self, module: nn.Module) -> Decoder:
        """The language model's layers inside `module`."""
        return cast(Decoder, module.get_submodule(self.language_model))

    def published_name(self, name: str, *, nested: bool = True) -> str:
        """Of a weight, as checkpoints have it and other programs expect it.

        Args:
            nested: in a checkpoint of the whole model, where that is another.
        """
        prefix = self.nested_prefix if nested else ""
        for own, published in self.published:
            if name.startswith(own):
                return prefix + published + name.removeprefix(own)
        return prefix + name

    def decoder_name(self, name: str) -> str:
        """A module or weight of an adapter, as the transformers that is installed calls it."""
        for decoder in self.decoder_names:
            if name.startswith(f"{decoder}.layers."):
                return self.language_model + name.removeprefix(decoder)
        return name

    def without_unused(self, module: PolicyModule) -> PolicyModule:
        """`module`, changed in place."""
        for part in self.unused:
            module.set_submodule(part, nn.Identity())
        return module

    def architecture(self, config: Any) -> Architecture:
        """The shape of a model, counted on the model itself.

        Args:
            config: of `model_class`.
        """
        text = config.get_text_config()
        module = self.on_meta(config)
        module.tie_weights()
        decoder = self.decoder_of(module)
        tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        attention = decoder.layers[0].get_submodule("self_attn")
        heads = text.num_attention_heads
        written = [*decoder.embed_tokens.parameters(), *decoder.layers.parameters(), *decoder.norm.parameters()]
        written += [] if tied else [*module.get_output_embeddings().parameters()]
        return Architecture(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_key_value_heads=text.num_key_value_heads,
            intermediate_size=text.intermediate_size,
            vocabulary_size=text.vocab_size,
            tied_head=tied,
            biased_attention=any(name.endswith("_proj.bias") for name, _ in attention.named_parameters()),
            fused_layers=hasattr(attention, "qkv_proj"),
            num_other_parameters=_count(module.parameters()) - _count(written),
            max_tokens=self.max_tokens(config),
        )

    def max_tokens(self, config: Any) -> int:
        """Longest prompt plus completion.

        Args:
            config: of `model_class`.
        """
        text = config.get_text_config()
        # Beyond it Phi's rotary embedding changes to other factors, also for the tokens before.
        longest = getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
        # The trainer's attention has no window; up to its width there is no difference.
        return min(longest, getattr(text, "sliding_window", None) or longest)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def stacked(module: PolicyModule, clips: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """([N, M, F] spectrograms, [N, F] mask) as wide as the longest."""
    width = max(len(clip.mask) for clip in clips)
    values = torch.stack([nn.functional.pad(clip.values, (0, width - len(clip.mask))) for clip in clips])
    masks = torch.stack([nn.functional.pad(clip.mask, (0, width - len(clip.mask))) for clip in clips])
    return values.to(module.device, module.dtype), masks.to(module.device)


def batches(clips: Sequence[Features]) -> Iterator[list[Features]]:
    """Clips in order, as many at a time as a tower takes."""
    batch: list[Features] = []
    frames = 0
    for clip in clips:
        if batch and frames + len(clip.mask) > _FRAMES_PER_BATCH:
            yield batch
            batch, frames = [], 0
        batch.append(clip)
        frames += len(clip.mask)
    if batch:
        yield batch
