"""How much of a GPU's memory a run will need in each phase, computed from sizes alone, before anything is loaded."""

from __future__ import annotations

import dataclasses
import heapq
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tars_fast.models.architecture import Architecture, sharding_refusal
from tars_fast.support.text import GB, size

_USABLE = 0.95
"""Share of a GPU's memory that is planned with; the rest is left for fragmentation of the allocator."""
_CONTEXT_BYTES = int(0.8 * GB)
"""CUDA context, cuBLAS workspaces and loaded kernels."""
PREFILL_TOKENS = 2048
"""Most tokens in one forward pass of the engine over prompts, which bound its activations."""
BLOCK_TOKENS = 32
"""Tokens in a block of vLLM's KV cache; its CPU build takes multiples of 32 only."""
ENGINE_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM allocates adapter buffers for."""
_FUSED = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
"""Linear layers that vLLM makes one of."""
_FEED_FORWARD = frozenset({"gate_proj", "up_proj", "gate_up_proj", "down_proj"})
_GRAPH_BYTES = int(0.6 * GB)
"""CUDA graphs and attention workspaces of vLLM; an estimate."""
_NCCL_BYTES = int(0.5 * GB)
"""Buffers with which NCCL sends and receives, where there are several processes; an estimate."""
EVALUATION_TOKENS = 16_384
"""Most tokens in one forward pass of the evaluation."""
UPDATE_BYTES = 16
"""Bytes that `StochasticAdamW` needs for each weight of the parameter it updates, beside weights, gradients and moments."""
GRADIENT_BUCKET_BYTES = 32 * 2**20
"""Most bytes of gradients that several processes sum at once, unless a single one is larger."""
_LOGIT_TOKENS, _PRODUCT_TOKENS = 512, 1024
"""Tokens whose float32 logits and whose probabilities `tars_kernels.linear_policy_loss` keeps at a time."""
_MOST_TOKENS = {True: 16_384, False: 4096}
"""Most tokens of a micro-batch, by whether the device is a GPU; larger ones do not compute faster."""
_FEWEST_TOKENS = 1024
"""Tokens of the smallest micro-batch that is planned, on any device."""
_MOST_COMPLETIONS = 512
"""Largest group that is looked for."""
_ASSUMED_PROMPT_TOKENS = 900
"""Longest prompt where the data is not known: 30 s of speech at 25 tokens a second, inside the paper's instructions."""


@dataclass(frozen=True)
class Workload:
    """The sizes and settings of a run that its memory depends on."""

    architecture: Architecture
    engine: str
    dtype_bytes: int
    lora_rank: int
    """0: full fine-tuning."""
    group_size: int
    max_new_tokens: int
    longest_prompt: int
    """Tokens."""
    rollout_batch_size: int
    """Completions in flight."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the linear layers with adapters; None: all."""
    given_micro_batch: int | None = None
    """Tokens of a micro-batch; None: as many as fit into free memory, at most `_MOST_TOKENS`."""
    gradient_checkpointing: bool = False
    embedder_bytes: int = 0
    """Of the text embedder of R_beh, on the same device."""
    given_kv_cache: int | None = None
    """Bytes of vLLM's KV cache; None: as many as the completions in flight need, at most what is free."""
    rollout_ahead: bool = False
    """Whether sampling and training run at the same time."""
    reference_bytes: int = 0
    """Of each trained weight, in copies that the objective compares with: those before training, their average."""
    distils: bool = False
    """Whether there are two streams of states, the policy's and a teacher's, whose whole distributions a loss compares."""
    trains: bool = True
    """False: evaluation only, without optimiser."""
    trains_audio: bool = False
    """Whether full fine-tuning updates audio tower and projector; what the tower keeps for its backward pass is not planned."""
    on_gpu: bool = True
    num_processes: int = 1
    """Of the run, each on a device of its own; those that share the weights count as one."""
    tensor_parallel: int = 1
    """Processes that have a part of the language model's weights each; all else of it is planned as if whole."""

    @property
    def weights(self) -> int:
        """Bytes of the one copy of the weights; vLLM pads the vocabulary."""
        text = self.architecture.num_text_parameters(padded=self.engine == "vllm") // self.tensor_parallel
        return (text + self.architecture.num_other_parameters) * self.dtype_bytes

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """Names of the decoder's linear layers with adapters, or in an evaluation of all that may have one."""
        return tuple(self.architecture.linear_layers) if self.lora_targets is None else self.lora_targets

    @property
    def num_trained(self) -> int:
        """Parameters that the optimiser updates."""
        if self.lora_rank:
            return self.architecture.num_lora_parameters(self.lora_rank, self.adapted_layers)
        return self.architecture.num_text_parameters() // self.tensor_parallel + self.num_trained_audio

    @property
    def num_trained_audio(self) -> int:
        """Of them those of audio tower and projector, of which no process has a part only."""
        return self.architecture.num_other_parameters if self.trains_audio and not self.lora_rank else 0

    @property
    def adapters(self) -> int:
        """Bytes of LoRA weights in float32, and of vLLM's buffers for them, in the weights' dtype and the next of its ranks."""
        if not self.lora_rank:
            return 0
        if self.engine != "vllm":
            return 4 * self.num_trained
        # vLLM has buffers for all layers that it fuses with one that is adapted.
        fused = [group for group in _FUSED if not group.isdisjoint(self.adapted_layers)]
        buffered = {*self.adapted_layers, *chain.from_iterable(fused)}
        buffers = self.architecture.num_lora_parameters(engine_rank(self.lora_rank), buffered)
        return 4 * self.num_trained + buffers * self.dtype_bytes

    @property
    def is_sharded(self) -> bool:
        """Whether each process updates a part of the parameters only: in full fine-tuning by several."""
        return self.num_processes > 1 and not self.lora_rank

    @property
    def num_stepped(self) -> int:
        """Parameters that a process updates itself, at most."""
        if not self.is_sharded:
            return self.num_trained
        sizes = self.architecture.text_parameter_sizes()
        # No parameter of the tower is so large that they could not be shared evenly.
        audio = -(-self.num_trained_audio // self.num_processes)
        return largest_share(sizes, self.num_processes) // self.tensor_parallel + audio

    @property
    def optimiser(self) -> int:
        """Bytes of AdamW's state: two float32 moments for each parameter that this process updates."""
        return 8 * self.num_stepped if self.trains else 0

    @property
    def gradient_bytes(self) -> int:
        """Of one trained number: float32 for LoRA, else as the weights."""
        return 4 if self.lora_rank else self.dtype_bytes

    @property
    def gradients(self) -> int:
        """Bytes of gradients in a backward pass, which are all there until the last one of an update."""
        return self.num_trained * self.gradient_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes that each of several processes sends, and receives, an update.

        That is what a ring needs to sum all gradients for all of them; or to sum each for its owner, and to give the owner's
        new weights, which are as large, to the others.
        """
        return 2 * self.gradients * (self.num_processes - 1) // self.num_processes

    @property
    def resident(self) -> dict[str, int]:
        """Bytes that every phase needs, by what they are for."""
        parts = {"weights": self.weights, "adapters": self.adapters, "optimiser": self.optimiser}
        # The audio tower in training is never exchanged.
        parts |= {"reference weights": self.reference_bytes * (self.num_trained - self.num_trained_audio)}
        context = _CONTEXT_BYTES if self.on_gpu else 0
        graphs = _GRAPH_BYTES if self.on_gpu and self.engine == "vllm" else 0
        nccl = _NCCL_BYTES if self.on_gpu and self.num_processes * self.tensor_parallel > 1 else 0
        parts |= {"embedder of R_beh": self.embedder_bytes, "CUDA context": context, "CUDA graphs": graphs}
        return parts | {"NCCL buffers": nccl}

    @property
    def kv_bytes_per_token(self) -> int:
        return self.architecture.kv_bytes_per_token(self.dtype_bytes) // self.tensor_parallel

    @property
    def sequence_bytes(self) -> int:
        """Bytes of KV cache for the longest prompt with one longest completion, and for a block that vLLM reserves."""
        return (_blocks(self.longest_prompt + self.max_new_tokens) + BLOCK_TOKENS) * self.kv_bytes_per_token

    @property
    def kv_needed(self) -> int:
        """Bytes of KV cache for all completions in flight; in vLLM those of one prompt share the prompt's blocks."""
        if self.engine != "vllm":
            # In a greedy evaluation every completion has another prompt.
            return self.rollout_batch_size * (self.longest_prompt + self.max_new_tokens) * self.kv_bytes_per_token
        num_prompts = -(-self.rollout_batch_size // (self.group_size // 2))
        # A completion's first block also holds the end of the prompt, hence one more block for each.
        tokens = num_prompts * _blocks(self.longest_prompt) + self.rollout_batch_size * (
            _blocks(self.max_new_tokens) + BLOCK_TOKENS
        )
        return max((tokens + BLOCK_TOKENS) * self.kv_bytes_per_token, self.sequence_bytes)

    @property
    def rollout_workspace(self) -> int:
        """Bytes that sampling needs beside the KV cache.

        These are activations of a forward pass over prompts, and for one token of every completion logits, float32 logits and
        probabilities; the transformers engine also cumulates the probabilities, in float64.
        """
        prefill = self._forward(max(PREFILL_TOKENS, self.longest_prompt + self.max_new_tokens))
        return prefill + self.rollout_batch_size * self.architecture.vocabulary_size * (
            self.dtype_bytes + (12 if self.engine == "vllm" else 24)
        )

    @property
    def question_tokens(self) -> int:
        """Tokens of a question with the longest prompts and completions: both prompts, all completions."""
        return 2 * self.longest_prompt + self.group_size * self.max_new_tokens

    def activations(self, tokens: int) -> int:
        """Bytes kept for the backward pass: the input of every layer, and what is computed inside a layer.

        With gradient checkpointing the latter exists for one layer at a time, without it for all.

        Args:
            tokens: of a micro-batch; as it consists of whole questions, at least `question_tokens` are counted.
        """
        shape = self.architecture
        tokens = max(tokens, self.question_tokens)
        layers = 1 if self.gradient_checkpointing else shape.num_layers
        inputs = shape.num_layers * tokens * shape.hidden_size * self.dtype_bytes
        return inputs + layers * tokens * self._inside_bytes() + self.masks(tokens)

    def _inside_bytes(self) -> int:
        """Bytes of a token inside a layer at the height of its backward pass, without the layer's input.

        The factors are those of measured peaks, which grow linearly with each of these sizes.
        """
        shape = self.architecture
        hidden, inner = shape.hidden_size, shape.intermediate_size
        queries, keys = shape.num_heads * shape.head_size, shape.key_value_size
        numbers = 7 * hidden + 4 * queries + 2 * keys + 2 * (queries + keys) * shape.normed_attention
        if shape.num_experts:
            # A token is there once for each of its experts: what they make of it is kept, its copies for them are not.
            numbers += 2 * hidden + shape.experts_per_token * (4 * hidden + 3 * shape.moe_intermediate_size)
        else:
            numbers += 6 * inner
        if not self.lora_rank:
            # The gradients of weights need the layers' inputs too.
            numbers += 4 * hidden + shape.experts_per_token * (hidden + shape.moe_intermediate_size)
            return numbers * self.dtype_bytes
        # LoRA computes with its input in float32; in the feed-forward layer, where the height is, with gradients as well.
        adapters = 4 * sum(shape.linear_layers[name][0] for name in self.adapted_layers)
        if not _FEED_FORWARD.isdisjoint(self.adapted_layers):
            adapters += 10 * hidden + 2 * inner
        return numbers * self.dtype_bytes + adapters

    def _forward(self, tokens: int) -> int:
        """Bytes inside one layer in a forward pass without gradient."""
        shape = self.architecture
        # Mixtures of experts hold four copies of the token for each expert, while they add up what the experts made of it.
        widest = 4 * shape.experts_per_token * shape.hidden_size if shape.num_experts else 3 * shape.intermediate_size
        return tokens * (widest + 6 * shape.hidden_size) * self.dtype_bytes

    def masks(self, tokens: int) -> int:
        """Bytes of attention masks; 0 with FlashAttention, which is used on a GPU in half precision."""
        if self.on_gpu and self.dtype_bytes == 2:
            return 0
        group = self.group_size // 2 * self.max_new_tokens
        return 2 * -(-tokens // self.question_tokens) * group * (self.longest_prompt + group) * self.dtype_bytes

    @property
    def evaluation_activations(self) -> int:
        """Bytes inside one layer in a forward pass without gradient over spoken and written completions."""
        return self._forward(max(EVALUATION_TOKENS, 2 * (self.longest_prompt + self.max_new_tokens)))

    def logits(self, tokens: int) -> int:
        """Bytes of the fused loss, and of the completions' states with their gradient, and a teacher's states without.

        Args:
            tokens: of a micro-batch.
        """
        shape = self.architecture
        streams = 1 + self.distils
        chunk = streams * _LOGIT_TOKENS * 4 + _PRODUCT_TOKENS * self.dtype_bytes
        states = (1 + streams) * max(tokens, self.question_tokens) * shape.hidden_size * self.dtype_bytes
        return chunk * shape.vocabulary_size // self.tensor_parallel + states


def largest_share(sizes: Iterable[int], num_processes: int) -> int:
    """The largest sum where the next largest of `sizes` always goes to the process that has least so far, as in
    `torch.distributed.optim.ZeroRedundancyOptimizer`."""
    shares = [0] * num_processes
    for one in sorted(sizes, reverse=True):
        heapq.heapreplace(shares, shares[0] + one)
    return max(shares)


def engine_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that is at least `rank`, or `rank` where there is none."""
    return next((known for known in ENGINE_LORA_RANKS if known >= rank), rank)


def _blocks(tokens: int) -> int:
    """`tokens` rounded up to whole blocks of the KV cache."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def assumed_longest_prompt(architecture: Architecture) -> int:
    """Tokens to plan with where the data is not known: `_ASSUMED_PROMPT_TOKENS`, at most half of the model's longest input."""
    return min(_ASSUMED_PROMPT_TOKENS, architecture.max_tokens // 2)


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory of one GPU is used, in bytes, by phase and by what it is for."""

    workload: Workload
    device_bytes: int
    kv_cache: int
    """Bytes."""
    micro_batch: int
    """Tokens."""
    phases: dict[str, dict[str, int]]
    """Bytes of each phase by what they are for."""

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def sequences_in_flight(self) -> int:
        """Completions of the greatest length that the KV cache has room for at once."""
        workload = self.workload
        return min(workload.rollout_batch_size, workload.rollout_batch_size * self.kv_cache // max(1, workload.kv_needed))

    @property
    def fits(self) -> bool:
        """Whether the run can work in `device_bytes`."""
        # vLLM lets completions wait for room in its cache; the transformers engine samples whole batches.
        least = self.workload.sequence_bytes if self.workload.engine == "vllm" else self.workload.kv_needed
        return self.kv_cache >= least and max(self.peaks.values()) <= _USABLE * self.device_bytes


def plan_memory(workload: Workload, device_bytes: int) -> MemoryPlan:
    """Plan the memory of each phase; KV cache and micro-batch get what the rest leaves free, unless their size is given.

    Args:
        device_bytes: memory of the GPU, or what is free of it.
    """
    kv_cache = workload.given_kv_cache
    rollout = workload.resident | {"activations": workload.rollout_workspace}
    usable = int(_USABLE * device_bytes)
    # A bucket of gradients is there twice while it is sent; of adapters all are one bucket, after the backward pass.
    bucket = min(GRADIENT_BUCKET_BYTES, workload.gradients) if workload.is_sharded else 0
    training = workload.resident | {"gradients": workload.gradients, "gradient buckets": bucket}
    # Of a sharded optimiser those of the other processes are gone by then.
    bucket = workload.gradients if workload.num_processes > 1 and not workload.is_sharded else 0
    stepping = workload.resident | {"gradients": workload.num_stepped * workload.gradient_bytes, "gradient buckets": bucket}
    # `StochasticAdamW` computes one parameter at a time in float32.
    largest = max(workload.architecture.text_parameter_sizes()) // workload.tensor_parallel
    stepping["float32 update"] = 0 if workload.lora_rank or workload.dtype_bytes == 4 else UPDATE_BYTES * largest
    free = usable - sum(rollout.values())
    if workload.rollout_ahead:
        training |= {"activations of sampling": workload.rollout_workspace}
        least = workload.activations(_FEWEST_TOKENS) + workload.logits(_FEWEST_TOKENS)
        free = min(free, usable - sum(training.values()) - least, usable - sum(stepping.values()))
    if workload.engine != "vllm":
        kv_cache = workload.kv_needed
    elif kv_cache is None:
        kv_cache = max(0, min(workload.kv_needed, free))
    if workload.rollout_ahead:
        training |= {"KV cache": kv_cache}
        stepping |= {"KV cache": kv_cache}
    micro_batch = workload.given_micro_batch or _MOST_TOKENS[workload.on_gpu]
    free = usable - sum(training.values())
    while (
        workload.given_micro_batch is None
        and micro_batch > _FEWEST_TOKENS
        and workload.activations(micro_batch) + workload.logits(micro_batch) > free
    ):
        micro_batch //= 2
    training |= {"activations": workload.activations(micro_batch), "logits": workload.logits(micro_batch)}
    phases = {
        "loading": workload.resident,
        "rollout": rollout | {"KV cache": kv_cache},
        "comparing states": workload.resident | {"activations": workload.evaluation_activations},
        "forward and backward": training,
        "optimiser": stepping,
    }
    return MemoryPlan(workload, device_bytes, kv_cache, micro_batch, phases)


def limits(plan: MemoryPlan) -> dict[str, int]:
    """Largest `group_size`, `max_new_tokens` and `longest_prompt` that fit, each beside all other settings as they are.

    Args:
        plan: one that fits.
    """
    workload, longest = plan.workload, plan.workload.architecture.max_tokens
    found = {}
    for name, most, step in (
        ("group_size", _MOST_COMPLETIONS, 2),
        ("max_new_tokens", longest - workload.longest_prompt, 1),
        ("longest_prompt", longest - workload.max_new_tokens, 1),
    ):
        values = range(getattr(workload, name), most + 1, step)

        def is_too_large(value: int, name: str = name) -> bool:
            changed: dict[str, Any] = {name: value}
            return not plan_memory(dataclasses.replace(workload, **changed), plan.device_bytes).fits

        found[name] = values[bisect_left(values, True, key=is_too_large) - 1]
    return found


def remedies(plan: MemoryPlan) -> list[str]:
    """Changes of settings that make the run fit, as text: single ones where any is enough, else a few together.

    Those that change neither the method nor its rewards come first.
    """
    workload = plan.workload
    half = workload.max_new_tokens // 2
    is_full = workload.trains and not workload.lora_rank
    # Adapters are for the language model alone.
    frozen = "--freeze-audio " if workload.trains_audio else ""
    alone = workload.tensor_parallel == 1
    more_processes = [number for number in (2, 4, 8) if is_full and alone and number > workload.num_processes]
    parts = [number for number in (2, 4) if alone and workload.num_processes == 1 and workload.engine == "vllm"]
    parts = [number for number in parts if sharding_refusal(workload.architecture, number) is None]
    changes: list[tuple[str, str, object]] = [
        ("--rollout-ahead 0", "rollout_ahead", False),
        (f"--tokens-per-micro-batch {_FEWEST_TOKENS}", "given_micro_batch", _FEWEST_TOKENS),
        ("--gradient-checkpointing True", "gradient_checkpointing", True),
        (f"--rollout-batch-size {workload.group_size // 2}", "rollout_batch_size", workload.group_size // 2),
        ("--dtype bfloat16", "dtype_bytes", 2),
        ("--freeze-audio", "trains_audio", False),
        (f"{frozen}--lora-rank 8", "lora_rank", workload.lora_rank or 8),
        *((f"torchrun --nproc-per-node {number}", "num_processes", number) for number in more_processes),
        ("--teacher moving --text-anchor none", "reference_bytes", 0),
        ("--behaviour-model hashed-ngrams", "embedder_bytes", 0),
        (f"--max-new-tokens {half}", "max_new_tokens", half),
        (f"--max-new-tokens {half // 2}", "max_new_tokens", half // 2),
        *((f"torchrun --nproc-per-node {number}, --tensor-parallel {number}", "tensor_parallel", number) for number in parts),
    ]
    changes = [(flag, name, value) for flag, name, value in changes if getattr(workload, name) != value]
    if workload.given_micro_batch is None:
        # The plan has lowered it as far as needed already.
        changes = [change for change in changes if change[1] != "given_micro_batch"]

    def with_changes(values: dict[str, Any]) -> MemoryPlan:
        return plan_memory(dataclasses.replace(workload, **values), plan.device_bytes)

    def remedy(flags: str, changed: MemoryPlan) -> str:
        return f"{flags}: peak {size(max(changed.peaks.values()))}, fits"

    found = []
    sized: dict[str, Any] = {"given_kv_cache": None}
    if workload.given_kv_cache is not None and (changed := with_changes(sized)).fits:
        found.append(remedy(f"without --kv-cache-gb ({size(changed.kv_cache)} then)", changed))
    for flag, name, value in changes:
        changed = with_changes({name: value})
        if changed.fits:
            found.append(remedy(flag, changed))
    if found:
        return found
    flags: dict[str, str] = {}
    values: dict[str, object] = {}
    for flag, name, value in changes:
        flags[name], values[name] = flag, value
        together = with_changes(sized | values)
        if together.fits:
            # Leave out what is not needed after all.
            for other in list(values)[:-1]:
                fewer = {kept: values[kept] for kept in values if kept != other}
                if (smaller := with_changes(sized | fewer)).fits:
                    values, together = fewer, smaller
            return [remedy(" ".join(flags[name] for name in values), together)]
    least = with_changes(sized | values).workload
    stays = f"{size(sum(least.resident.values()))} stay at the least, {size(least.weights)} of them weights"
    return [f"no setting: {stays}, beside which each phase needs room of its own"]


def describe(plan: MemoryPlan) -> str:
    """The plan as a table, in GB of 1e9 bytes or for small models in MB, with the verdict and remedies."""
    workload = plan.workload
    trained = f"LoRA rank {workload.lora_rank}" if workload.lora_rank else "full fine-tuning"
    hears = "audio tower and projector in training; what the tower keeps for its backward pass comes on top"
    unit, name_of_unit = (GB, "GB (1e9 bytes)") if max(plan.peaks.values()) >= 10 * GB else (GB // 1000, "MB (1e6 bytes)")
    lines = [
        f"{trained}, rollouts by {workload.engine}, {workload.dtype_bytes} bytes a weight; prompts of up to "
        f"{workload.longest_prompt} tokens, {workload.max_new_tokens} new ones; micro-batches of {plan.micro_batch:,} tokens "
        f"or one question of up to {workload.question_tokens:,}, gradient checkpointing "
        f"{'on' if workload.gradient_checkpointing else 'off'}",
        *[hears] * workload.trains_audio,
        "",
        f"{name_of_unit:<24}" + "".join(f"{phase:>22}" for phase in plan.phases),
    ]
    if workload.num_processes > 1:
        updated = f"updates at most {workload.num_stepped / 1e9:.2f} of {workload.num_trained / 1e9:.2f} B weights and "
        sent = f"sends {size(workload.sent_bytes)} an update"
        lines.insert(1, f"each of {workload.num_processes} processes {updated if workload.is_sharded else ''}{sent}")
    if workload.tensor_parallel > 1:
        lines.insert(1, f"each of {workload.tensor_parallel} processes has a part of every layer, embedding and head")
    names = list(dict.fromkeys(name for parts in plan.phases.values() for name in parts))
    for name in names:
        cells = [f"{parts[name] / unit:22.2f}" if parts.get(name) else f"{'-':>22}" for parts in plan.phases.values()]
        if any(parts.get(name) for parts in plan.phases.values()):
            lines.append(f"{name:<24}" + "".join(cells))
    lines.append(f"{'peak':<24}" + "".join(f"{peak / unit:22.2f}" for peak in plan.peaks.values()))
    tokens = plan.kv_cache // workload.kv_bytes_per_token
    lines += [
        "",
        f"KV cache: {size(plan.kv_cache)}, {tokens:,} tokens of {workload.kv_bytes_per_token / 1024:.0f} KiB; "
        f"{plan.sequences_in_flight} of {workload.rollout_batch_size} completions in flight at full length",
    ]
    verdict = "fits in" if plan.fits else "does not fit in"
    excess = int(max(plan.peaks.values()) - _USABLE * plan.device_bytes)
    too_much = f"; {size(excess)} too much" if excess > 0 else ""
    lines.append(f"{verdict} {size(plan.device_bytes)}, of which {_USABLE:.0%} are planned with{too_much}")
    if plan.fits:
        most = limits(plan)
        lines.append(
            f"each alone could grow to: a group of {most['group_size']} completions, {most['max_new_tokens']:,} new tokens, "
            f"prompts of {most['longest_prompt']:,} tokens"
        )
    else:
        lines += ["", "what would help:", *(f"  {line}" for line in remedies(plan))]
    return "\n".join(lines)
