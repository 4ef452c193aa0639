"""`Family`: everything in which the architectures of speech LLMs differ, as data and functions that the other modules use.

That is: where the language model is, how audio is encoded, how a prompt holds recordings, which tokens end a completion, and
where vLLM keeps each weight. Chat templates and the ids of special tokens come from the checkpoint.

Shapes: A audio tokens of a recording, D hidden size, N recordings, M mel bins, F mel frames.
"""

from __future__ import annotations

import copy
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
"""Most mel frames in one pass of an audio tower, whose activations grow with them: 32 windows of 30 s."""


@dataclass(frozen=True)
class Features:
    """An audio tower's input for one clip, on the host."""

    values: Tensor
    """[M, F] log-mel spectrogram; [F, M] for Phi-4-multimodal."""
    mask: Tensor
    """[F] 1 where there is speech."""
    num_tokens: int
    """Audio tokens that the tower makes of the clip."""


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers implements it. Names of parts are those of modules inside `model_class`."""

    model_types: tuple[str, ...]
    """Every `model_type` of config.json that belongs to it; messages name the first."""
    model_class: str
    """Name of transformers' class with a language-model head."""
    language_model: str
    """The decoder: a module with `layers`, and with `norm` after the last of them."""
    decoder_aliases: tuple[str, ...]
    """Other names of `language_model`: in other releases of transformers, in published checkpoints, and shortened by peft."""
    audio_parts: tuple[str, ...]
    """Audio tower and projector."""
    audio_token: str
    """The placeholder that a prompt holds once for each audio token."""
    stop_tokens: tuple[str, ...]
    """Tokens that end a completion, beside those that the checkpoint's configuration names."""
    features: Callable[[Any, np.ndarray], Features]
    """From (feature extractor, clip of [samples] at 16 kHz); needs no weights."""
    encode_clips: Callable[[PolicyModule, Sequence[Features]], list[Tensor]]
    """From (module, N clips) to [A, D] embeddings of each."""
    num_audio_tokens: Callable[[Any, int], int]
    """From (feature extractor, number of samples) to A."""
    user_turn: Callable[[int, str], object]
    """From (number of clips, instruction behind them, which may be empty) to the content of the user's chat message."""
    default_template: Callable[[], str | None] = lambda: None
    """The chat template of checkpoints without one."""
    tokenizer_settings: Mapping[str, object] = field(default_factory=dict)
    """What transformers' `AutoTokenizer` is given beside the folder."""
    max_audio_seconds: float | None = None
    """Longest clip that the tower takes; None: the feature extractor's window."""
    frozen_parts: tuple[str, ...] = ()
    """Parts of `audio_parts` that are never trained."""
    unused_parts: tuple[str, ...] = ()
    """Parts that are not loaded because neither speech nor text passes through them, like the vision tower."""
    nested_config: str = ""
    """For models of which `model_class` is a part: the entry of the whole model's config.json that configures the part."""
    published_prefixes: tuple[tuple[str, str], ...] = ()
    """(beginning of a weight's name in `model_class`, its beginning in published checkpoints), where they differ."""
    nested_prefix: str = ""
    """Put before published names in a checkpoint of the whole model."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of weights' names in a checkpoint of the whole model that belong to none of `model_class`; a saved one gets
    them back."""
    saved_config_entries: Mapping[str, object] = field(default_factory=dict)
    """Entries that config.json of the whole model gets when it is saved without its other parts."""
    adapter_folder: str = ""
    """Folder inside a checkpoint with the LoRA weights without which its base does not understand speech."""
    engine_names: EngineNames | None = None
    """What vLLM calls every module that has weights; None where vLLM cannot run the architecture."""
    engine_refusal: str = ""
    """Why vLLM cannot run it, as a message says it."""

    def config_of(self, config: Any) -> Any:
        """The configuration of `model_class`, from a checkpoint's, which may be that of the whole model."""
        return getattr(config, self.nested_config, config) if self.nested_config else config

    def transformers_class(self) -> Any:
        """The class called `model_class`."""
        import transformers

        return getattr(transformers, self.model_class)

    def on_meta(self, config: Any, dtype: torch.dtype | None = None) -> PolicyModule:
        """The model with parameters on the meta device, which need no memory; its buffers, which are small, are on the CPU.

        Args:
            config: of `model_class`.
        """
        from accelerate import init_empty_weights

        # A copy, because transformers writes the kind of attention into it, which another module reads that was built of it.
        config = copy.deepcopy(config)
        with init_empty_weights(include_buffers=False):
            module = self.transformers_class()._from_config(config, attn_implementation="sdpa", dtype=dtype)
        return self.without_unused(module)

    def decoder_of(self, module: nn.Module) -> Decoder:
        """The module called `language_model` inside `module`."""
        return cast(Decoder, module.get_submodule(self.language_model))

    def published_name(self, name: str, *, nested: bool = True) -> str:
        """A weight's name in published checkpoints, which other programs expect.

        Args:
            name: in `model_class`.
            nested: whether the checkpoint is one of the whole model, see `nested_config`.
        """
        prefix = self.nested_prefix if nested else ""
        for own, published in self.published_prefixes:
            if name.startswith(own):
                return prefix + published + name.removeprefix(own)
        return prefix + name

    def published_weights(self, name: str, value: Tensor, *, nested: bool = True) -> Iterator[tuple[str, Tensor]]:
        """A weight as published checkpoints hold it, under one name or, of a mixture of experts, each expert under its own.

        Args:
            name: in `model_class`.
            value: [E, *] for the weights of E experts, else of any shape.
            nested: see `published_name`.
        """
        published = self.published_name(name, nested=nested)
        layer, experts, leaf = published.rpartition(".experts.")
        if not experts:
            yield published, value
            return
        for number, expert in enumerate(value):
            pieces = zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if leaf == "gate_up_proj" else [(leaf, expert)]
            yield from ((f"{layer}.experts.{number}.{part}.weight", piece) for part, piece in pieces)

    def installed_name(self, name: str) -> str:
        """The name of an adapter's module or weight in the installed release of transformers."""
        for decoder in self.decoder_aliases:
            if name.startswith(f"{decoder}.layers."):
                return self.language_model + name.removeprefix(decoder)
        return name

    def without_unused(self, module: PolicyModule) -> PolicyModule:
        """Replace `unused_parts` of `module` by nothing, in place, and return it."""
        for part in self.unused_parts:
            module.set_submodule(part, nn.Identity())
        return module

    def architecture(self, config: Any) -> Architecture:
        """The sizes of a model, counted on the model itself on the meta device.

        Args:
            config: of `model_class`.
        """
        text = config.get_text_config()
        module = self.on_meta(config)
        module.tie_weights()
        decoder = self.decoder_of(module)
        tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        attention: Any = decoder.layers[0].get_submodule("self_attn")
        heads, head_dim = text.num_attention_heads, attention.head_dim
        num_experts = self.num_experts(config)
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
            head_dim=None if heads * head_dim == text.hidden_size else head_dim,
            normed_attention=hasattr(attention, "q_norm"),
            num_experts=num_experts,
            experts_per_token=text.num_experts_per_tok if num_experts else 0,
            moe_intermediate_size=text.moe_intermediate_size if num_experts else 0,
        )

    def num_experts(self, config: Any) -> int:
        """Experts of a layer; 0 where the model is no mixture of experts.

        Args:
            config: of `model_class`.
        """
        return getattr(config.get_text_config(), "num_experts", 0)

    def max_tokens(self, config: Any) -> int:
        """Longest prompt plus completion, in tokens.

        Args:
            config: of `model_class`.
        """
        text = config.get_text_config()
        # Beyond its original length Phi's rotary embedding uses other factors, also for the tokens before.
        longest = getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
        # The trainer's attention has no sliding window, which makes no difference up to the window's width.
        return min(longest, getattr(text, "sliding_window", None) or longest)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def stack_features(module: PolicyModule, clips: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """([N, M, F] spectrograms, [N, F] mask) on the module's device, padded to the longest clip."""
    width = max(len(clip.mask) for clip in clips)
    values = torch.stack([nn.functional.pad(clip.values, (0, width - len(clip.mask))) for clip in clips])
    masks = torch.stack([nn.functional.pad(clip.mask, (0, width - len(clip.mask))) for clip in clips])
    return values.to(module.device, module.dtype), masks.to(module.device)


def batch_clips(clips: Sequence[Features]) -> Iterator[list[Features]]:
    """The clips in order, in batches of at most `_FRAMES_PER_BATCH` mel frames or one clip."""
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
