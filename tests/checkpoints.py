"""Small random checkpoints of each architecture: genuine configuration classes, special tokens, feature extractor, template.

Transformers holds none of the templates; they are written out as published: Qwen2-Audio's by the class itself
(`Qwen2AudioProcessor.default_chat_template`), Qwen2.5-Omni's in chat_template.json of Qwen/Qwen2.5-Omni-7B (the same text
stands in transformers' test_processing_qwen2_5_omni.py), Phi-4-multimodal's in tokenizer_config.json of
microsoft/Phi-4-multimodal-instruct; of Qwen3-Omni's, in chat_template.json of Qwen/Qwen3-Omni-30B-A3B-Instruct, the part
without tools; Audio Flamingo 3's in transformers' script that converted nvidia/audio-flamingo-3-hf.
"""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from tars_fast.models.adapters import adapter_weights, add_adapter, save_adapter

OMNI_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}"
    "{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "{% set audio_count.value = audio_count.value + 1 %}{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_bos|><|VIDEO|><|vision_eos|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
FLAMINGO_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages if m['content'] is not none %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% set audio = namespace(found=False) %}"
    "{% set text_buf = namespace(v='') %}{% for c in m['content'] %}{% if c.get('type') == 'audio' or 'audio' in c %}"
    "{% set audio.found = True %}{% elif c.get('type') == 'text' or 'text' in c %}"
    "{% set text_buf.v = text_buf.v + c['text'] %}{% endif %}{% endfor %}"
    "{% if audio.found %}{{ '<sound>' }}{% endif %}{{ text_buf.v }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif content.type == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{%- elif content.type == 'video' or 'video' in content %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif content.type == 'text' %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
OMNI_TOKENS = (*QWEN_TOKENS, "<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>")
QWEN3_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
QWEN3_TOKENS = (*QWEN3_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PHI_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|audio|>")
_MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_MISTRAL_TOKENS += ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]")
_MISTRAL_TOKENS += ("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
VOXTRAL_TOKENS = dict(enumerate(_MISTRAL_TOKENS)) | {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
"""By their places in Mistral's tokenizer file, tekken.json."""
ADAPTER_RANK = 4
"""Of the speech adapter that a Phi checkpoint brings."""


def _tokenizer(special: tuple[str, ...], **settings) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens behind them."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in special if t not in tokenizer.get_vocab()]})
    return tokenizer


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Weights large enough that states, and the answers they lead to, differ between prompts."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
            parameter.normal_(0, 2 / inputs**0.5)
        else:
            parameter.normal_(0 if name.endswith("bias") else 1, 0.05)


def _save(folder: Path, module: nn.Module, tokenizer, extractor, described: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    _randomise(module)
    module.tie_weights()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor.to_dict() | described))
    return folder


def make_qwen2_audio(folder: Path, language_model: str = "qwen2") -> Path:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    tokenizer = _tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token = tokenizer.convert_tokens_to_ids
    text = {"model_type": language_model, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 320}
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": 128, "max_source_positions": 1500}
    config = Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=token("<|AUDIO|>"))
    module = Qwen2AudioForConditionalGeneration(config)
    module.generation_config.eos_token_id = [token("<|endoftext|>"), token("<|im_end|>")]
    extractor = WhisperFeatureExtractor(feature_size=128)
    _save(folder, module, tokenizer, extractor, {"processor_class": "Qwen2AudioProcessor"})
    _name_as_published(folder)
    return folder


def _name_as_published(folder: Path) -> None:
    """transformers 5.19 writes one "model" too many."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("language_model.model.model.", "language_model.model."): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_qwen2_5_omni(folder: Path) -> Path:
    """As published: configuration and weights of the thinker inside those of the whole, and a talker nobody needs."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    named = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    named |= {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "vision_bos_token": "<|vision_bos|>"}
    named |= {"vision_eos_token": "<|vision_eos|>"}
    tokenizer = _tokenizer(OMNI_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320, "rope_parameters": rope}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    text |= {"tie_word_embeddings": False}
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "output_dim": 128}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"fullatt_block_indexes": [1]}
    ids = {name: token(text) for name, text in (("audio_token_index", "<|AUDIO|>"), ("image_token_index", "<|IMAGE|>"))}
    ids |= {"video_token_index": token("<|VIDEO|>"), "audio_start_token_id": token("<|audio_bos|>")}
    ids |= {"audio_end_token_id": token("<|audio_eos|>"), "vision_start_token_id": token("<|vision_bos|>")}
    thinker = Qwen2_5OmniThinkerConfig(text_config=text, audio_config=audio, vision_config=vision, **ids)
    module = Qwen2_5OmniThinkerForConditionalGeneration(thinker)
    described = {"processor_class": "Qwen2_5OmniProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    _save(folder, module, tokenizer, WhisperFeatureExtractor(feature_size=128, chunk_length=300), described)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OMNI_TEMPLATE}))
    nested = Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False).to_dict()
    nested |= {"architectures": ["Qwen2_5OmniModel"]}
    (folder / "config.json").write_text(json.dumps(nested))
    weights = load_file(folder / "model.safetensors")
    weights = {f"thinker.{name}": value for name, value in weights.items()} | {"talker.codec_head.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_qwen3_omni(folder: Path) -> Path:
    """As published: a mixture of experts, each a weight of its own, inside the whole, with a talker that nobody needs."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    named = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    named |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>"}
    named |= {"vision_eos_token": "<|vision_end|>"}
    tokenizer = _tokenizer(QWEN3_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    text |= {"num_hidden_layers": 3, "vocab_size": 320, "rope_parameters": rope, "max_position_embeddings": 4096}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "output_dim": 64}
    audio |= {"n_window_infer": 200, "downsample_hidden_size": 16}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    ids = {name: token(text) for name, text in (("audio_token_id", "<|audio_pad|>"), ("image_token_id", "<|image_pad|>"))}
    ids |= {"video_token_id": token("<|video_pad|>"), "audio_start_token_id": token("<|audio_start|>")}
    ids |= {"vision_start_token_id": token("<|vision_start|>"), "audio_end_token_id": token("<|audio_end|>")}
    thinker = Qwen3OmniMoeThinkerConfig(text_config=text, audio_config=audio, vision_config=vision, **ids)
    module = Qwen3OmniMoeThinkerForConditionalGeneration(thinker)
    described = {"processor_class": "Qwen3OmniMoeProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    _save(folder, module, tokenizer, WhisperFeatureExtractor(feature_size=128), described)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN3_TEMPLATE}))
    nested = Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False).to_dict()
    nested |= {"architectures": ["Qwen3OmniMoeForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(nested))
    weights = load_file(folder / "model.safetensors")
    weights = {f"thinker.{name}": value for name, value in weights.items()}
    assert "thinker.model.layers.0.mlp.experts.0.gate_proj.weight" in weights
    weights |= {"talker.codec_head.weight": torch.ones(2, 2), "code2wav.code_embedding.weight": torch.ones(2, 2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_phi4_multimodal(folder: Path) -> Path:
    """With the speech adapter in a folder of its own, as published."""
    from peft import LoraConfig
    from transformers import (
        Phi4MultimodalAudioConfig,
        Phi4MultimodalConfig,
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalForCausalLM,
        Phi4MultimodalVisionConfig,
    )

    named = {"audio_token": "<|audio|>", "image_token": "<|image|>"}
    tokenizer = _tokenizer(PHI_TOKENS, eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=named)
    tokenizer.chat_template = PHI_TEMPLATE
    token = tokenizer.convert_tokens_to_ids
    audio = Phi4MultimodalAudioConfig(
        hidden_size=32, intermediate_size=48, num_blocks=2, num_attention_heads=2, nemo_conv_channels=32,
        depthwise_separable_out_channel=32, ext_pw_out_channel=32, audio_token_id=token("<|audio|>"),
    )  # fmt: skip
    vision = Phi4MultimodalVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, crop_size=16,
        image_token_id=token("<|image|>"),
    )  # fmt: skip
    ends = [token("<|endoftext|>"), token("<|end|>")]
    factors = [1.0] * 6
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": factors}
    rope |= {"long_factor": [2.0] * 6, "original_max_position_embeddings": 4096}
    config = Phi4MultimodalConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, audio_config=audio, vision_config=vision, tie_word_embeddings=True, rope_parameters=rope,
        bos_token_id=ends[0], eos_token_id=ends, pad_token_id=ends[0], sliding_window=262144,
    )  # fmt: skip
    module = Phi4MultimodalForCausalLM(config)
    module.generation_config.eos_token_id = ends
    described = {"processor_class": "Phi4MultimodalProcessor", "image_processor_type": "Phi4MultimodalImageProcessor"}
    _save(folder, module, tokenizer, Phi4MultimodalFeatureExtractor(), described)
    targets = [
        name for name, layer in module.named_modules() if name.startswith("model.layers.") and isinstance(layer, nn.Linear)
    ]
    add_adapter(module, LoraConfig(r=ADAPTER_RANK, lora_alpha=2 * ADAPTER_RANK, target_modules=targets))
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, 0, 0.1)
    save_adapter(module, adapter_weights(module), folder / "speech-lora")
    # As published: a pattern that was written for the decoder alone.
    described = json.loads((folder / "speech-lora" / "adapter_config.json").read_text())
    described["target_modules"] = r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))"
    (folder / "speech-lora" / "adapter_config.json").write_text(json.dumps(described))
    return folder


def make_voxtral(folder: Path) -> Path:
    """As published: no tokenizer's file but Mistral's own, and no chat template."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    text = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192}
    audio = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = VoxtralForConditionalGeneration(VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=24))
    module.generation_config.eos_token_id, module.generation_config.pad_token_id = 2, 11
    _randomise(module)
    module.save_pretrained(folder)
    _name_as_published(folder)
    described = WhisperFeatureExtractor(feature_size=128).to_dict() | {"processor_class": "VoxtralProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    ranks = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"an", b"swer", b"er"]
    special = [VOXTRAL_TOKENS.get(rank, f"<SPECIAL_{rank}>") for rank in range(40)]
    tekken = {
        "config": {"pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "version": "v7"}
        | {"num_vocab_tokens": len(ranks), "default_num_special_tokens": 40, "default_vocab_size": 40 + len(ranks)},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(ranks)
        ],
        "special_tokens": [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)],
        "audio": {"sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0}
        | {"audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400}},
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return folder


def make_audio_flamingo_3(folder: Path) -> Path:
    """As published: the feature extractor's settings in those of the processor, its template in a file."""
    from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOS]", "[PAD]")
    tokenizer = _tokenizer(special, eos_token="<|im_end|>", bos_token="[BOS]", pad_token="[PAD]")
    token = tokenizer.convert_tokens_to_ids
    text = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AudioFlamingo3Config(text_config=text, audio_config=audio, audio_token_id=token("<sound>"))
    module = AudioFlamingo3ForConditionalGeneration(config)
    module.generation_config.eos_token_id = token("<|im_end|>")
    _randomise(module)
    module.save_pretrained(folder)
    _name_as_published(folder)
    extractor = WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
    AudioFlamingo3Processor(extractor, tokenizer, chat_template=FLAMINGO_TEMPLATE).save_pretrained(folder)
    return folder


MAKERS = {
    "qwen2-audio": make_qwen2_audio,
    "qwen2.5-omni": make_qwen2_5_omni,
    "qwen3-omni": make_qwen3_omni,
    "phi-4-multimodal": make_phi4_multimodal,
    "voxtral": make_voxtral,
    "audio-flamingo-3": make_audio_flamingo_3,
}
VARIANTS = {"qwen2-audio-llama": partial(make_qwen2_audio, language_model="llama")}
"""A family's classes with another language model, as examples/smol assembles them."""
BY_DECODER = [pytest.param(name, marks=pytest.mark.slow) if name == "audio-flamingo-3" else name for name in MAKERS]
"""For tests of decoders alone: a family whose decoder is another one's is slow."""
