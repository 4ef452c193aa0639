"""Starts and drives vLLM beyond its documented interface.

A new version of vLLM has to be read against this file, against `vllm_models.py`, which builds on vLLM's own model classes, and
against what `models/weights.py` (`base_layer`, `cpu_linear`) and `models/memory.py` (LoRA ranks, block size) take from it.

Supported is the range that pyproject.toml gives the extra `vllm`, in its CUDA and CPU builds.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.hub import cannot_be_loaded, checkpoint_folder
from tars_fast.models.memory import BLOCK_TOKENS, PREFILL_TOKENS, engine_rank
from tars_fast.models.weights import SharingError
from tars_fast.rollout.vllm_experts import RoutingRecorder, check_experts, whole_experts
from tars_fast.rollout.vllm_models import register_models, without_mrope

_MAX_CLIPS = 64
"""Audio clips that one prompt may hold; with 30 s each, more than fits into any context."""
_GRAPHS_OF_DECODING = {"mode": "NONE", "cudagraph_mode": "FULL_DECODE_ONLY"}
"""A graph of a whole decoding step for every batch size, nothing compiled: starting takes seconds, prefill stays eager."""
_ADAPTER_ID = 1
"""vLLM's number of the only LoRA adapter, which lives in its buffers and has no file."""


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
    """On CUDA; else eager."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the linear layers with adapters, by transformers; None: vLLM has buffers for all that it can adapt."""
    has_experts: bool = False
    """The model is a mixture of experts, whose adapters are on the attention alone."""
    dummy_weights: bool = False
    """Random weights in the place of the checkpoint's, for benchmarks."""
    tensor_parallel: int = 1
    """Processes, all that torchrun started, of which each has a part of the weights."""


class VllmInternals:
    """A running `vllm.LLM`, with its weights, KV cache and adapter slot.

    Args:
        source: a checkpoint with weights of its own.

    Raises:
        UserError: vLLM cannot load the checkpoint, or refuses the settings.
    """

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype, settings: VllmSettings):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if settings.has_experts:
            # `RoutingRecorder` reads what only this one of vLLM's model runners has.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if device.type == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with _quiet_start(source):
            from vllm import LLM

        self._on_cpu = device.type == "cpu"
        # CUDA graphs hold addresses of the KV cache, which vLLM's own allocator keeps while their memory is free.
        self._keeps_addresses = settings.cuda_graphs and not self._on_cpu
        register_models()
        adapter: dict[str, object] = {}
        if settings.lora_rank:
            rank = engine_rank(settings.lora_rank)
            adapter = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
            if settings.lora_targets is not None:
                adapter["lora_target_modules"] = list(settings.lora_targets)
            elif settings.has_experts:
                # Else vLLM allocates buffers for adapters of every expert.
                adapter["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        parallel: dict[str, object] = {}
        launched: AbstractContextManager[None] = nullcontext()
        if settings.tensor_parallel > 1:
            launched = self._launched()
            # Every process runs an engine of its own, on its own part of the weights, through the same steps.
            parallel = {"tensor_parallel_size": settings.tensor_parallel, "distributed_executor_backend": "external_launcher"}
            # Its peer-to-peer memory has not been tried between processes that see one GPU each.
            parallel["disable_custom_all_reduce"] = True
        experts = whole_experts(on_cpu=self._on_cpu) if settings.has_experts else nullcontext()
        with self._eager_on_cpu(), _unpacked_cpu_weights(), _thread_setting_kept(), _quiet_start(source), experts, launched:
            self.llm = LLM(
                model=str(checkpoint_folder(source, weights=not settings.dummy_weights)),
                trust_remote_code=False,
                # "auto" takes Mistral's files where it finds some.
                config_format="hf",
                hf_overrides=without_mrope,
                tokenizer_mode="hf",
                dtype=str(dtype).removeprefix("torch."),
                # No pickle, which "auto" would read where there is nothing else.
                load_format="dummy" if settings.dummy_weights else "safetensors",
                max_model_len=settings.max_tokens,
                max_num_seqs=settings.max_sequences,
                max_num_batched_tokens=max(PREFILL_TOKENS, settings.max_tokens, settings.max_sequences),
                kv_cache_memory_bytes=settings.kv_cache_bytes,
                # The cache's size is given above; a larger share would let vLLM refuse to start on a GPU that is in use.
                gpu_memory_utilization=0.01,
                block_size=BLOCK_TOKENS,
                enforce_eager=not self._keeps_addresses,
                compilation_config=_GRAPHS_OF_DECODING if self._keeps_addresses else None,
                enable_sleep_mode=self._keeps_addresses,
                enable_prefix_caching=True,
                # Prompts bring audio embeddings instead of recordings, of which vLLM would take windows of 30 s only.
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
                **parallel,
            )
        self._runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in self._runner.kv_caches}
        self._kv_storages = [(storage, storage.nbytes()) for storage in storages.values()]
        self._released = False
        self._routing: RoutingRecorder | None = None
        if settings.has_experts:
            check_experts(self.module, on_cpu=self._on_cpu)
            scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
            model: Any = self.module
            self._routing = RoutingRecorder(self._runner, scheduler, model.routing)

    @property
    def module(self) -> nn.Module:
        """The model that vLLM runs, with its weights loaded."""
        return self._runner.get_model()

    @contextmanager
    def _eager_on_cpu(self) -> Iterator[None]:
        """vLLM compiles parts of its sampler, which on a CPU needs a C++ compiler and takes longer than a small run."""
        with torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext():
            yield

    @contextmanager
    def _launched(self) -> Iterator[None]:
        """What vLLM reads of torchrun's environment where the weights are in parts, as this process has it.

        A process sees one GPU (`join_workers`), which is its first, whatever LOCAL_RANK is. On a CPU vLLM names the memory that
        processes share after the end of an address, which is the same for all runs of a machine (0.32; earlier ones have no
        such function).
        """
        with ExitStack() as restored:
            if self._on_cpu:
                from vllm.distributed.device_communicators import cpu_communicator

                shared = cpu_communicator._CPUSHMDistributed
                name_of, port = getattr(shared, "make_group_name", None), os.environ.get("MASTER_PORT", "")
                if name_of is not None:
                    shared.make_group_name = staticmethod(lambda owner: f"{port}{name_of(owner)}".replace("/", ""))
                    restored.callback(setattr, shared, "make_group_name", staticmethod(name_of))
            elif "LOCAL_RANK" in os.environ:
                restored.callback(os.environ.__setitem__, "LOCAL_RANK", os.environ["LOCAL_RANK"])
                os.environ["LOCAL_RANK"] = "0"
            yield

    def generate(
        self,
        requests: list[dict[str, Any]],
        params: list[Any],
        seed: int,
        on_finished: Callable[[int, object], None],
        around_step: Callable[[], AbstractContextManager[None]],
        *,
        use_adapter: bool,
    ) -> None:
        """`LLM.generate`, after which no request is left in the engine, even when it raised.

        Args:
            params: `SamplingParams` of each request.
            on_finished: called with a request's number and its `RequestOutput` as soon as all its continuations are complete;
                of a mixture of experts each has `routed_experts`, see `Completion`.
            around_step: gives a context for every step of the engine; what it raises ends the call.
        """
        from vllm.lora.request import LoRARequest

        # vLLM never opens the path, because the adapter of this number is already active.
        adapter = LoRARequest("policy", _ADAPTER_ID, "in-memory") if use_adapter else None
        engine = self.llm.llm_engine
        if self._on_cpu:
            # On a CPU vLLM's sampler fails for requests with a seed of their own (torch's CPU generator has no offset), and
            # takes its random numbers from torch's global generator instead.
            torch.manual_seed(seed)
            for request_params in params:
                request_params.seed = None
        first = self.llm.request_counter.counter
        # `LLM.generate` takes no callback and returns only when all requests are complete; it calls `engine.step` for every
        # token. To hand over each request as soon as it is complete, and to stop between two tokens, `step` is replaced on this
        # engine object (not on its class) until the call ends.
        step, replaced = engine.step, vars(engine).get("step")

        names: dict[tuple[str, int], str] = {}

        def observed_step() -> list[Any]:
            if self._routing is not None:
                states = engine.output_processor.request_states.items()
                names.update({((own.parent_req or own).external_req_id, own.request_index): name for name, own in states})
            with around_step():
                outputs = step()
            for output in outputs:
                if output.finished:
                    if self._routing is not None:
                        for completion in output.outputs:
                            completion.routed_experts = self._routing.take(names[output.request_id, completion.index])
                    on_finished(int(output.request_id) - first, output)
            return outputs

        try:
            engine.step = observed_step
            with self._eager_on_cpu():
                self.llm.generate(requests, params, use_tqdm=False, lora_request=adapter)
        except BaseException:
            # The next call would complete, and return, the requests that an exception or Ctrl-C left in the engine.
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            if self._routing is not None:
                self._routing.forget()
            del engine.step
            if replaced is not None:
                engine.step = replaced

    def reset_caches(self) -> None:
        """Drop cached keys, values and audio embeddings, which belong to earlier weights or to another call.

        Raises:
            SharingError: vLLM keeps its prefix cache, so that it would continue from keys and values of earlier weights.
        """
        self._settle()
        if not self.llm.reset_prefix_cache():
            raise SharingError("vLLM did not give up its prefix cache; requests of an earlier call still hold it")
        self.llm.llm_engine.reset_encoder_cache()

    def _settle(self) -> None:
        """Let the scheduler remove completed requests: `LLM.generate` returns before it has."""
        core = self.llm.llm_engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self.llm.llm_engine.step()

    def activate_empty_adapter(self) -> None:
        """Activate an adapter of zeros in vLLM's only slot; its buffers are written to from then on."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        manager = self._runner.lora_manager._adapter_manager
        # Naming one layer is enough, because vLLM fills the buffers of all other layers with zeros. An adapter names the parts
        # of a fused one.
        place, layer = next(iter(manager.modules.items()))
        name = manager.packed_modules.get(place, [place])[0]
        a, b = layer.lora_a_stacked[0][0, 0].clone(), layer.lora_b_stacked[0][0, 0].clone()
        weights = LoRALayerWeights(name, len(a), len(a), a.zero_(), b.zero_())
        manager.add_adapter(LoRAModel(_ADAPTER_ID, len(a), {name: weights}))
        manager.activate_adapter(_ADAPTER_ID)

    def adapter_buffers(self, place: str, number: int) -> tuple[Tensor, Tensor] | None:
        """vLLM's buffers of the adapter, ([rank, inputs], [outputs, rank]), or None where the layer takes no adapter.

        Args:
            place: the name of vLLM's module.
            number: which of the modules that are fused there, from 0.
        """
        layer: Any = self.module.get_submodule(place)
        if not hasattr(layer, "lora_a_stacked"):
            return None
        # The leading dimensions are the adapter's slot and one of size 1 that vLLM's kernels expect.
        return layer.lora_a_stacked[number][0, 0], layer.lora_b_stacked[number][0, 0]

    def release_kv_cache(self) -> None:
        """Give the KV cache's memory back until `restore_kv_cache`."""
        if self._released:
            return
        self.reset_caches()
        if self._keeps_addresses:
            from vllm.device_allocator.cumem import unmap_and_release

            torch.cuda.synchronize()
            for handle in _kv_cache_handles():
                unmap_and_release(handle)
        else:
            for storage, _ in self._kv_storages:
                storage.resize_(0)
        self._released = True

    def restore_kv_cache(self) -> None:
        """Take the memory of the KV cache again, filled with zeros; nothing happens where it was not released."""
        if not self._released:
            return
        if self._keeps_addresses:
            from vllm.device_allocator.cumem import create_and_map

            # vLLM takes this memory from the driver, so PyTorch's allocator has to give back what the trainer freed.
            gc.collect()
            torch.cuda.empty_cache()
            for handle in _kv_cache_handles():
                create_and_map(handle)
            # Before 0.32 vLLM has tables of its own in the same memory.
            getattr(self._runner, "post_kv_cache_wake_up", lambda: None)()
        else:
            for storage, num_bytes in self._kv_storages:
                storage.resize_(num_bytes)
        # New memory may hold NaN, and attention multiplies the empty places of a block by 0, which does not remove a NaN.
        for cache in self._runner.kv_caches:
            cache.zero_()
        self._released = False

    def shutdown(self) -> None:
        """End vLLM's engine."""
        if self._keeps_addresses:
            # vLLM unmaps its pools at the end, and must find all of them mapped.
            self.restore_kv_cache()
        self._kv_storages.clear()
        self.llm.llm_engine.engine_core.shutdown()


def _kv_cache_handles() -> list[Any]:
    """Of vLLM's allocator, one for every piece of the KV cache; before 0.32 vLLM's own sleep takes the weights along."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return [data.handle for data in CuMemAllocator.get_instance().pointer_to_data.values() if data.tag == "kv_cache"]


@contextmanager
def _unpacked_cpu_weights() -> Iterator[None]:
    """Keep vLLM's CPU build from making packed copies of its weights, which the trainer's updates would not reach."""
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
    """Hide the warnings of vLLM's own imports, and turn what it raises over a checkpoint into a UserError.

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
def _thread_setting_kept() -> Iterator[None]:
    """Undo that vLLM's CPU build replaces `torch.set_num_threads` by a function that does nothing."""
    original, number = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = original
        torch.set_num_threads(number)
