"""A speech LLM of published parts, from installed packages alone: `python examples/smol/assemble.py --output-dir smol`.

A `Qwen2AudioForConditionalGeneration` whose language model is SmolLM2-135M-Instruct and whose tower is the encoder of Whisper
tiny.en. Between them stands Qwen2-Audio's projector, which nobody has trained yet: before `warm_up.py` the model understands
written questions only.

Qwen2-Audio's tower is Whisper's encoder with a pooling of two positions before the last norm, so its weights are Whisper's.
SmolLM2's vocabulary has no room for a placeholder of audio, but tokens of notebooks, which no question holds: three of them are
renamed. So all embeddings are the published ones, and the vocabulary stays a multiple of 64.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import AUDIO_TOWER, LANGUAGE_MODEL, PROJECTOR, read_ctranslate2
from torch import Tensor

from tars_fast.models.adapters import merge_adapter
from tars_fast.models.families import qwen2_audio
from tars_fast.models.preset import Preset
from tars_fast.support.cli import as_paths, require_extra, run_command
from tars_fast.support.files import atomic_folder, listing
from tars_fast.types import UserError

RENAMED = {
    "<jupyter_code>": "<|AUDIO|>",
    "<jupyter_output>": "<|audio_bos|>",
    "<jupyter_script>": "<|audio_eos|>",
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_SIZES += ("max_position_embeddings", "rms_norm_eps", "rope_parameters")
PRESET = Preset(
    source="",
    system_prompt="Think, then answer.",
    learning_rate=1e-4,
    questions_per_step=8,
    max_new_tokens=64,
    num_steps=100,
    lora_rank=8,
    behaviour_model="hashed-ngrams",
    gradient_checkpointing=False,
    rollout_batch_size=64,
)
"""The learning rate has not been tuned."""


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file of SmolLM2, with `RENAMED`: byte-level BPE behind a split at every digit."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    control = 3  # `CONTROL` among gguf's kinds of tokens.
    names = [RENAMED.get(token, token) for token in tokens]
    vocabulary = {name: number for number, name in enumerate(names)}
    bpe = models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name, kind in zip(names, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=fields["llama.context_length"].contents(),
    )


def tower_weights(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers' Qwen2-Audio tower, float32) of Whisper's encoder.

    Args:
        weights: as CTranslate2 names them.
    """
    norms = {"gamma": "weight", "beta": "bias"}
    layers = {
        "self_attention/layer_norm": "self_attn_layer_norm",
        "self_attention/linear_1": "self_attn.out_proj",
        "ffn/layer_norm": "final_layer_norm",
        "ffn/linear_0": "fc1",
        "ffn/linear_1": "fc2",
    }
    for name, values in weights.items():
        wing, _, rest = name.partition("/")
        module, _, leaf = rest.rpartition("/")
        if wing != "encoder" or not module:
            continue
        value = torch.from_numpy(values.astype(np.float32))
        layer, _, inside = module.partition("/")
        leaf = norms.get(leaf, leaf)
        if module == "position_encodings":
            yield "embed_positions.weight", value
        elif not layer.startswith("layer_") or not inside:
            yield f"{module}.{leaf}", value
        elif inside == "self_attention/linear_0":
            parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
            # Whisper's keys have no bias; CTranslate2 writes zeros.
            yield from (
                (f"layers.{layer[6:]}.self_attn.{part}.{leaf}", own)
                for part, own in parts
                if (part, leaf) != ("k_proj", "bias")
            )
        else:
            yield f"layers.{layer[6:]}.{layers[inside]}.{leaf}", value


def build(seed: int) -> tuple[Any, Any]:
    """(`Qwen2AudioForConditionalGeneration` in float32, `Qwen2AudioProcessor`).

    Args:
        seed: of the projector's first weights.

    Raises:
        UserError: a package is missing, or another one than was tested.
    """
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    language_path, tower_path = LANGUAGE_MODEL.find(), AUDIO_TOWER.find()
    tokenizer = read_tokenizer(language_path)
    extractor = WhisperFeatureExtractor(feature_size=80)
    template = qwen2_audio.FAMILY.default_template()
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=template)
    language = AutoModelForCausalLM.from_pretrained(
        language_path.parent, gguf_file=language_path.name, dtype=torch.float32, trust_remote_code=False
    )
    tower = dict(tower_weights(read_ctranslate2(tower_path)))
    width, num_mels, _ = tower["conv1.weight"].shape
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Without where it was read from and how it was quantised. Qwen2-Audio has a head of its own, SmolLM2's is its embedding.
    read = language.config.to_dict()
    text = {name: read[name] for name in ("model_type", *_SIZES)}
    text |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": width,
            "encoder_layers": len({name.split(".")[1] for name in tower if name.startswith("layers.")}),
            "encoder_attention_heads": width // 64,
            "encoder_ffn_dim": len(tower["layers.0.fc1.bias"]),
            "num_mel_bins": num_mels,
            "max_source_positions": len(tower["embed_positions.weight"]),
        },
        text_config=text,
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(seed)
    module = Qwen2AudioForConditionalGeneration(config)
    module.model.audio_tower.load_state_dict(tower)
    module.model.language_model.load_state_dict(language.model.state_dict())
    module.lm_head.load_state_dict(language.get_input_embeddings().state_dict())
    module.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    return module.eval(), processor


def put_in(module: Any, folder: Path) -> Any:
    """The model with the projector and the adapter of warm_up.py, which change its weights in place.

    Raises:
        UserError: `folder` does not hold them, or those of another model.
    """
    from safetensors.torch import load_file

    path = folder / PROJECTOR
    if not path.is_file():
        raise UserError(f"--warm-up {folder}: holds no {PROJECTOR}; name the folder that warm_up.py has finished")
    try:
        module.model.multi_modal_projector.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise UserError(f"--warm-up {folder}: {PROJECTOR} is of another model; repeat the warm-up") from error
    return merge_adapter(module, qwen2_audio.FAMILY, folder)


@dataclass(frozen=True)
class AssembleConfig:
    """Assemble a speech LLM of installed packages; see examples/smol/README.md."""

    output_dir: Path
    """New folder for the checkpoint, which `train`, `evaluate` and transformers load."""
    warm_up: Path | None = None
    """Folder of warm_up.py, whose projector and adapter are put in. None: the projector is untrained."""
    seed: int = 0
    """Of the projector's first weights."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "warm_up")
        if self.output_dir.exists():
            raise UserError(f"--output-dir {self.output_dir}: is there already; name a new folder")


def assemble(config: AssembleConfig) -> int:
    started = time.monotonic()
    require_extra("smol")
    module, processor = build(config.seed)
    if config.warm_up is not None:
        module = put_in(module, config.warm_up)
    # The tower's own type; of the language model it keeps more than the 4 bits that there were.
    module.half()
    with atomic_folder(config.output_dir, sum(value.nbytes for value in module.state_dict().values())) as folder:
        module.save_pretrained(folder)
        processor.save_pretrained(folder)
        PRESET.save(folder)
    print(f"written to {config.output_dir}: {listing(config.output_dir)}, {time.monotonic() - started:.0f} s")
    return 0


def main() -> int:
    return run_command(assemble, AssembleConfig, "python examples/smol/assemble.py")


if __name__ == "__main__":
    sys.exit(main())
