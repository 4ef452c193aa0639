"""Model classes that this package registers with vLLM, in the place of those that vLLM has for the same checkpoints.

A family of models needs a class here only where vLLM's own lacks one of these:
- LoRA (`SupportsLoRA`, `packed_modules_mapping`, `get_mm_mapping`): without it vLLM allocates no adapter buffers;
- audio given as embeddings (`enable_mm_embeds`) instead of recordings, because the trainer has encoded the audio already;
- reading the weight names that `models/checkpoint.py` writes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tars_fast.models.families import audio_flamingo_3, qwen2_audio, voxtral
from tars_fast.models.families.base import Family
from tars_fast.models.registry import find_family
from tars_fast.rollout.vllm_experts import RoutingBuffer

_LANGUAGE_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""vLLM's class of a language model inside a speech LLM, by `model_type` of its `text_config`."""


def without_mrope(config: Any) -> Any:
    """A checkpoint's configuration, changed in place so that vLLM takes a position as one number.

    Qwen-Omni's positions are three numbers, in time, height and width, which are equal without images and video.
    The class of vLLM's that runs Qwen3-Omni's language model can be compiled for one only.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    rope.pop("mrope_section", None)
    return config


def register_models() -> None:
    """Register the classes with vLLM's `ModelRegistry`, under the names of `architectures` in config.json."""
    from transformers import AutoFeatureExtractor, Qwen2AudioProcessor
    from transformers.models.audioflamingo3 import modeling_audioflamingo3
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
    from transformers.models.qwen2_audio import modeling_qwen2_audio
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder
    from transformers.models.voxtral import modeling_voxtral
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import SupportsLoRA
    from vllm.model_executor.models.module_mapping import MultiModelKeys
    from vllm.model_executor.models.qwen2_audio import (
        Qwen2AudioDummyInputsBuilder,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioMultiModalProcessor,
        Qwen2AudioProcessingInfo,
    )
    from vllm.model_executor.models.utils import (
        AutoWeightsLoader,
        WeightsMapper,
        init_vllm_registered_model,
        maybe_prefix,
    )
    from vllm.multimodal import MULTIMODAL_REGISTRY

    class Qwen2AudioWithLora(Qwen2AudioForConditionalGeneration, SupportsLoRA):  # type: ignore[misc]  # vLLM's types are not read
        """vLLM's own class takes no adapters, and does not know the names that transformers 5 writes into checkpoints."""

        packed_modules_mapping: ClassVar = {
            fused: list(names) for part in qwen2_audio.FAMILY.engine_names or () for fused, names in part.fused.items()
        }
        embedding_modules: ClassVar[dict[str, str]] = {}
        checkpoint_names: ClassVar[dict[str, str | None]] = {"language_model.model.model.": "language_model.model."}

        def get_mm_mapping(self) -> MultiModelKeys:
            return MultiModelKeys.from_string_field(
                language_model="language_model", connector="multi_modal_projector", tower_model="audio_tower"
            )

        def load_weights(self, weights: Any) -> Any:
            mapper = WeightsMapper(orig_to_new_prefix=self.checkpoint_names)
            return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

    class Info(Qwen2AudioProcessingInfo):  # type: ignore[misc]  # vLLM's types are not read
        """Qwen2-Audio's processor with the family's placeholder, which is all that prompts with embeddings need.

        Qwen-Omni's own needs torchvision.
        """

        @property
        def family(self) -> Family:
            return find_family(self.ctx.model_config.model, self.ctx.get_hf_config().model_type)

        def get_hf_config(self) -> Any:
            return self.family.config_of(self.ctx.get_hf_config())

        def get_hf_processor(self, **_kwargs: object) -> Qwen2AudioProcessor:
            extractor = AutoFeatureExtractor.from_pretrained(self.ctx.model_config.model, trust_remote_code=False)
            return Qwen2AudioProcessor(extractor, self.get_tokenizer(), audio_token=self.family.audio_token)

    @MULTIMODAL_REGISTRY.register_processor(Qwen2AudioMultiModalProcessor, info=Info, dummy_inputs=Qwen2AudioDummyInputsBuilder)
    class OmniThinker(Qwen2AudioWithLora):
        """vLLM's own class loads the vision tower, takes no audio embeddings, and cannot be imported without torchvision."""

        checkpoint_names: ClassVar[dict[str, str | None]] = {
            "thinker.lm_head.": "language_model.lm_head.",
            "thinker.model.": "language_model.model.",
            "thinker.visual.": None,
            "thinker.": "",
            "talker.": None,
            "token2wav.": None,
            "code2wav.": None,
        }
        audio_encoder: ClassVar[Any] = Qwen2_5OmniAudioEncoder
        language_architecture = "Qwen2ForCausalLM"

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            nn.Module.__init__(self)
            self.config = vllm_config.model_config.hf_config.thinker_config
            self.multimodal_config = vllm_config.model_config.multimodal_config
            self.quant_config = vllm_config.quant_config
            with self._mark_tower_model(vllm_config, "audio"):
                self.audio_tower = self.audio_encoder(self.config.audio_config)
            text_config = self.config.text_config
            # transformers reads this setting from the thinker's configuration; that of its language model defaults to True, or
            # has none. vLLM's language models read it here or in the model's own configuration, which is the same object.
            text_config.tie_word_embeddings = self.config.tie_word_embeddings
            with self._mark_language_model(vllm_config):
                self.language_model = init_vllm_registered_model(
                    vllm_config=vllm_config,
                    hf_config=text_config,
                    prefix=maybe_prefix(prefix, "language_model"),
                    architectures=[self.language_architecture],
                )
            self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    class Omni3Thinker(OmniThinker):
        """A mixture of experts, whose adapters are on the attention alone."""

        audio_encoder: ClassVar[Any] = Qwen3OmniMoeAudioEncoder
        language_architecture = "Qwen3MoeForCausalLM"

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            max_tokens, device = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.device_config.device
            self.routing = RoutingBuffer(self.language_model, max_tokens, device)

    def register_like_qwen2_audio(family: Family, encoder: type, projector: type) -> None:
        """Register the class of a family whose parts are called as Qwen2-Audio's; transformers' own encode its audio.

        Args:
            encoder: made from the configuration of the tower.
            projector: made from that of the whole model.
        """

        @MULTIMODAL_REGISTRY.register_processor(
            Qwen2AudioMultiModalProcessor, info=Info, dummy_inputs=Qwen2AudioDummyInputsBuilder
        )
        class Model(Qwen2AudioWithLora):
            def __init__(self, *, vllm_config: Any, prefix: str = ""):
                nn.Module.__init__(self)
                self.config = vllm_config.model_config.hf_config
                self.multimodal_config = vllm_config.model_config.multimodal_config
                self.quant_config = vllm_config.quant_config
                with self._mark_tower_model(vllm_config, "audio"):
                    self.audio_tower = encoder(self.config.audio_config)
                    self.multi_modal_projector = projector(self.config)
                    for name in family.transformers_class()._keep_in_fp32_modules_strict or ():
                        self.audio_tower.get_submodule(name).float()
                with self._mark_language_model(vllm_config):
                    self.language_model = init_vllm_registered_model(
                        vllm_config=vllm_config,
                        hf_config=self.config.text_config,
                        prefix=maybe_prefix(prefix, "language_model"),
                        architectures=[_LANGUAGE_MODELS[self.config.text_config.model_type]],
                    )
                # Else vLLM allocates adapters for embedding and head too, and computes with them.
                self.language_model.embedding_modules = {}
                self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

        ModelRegistry.register_model(family.model_class, Model)

    # vLLM's own takes no adapters, and no language model but Qwen2.
    register_like_qwen2_audio(
        qwen2_audio.FAMILY, modeling_qwen2_audio.Qwen2AudioEncoder, modeling_qwen2_audio.Qwen2AudioMultiModalProjector
    )
    # vLLM's own takes no audio embeddings, and reads Mistral's names alone.
    register_like_qwen2_audio(voxtral.FAMILY, modeling_voxtral.VoxtralEncoder, modeling_voxtral.VoxtralMultiModalProjector)
    # vLLM's own takes one recording a prompt.
    register_like_qwen2_audio(
        audio_flamingo_3.FAMILY,
        modeling_audioflamingo3.AudioFlamingo3Encoder,
        modeling_audioflamingo3.AudioFlamingo3MultiModalProjector,
    )
    ModelRegistry.register_model("Qwen3OmniMoeForConditionalGeneration", Omni3Thinker)
    for name in ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"):
        ModelRegistry.register_model(name, OmniThinker)
