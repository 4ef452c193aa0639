"""The interface of a rollout engine: prompts in, completions with the log-probabilities they were sampled at out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tars_fast.models.families.base import Family
from tars_fast.models.memory import ENGINE_LORA_RANKS
from tars_fast.models.prompts import PromptFormat
from tars_fast.types import Completion, Prompt, TrainingError


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: from the full distribution, no top-k, no top-p."""

    num_completions: int
    """Of each prompt."""
    max_new_tokens: int
    temperature: float
    """0 takes the most likely token."""
    seed: int


@dataclass(frozen=True)
class SampledCompletion:
    """One continuation of a prompt, as an engine returns it."""

    token_ids: Sequence[int]
    """The stop token is included where one was produced."""
    logprobs: Sequence[float]
    """Of each token, in nats, under the distribution it was sampled from."""
    truncated: bool
    """No stop token within `max_new_tokens`."""
    routed_experts: Tensor | None = None
    """See `Completion.routed_experts`."""


class RolloutEngine(ABC):
    """Samples completions from the policy that is being trained."""

    name: str
    prompt_format: PromptFormat
    _stopped = False

    @abstractmethod
    def wake_up(self) -> None:
        """Make ready for one `sample`: take the memory that it needs, and the weights as they are now."""

    @abstractmethod
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_sampled: Callable[[int, list[SampledCompletion]], None]
    ) -> None:
        """Sample `sampling.num_completions` continuations of each prompt; call `wake_up` before each call.

        Args:
            prompts: spoken and written ones alike.
            on_sampled: called with a prompt's number and its continuations as soon as all of them are complete, while those of
                other prompts are still being sampled.

        Raises:
            ValueError: a prompt that `refusal` gives a reason for.
            TrainingError: `stop` was called.
        """

    def generate(self, prompts: Sequence[Prompt], questions: Sequence[int], sampling: Sampling) -> list[Completion]:
        """`sampling.num_completions` completions of each prompt, in prompt order, from the weights as they are now.

        Args:
            questions: for each prompt, the `Completion.question` of its completions.

        Raises:
            ValueError: see `sample`.
            TrainingError: a log-probability was not finite.
        """
        self.wake_up()
        sampled: dict[int, list[SampledCompletion]] = {}
        self.sample(prompts, sampling, sampled.__setitem__)
        return [
            completion
            for number, prompt in enumerate(prompts)
            for completion in decode_completions(self.prompt_format, prompt, questions[number], sampled[number])
        ]

    @abstractmethod
    def refusal(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """Why `sample` cannot take this prompt; None where it can."""

    @abstractmethod
    def release_memory(self) -> None:
        """Give back what only sampling needs (the KV cache) until the next `wake_up`."""

    def stop(self) -> None:
        """Make a `sample` that runs in another thread raise TrainingError at its next token, and every later one too."""
        self._stopped = True

    def check_stopped(self) -> None:
        """Raises TrainingError after `stop`."""
        if self._stopped:
            raise TrainingError("sampling was stopped")

    @abstractmethod
    def close(self) -> None:
        """End the engine."""


def length_refusal(prompt: Prompt, max_new_tokens: int, max_tokens: int) -> str | None:
    """Why prompt and completion together are too long; None where they are not."""
    if len(prompt.token_ids) + max_new_tokens <= max_tokens:
        return None
    return f"{len(prompt.token_ids)} tokens and {max_new_tokens} new ones are more than the engine's {max_tokens}"


def decode_completions(
    prompt_format: PromptFormat, prompt: Prompt, question: int, sampled: Sequence[SampledCompletion]
) -> list[Completion]:
    """The continuations of a prompt with their text.

    Args:
        question: the `Completion.question` of all of them.

    Raises:
        TrainingError: a log-probability is NaN or infinite.
    """
    if not all(math.isfinite(logprob) for completion in sampled for logprob in completion.logprobs):
        raise TrainingError(
            "the policy's logits are not finite; lower --learning-rate; the last checkpoint, if there is one, is good"
        )
    # Special tokens other than the stop token stay visible: a completion that holds one has not kept to the format.
    texts = prompt_format.tokenizer.batch_decode(
        [list(completion.token_ids if completion.truncated else completion.token_ids[:-1]) for completion in sampled],
        skip_special_tokens=False,
    )
    return [
        Completion(
            question=question,
            modality=prompt.modality,
            token_ids=tuple(completion.token_ids),
            rollout_logprobs=tuple(completion.logprobs),
            text=text,
            truncated=completion.truncated,
            routed_experts=completion.routed_experts,
        )
        for completion, text in zip(sampled, texts, strict=True)
    ]


def engine_refusal(family: Family, lora_rank: int, *, float32: bool, on_cuda: bool) -> str | None:
    """Why no vLLM can serve a policy, with the remedy; None where it can. `vllm_refusal` also looks at what is installed."""
    if family.engine_names is None:
        return f"{family.engine_refusal}; use --engine transformers"
    if lora_rank > ENGINE_LORA_RANKS[-1]:
        limit = ENGINE_LORA_RANKS[-1]
        return f"its adapters have a rank of at most {limit}; train with a lower --lora-rank or use --engine transformers"
    if lora_rank and float32 and on_cuda:
        return "its CUDA kernels for adapters take no float32; use --dtype bfloat16 or --engine transformers"
    return None
