"""The architectures of speech LLMs that can be trained, and all that differs between them.

Outside this file only presets and vLLM's classes know a model by name: all else asks the family where the language model is,
how it hears, how a prompt holds recordings, what ends a completion, and where vLLM keeps each weight. Templates and special
tokens come from the checkpoint.

Shapes: A audio tokens of a recording, D hidden size, N recordings, M mel bins, F mel frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tars_fast.architecture import Architecture
from tars_fast.audio import SAMPLE_RATE
from tars_fast.memory import ENGINE_LORA_RANKS
from tars_fast.modules import Decoder, PolicyModule
from tars_fast.requirements import is_at_least
from tars_fast.types import UserError
from tars_fast.weights import EngineNames, Part

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
    embed: Callable[[PolicyModule, Sequence[Features]], list[Tensor]]
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


def engine_refusal(family: Family, lora_rank: int, *, float32: bool, on_cuda: bool) -> str | None:
    """Why vLLM cannot serve a policy, wherever it is installed, with the remedy; None where it can."""
    if family.engine_names is None:
        return f"{family.engine_refusal}; use --engine transformers"
    if lora_rank > ENGINE_LORA_RANKS[-1]:
        return f"its adapters have a rank of at most {ENGINE_LORA_RANKS[-1]}; lower --lora-rank or use --engine transformers"
    if lora_rank and float32 and on_cuda:
        return "its CUDA kernels for adapters take no float32; use --dtype bfloat16 or --engine transformers"
    return None


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def find_family(source: str, model_type: str) -> Family:
    """The family of a checkpoint by the `model_type` of its config.json.

    Raises:
        UserError: none of those that can be trained.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(family.model_types[0] for family in FAMILIES)
    hint = "; its revision refs/pr/70 holds weights that transformers reads" if model_type == "phi4mm" else ""
    raise UserError(f"--model {source}: a {model_type} checkpoint; supported are {supported}{hint}")


def embed_audio(module: PolicyModule, features: Tensor, feature_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen2-Audio's tower and projector, without the language model.

    Args:
        module: a `Qwen2AudioForConditionalGeneration`.
        features: [N, M, F] log-mel spectrogram, padded to the tower's window.
        feature_mask: [N, F], 1 where there is speech.

    Returns:
        ([N, A, D] embeddings, [N] number of audio tokens of each recording).
    """
    from transformers.masking_utils import create_bidirectional_mask

    model: Any = module.model
    tower = model.audio_tower
    frame_lengths, token_lengths = tower._get_feat_extract_output_lengths(feature_mask.sum(-1))
    num_positions = (features.shape[-1] - 2) // 2 + 1
    position_mask = torch.arange(num_positions, device=features.device) < frame_lengths[:, None]
    attention_mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=features.new_zeros(len(features), num_positions, 1),
        attention_mask=position_mask.long(),
    )
    states = tower(features, attention_mask=attention_mask).last_hidden_state
    return model.multi_modal_projector(states), token_lengths


def _embed_qwen2_audio(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    embedded = []
    for batch in _batches(clips):
        features, mask = _stacked(module, batch)
        states, lengths = embed_audio(module, features, mask)
        embedded += [state[:length].clone() for state, length in zip(states, lengths.tolist(), strict=True)]
    return embedded


def _embed_qwen2_5_omni(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    hear: Any = module.get_audio_features
    embedded = []
    for batch in _batches(clips):
        features, mask = _stacked(module, batch)
        states = hear(features, feature_attention_mask=mask).last_hidden_state
        embedded += [state.clone() for state in states.split([clip.num_tokens for clip in batch])]
    return embedded


def _embed_phi4_multimodal(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    model: Any = module.model
    audio = model.embed_tokens_extend.audio_embed
    embedded = []
    # One at a time: its convolutions see the padding of a batch.
    for clip in clips:
        places = torch.full((1, clip.num_tokens), module.config.audio_config.audio_token_id, device=module.device)
        holes = torch.zeros(1, clip.num_tokens, module.config.hidden_size, device=module.device, dtype=module.dtype)
        embedded.append(audio(places, holes, clip.values[None].to(module.device), audio_embed_sizes=[clip.num_tokens])[0])
    return embedded


def _whisper_features(feature_extractor: Any, wave: np.ndarray, samples: int) -> Features:
    """The log-mel spectrogram of a recording padded to `samples`."""
    batch = feature_extractor(
        wave,
        sampling_rate=SAMPLE_RATE,
        return_attention_mask=True,
        padding="max_length",
        max_length=samples,
        return_tensors="pt",
    )
    return Features(batch.input_features[0], batch.attention_mask[0], _num_qwen_tokens(feature_extractor, len(wave)))


def _qwen2_audio_features(feature_extractor: Any, wave: np.ndarray) -> Features:
    return _whisper_features(feature_extractor, wave, feature_extractor.n_samples)


def _omni_features(feature_extractor: Any, wave: np.ndarray) -> Features:
    # The checkpoint's own window is 300 s. A window of silence behind the recording gives the same spectrogram.
    samples = len(wave) + feature_extractor.n_fft
    return _whisper_features(
        feature_extractor, wave, -(-samples // feature_extractor.hop_length) * feature_extractor.hop_length
    )


def _phi_features(feature_extractor: Any, wave: np.ndarray) -> Features:
    values = feature_extractor([wave], sampling_rate=SAMPLE_RATE, return_tensors="pt").audio_input_features[0]
    return Features(values, torch.ones(len(values)), _num_phi_tokens(feature_extractor, len(wave)))


def _stacked(module: PolicyModule, clips: Sequence[Features]) -> tuple[Tensor, Tensor]:
    """([N, M, F] spectrograms, [N, F] mask) as wide as the longest."""
    width = max(len(clip.mask) for clip in clips)
    values = torch.stack([nn.functional.pad(clip.values, (0, width - len(clip.mask))) for clip in clips])
    masks = torch.stack([nn.functional.pad(clip.mask, (0, width - len(clip.mask))) for clip in clips])
    return values.to(module.device, module.dtype), masks.to(module.device)


def _batches(clips: Sequence[Features]) -> Iterator[list[Features]]:
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


def _num_qwen_tokens(feature_extractor: Any, samples: int) -> int:
    """Both towers halve the frames twice (`_get_feat_extract_output_lengths` of transformers)."""
    frames = -(-samples // feature_extractor.hop_length)
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _num_phi_tokens(feature_extractor: Any, samples: int) -> int:
    """As `Phi4MultimodalFeatureExtractor._compute_audio_embed_size` has it."""
    frames = (samples - feature_extractor.win_length) // feature_extractor.hop_length + 1
    frames *= feature_extractor.audio_feat_stride
    return math.ceil(math.ceil(frames / feature_extractor.audio_compression_rate) / feature_extractor.audio_downsample_rate)


def _qwen_turn(num_recordings: int, instruction: str) -> list[dict[str, str]]:
    return [{"type": "audio"}] * num_recordings + ([{"type": "text", "text": instruction}] if instruction else [])


def _qwen2_audio_template() -> str:
    """Of the class: the published checkpoint has none of its own."""
    from transformers import Qwen2AudioProcessor

    template: Any = Qwen2AudioProcessor.default_chat_template
    return template.fget(None)


_QWEN2_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

QWEN2_AUDIO = Family(
    model_types=("qwen2_audio",),
    model_class="Qwen2AudioForConditionalGeneration",
    language_model="model.language_model",
    decoder_names=("language_model", "language_model.model"),
    audio_parts=("model.audio_tower", "model.multi_modal_projector"),
    audio_token="<|AUDIO|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    features=_qwen2_audio_features,
    embed=_embed_qwen2_audio,
    num_audio_tokens=_num_qwen_tokens,
    user_turn=_qwen_turn,
    default_template=_qwen2_audio_template,
    constants=("model.audio_tower.embed_positions",),
    published=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ),
    engine_names=(
        Part("model.language_model.", "language_model.model.", fused=_QWEN2_FUSED),
        Part("lm_head", "language_model.lm_head"),
        Part("model.audio_tower.", "audio_tower."),
        Part("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)

# From 5.21 on transformers has decoder and towers inside a `model` of their own.
_OMNI, _OMNI_DECODER = ("model.", "model.language_model") if is_at_least("transformers", "5.21") else ("", "model")

QWEN2_5_OMNI = Family(
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    language_model=_OMNI_DECODER,
    decoder_names=("model", "model.language_model", "language_model", "thinker.model", "thinker.model.language_model"),
    audio_parts=(f"{_OMNI}audio_tower",),
    audio_token="<|AUDIO|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    features=_omni_features,
    embed=_embed_qwen2_5_omni,
    num_audio_tokens=_num_qwen_tokens,
    user_turn=_qwen_turn,
    unused=(f"{_OMNI}visual",),
    nested_config="thinker_config",
    published=((f"{_OMNI_DECODER}.", "model."), (_OMNI, "")),
    nested_prefix="thinker.",
    without_the_rest={"enable_audio_output": False},
    engine_names=(
        Part(f"{_OMNI_DECODER}.", "language_model.model.", fused=_QWEN2_FUSED),
        Part("lm_head", "language_model.lm_head"),
        Part(f"{_OMNI}audio_tower.", "audio_tower."),
    ),
)

PHI4_MULTIMODAL = Family(
    model_types=("phi4_multimodal",),
    model_class="Phi4MultimodalForCausalLM",
    language_model="model",
    decoder_names=(),
    audio_parts=("model.embed_tokens_extend.audio_embed",),
    audio_token="<|audio|>",
    stop_tokens=("<|end|>", "<|endoftext|>"),
    features=_phi_features,
    embed=_embed_phi4_multimodal,
    num_audio_tokens=_num_phi_tokens,
    # Its template joins strings; lists of parts are only understood by later revisions.
    user_turn=lambda num_recordings, instruction: "<|audio|>" * num_recordings + instruction,
    # At 12.5 tokens a second, what leaves room for prompt and completion below the 4,096 where its positions change meaning.
    max_audio_seconds=200.0,
    unused=("model.embed_tokens_extend.image_embed",),
    adapter_folder="speech-lora",
    engine_refusal="vLLM knows only the remote-code variant of Phi-4-multimodal, transformers' native one has other names",
)

FAMILIES = (QWEN2_AUDIO, QWEN2_5_OMNI, PHI4_MULTIMODAL)
