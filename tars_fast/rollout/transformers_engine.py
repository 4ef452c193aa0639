"""Rollouts by the module that is being trained, decoded token by token.

It takes the place of transformers' `generate`, which makes its masks again and copies its cache for every token, keeps the keys
and values of a prompt once for each completion, and goes on computing for completions that have ended.

Shapes: R prompts, N completions of each, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tars_fast.models.key_values import CompletionKeyValues, PromptKeyValues
from tars_fast.models.memory import PREFILL_TOKENS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, length_refusal
from tars_fast.types import Prompt

_ROOM = 64
"""New tokens of a completion that memory is taken for at a time: 1,024 of 64 completions would be 34 GB at 7B, and most end
earlier."""
_FEWEST_RUNNING = 0.75
"""Completed prompts leave a batch when fewer than this share of its prompts remain: it copies the others' keys and values."""


class TransformersEngine(RolloutEngine):
    """Samples in batches; each prompt goes through the model once, however many completions it gets.

    Args:
        max_batch_size: completions in flight.
        own_modules: sample with modules of its own that share the model's weights, so that another thread can train meanwhile.
    """

    name = "transformers"

    def __init__(self, model: SpeechModel, max_batch_size: int, *, own_modules: bool = False):
        self.prompt_format = model.prompts
        self._model = model
        self._max_batch_size = max_batch_size
        self._needs_own_modules = own_modules

    def wake_up(self) -> None:
        """See `RolloutEngine.wake_up`; the weights are the model's own, so there are none to take."""
        if self._needs_own_modules:
            # Not in `__init__`, because adapters are added to the model after the engine was made.
            self._model, self._needs_own_modules = self._model.copy_sharing_weights(), False

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_sampled: Callable[[int, list[SampledCompletion]], None]
    ) -> None:
        """See `RolloutEngine.sample`."""
        generator = torch.Generator(self._model.device).manual_seed(sampling.seed)
        prompts_per_batch = max(1, self._max_batch_size // sampling.num_completions)
        # Prompts of similar length share a batch, which leaves less padding to attend over.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
        for start in range(0, len(order), prompts_per_batch):
            chosen = order[start : start + prompts_per_batch]
            groups = [[_RunningCompletion() for _ in range(sampling.num_completions)] for _ in chosen]
            for place in self._sample_batch([prompts[index] for index in chosen], groups, sampling, generator):
                on_sampled(chosen[place], [completion.sampled() for completion in groups[place]])

    def _sample_batch(
        self, prompts: Sequence[Prompt], groups: list[list[_RunningCompletion]], sampling: Sampling, generator: torch.Generator
    ) -> Iterator[int]:
        """Fill `groups`, the completions of each prompt; yields a prompt's place when its completions have ended."""
        model = self._model
        stop_tokens = set(model.prompts.stop_token_ids)
        key_values, hidden, positions = self._run_prompts(prompts, sampling)
        rows = list(range(len(prompts)))
        unfinished = set(rows)
        for tokens_left in reversed(range(sampling.max_new_tokens)):
            self.check_stopped()
            tokens, logprobs = self._sample_tokens(hidden, sampling.temperature, generator)
            for row, row_tokens, row_logprobs in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                for completion, token, logprob in zip(groups[row], row_tokens, row_logprobs, strict=True):
                    if not completion.ended:
                        completion.token_ids.append(token)
                        completion.logprobs.append(logprob)
                        completion.ended = token in stop_tokens
            complete = {row for row in unfinished if not tokens_left or all(running.ended for running in groups[row])}
            yield from sorted(complete)
            unfinished -= complete
            if not unfinished:
                return
            if len(unfinished) < _FEWEST_RUNNING * len(rows):
                kept = torch.tensor([place for place, row in enumerate(rows) if row in unfinished], device=model.device)
                rows = [row for row in rows if row in unfinished]
                tokens, positions = tokens[kept], positions[kept]
                key_values.select(kept)
            key_values.grow()
            inputs = model.module.get_input_embeddings()(tokens)
            hidden = model.run_decoder(inputs, positions, key_values=key_values)
            positions = positions + 1

    def _run_prompts(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[CompletionKeyValues, Tensor, Tensor]:
        """(keys and values, [R, N, D] states that predict the first tokens, [R, N] positions of those tokens)."""
        model, copies = self._model, sampling.num_completions
        prompt_keys = PromptKeyValues([len(prompt.token_ids) for prompt in prompts])
        last_states = []
        for numbers in prompt_keys.passes(PREFILL_TOKENS):
            chosen = [prompts[number] for number in numbers]
            ends = torch.tensor([len(prompt.token_ids) for prompt in chosen]).cumsum(0)
            token_ids = torch.tensor([[token for prompt in chosen for token in prompt.token_ids]], device=model.device)
            positions = torch.cat([torch.arange(len(prompt.token_ids)) for prompt in chosen])[None].to(model.device)
            inputs = model.embed_tokens(token_ids, chosen, [0, *ends[:-1].tolist()])
            states = model.run_decoder(inputs, positions, key_values=prompt_keys)[0]
            last_states.append(states[ends.to(model.device) - 1])
        first_places = torch.tensor(prompt_keys.lengths, device=model.device)[:, None].repeat(1, copies)
        hidden = torch.cat(last_states)[:, None].repeat(1, copies, 1)
        return CompletionKeyValues(prompt_keys, copies, min(_ROOM, sampling.max_new_tokens)), hidden, first_places

    def _sample_tokens(self, hidden: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """([R, N] tokens from the full distribution, [R, N] their log-probabilities, NaN where a logit is not finite)."""
        logits = self._model.head(hidden).float()
        logprobs = ((logits + self._model.suppressed_bias) / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            # By inversion of the cumulated distribution, in double precision. torch.multinomial would need a random number for
            # every token of the vocabulary.
            cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
            uniform = torch.rand(*hidden.shape[:-1], 1, dtype=torch.float64, device=hidden.device, generator=generator)
            # The number is below the last sum, so that the token found has some probability; among NaNs none is found: clamp.
            tokens = torch.searchsorted(cumulated, uniform * cumulated[..., -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        else:
            tokens = logprobs.argmax(-1, keepdim=True)
        # 0, or NaN where a logit is not finite.
        not_finite = (logits * 0).sum(-1)
        return tokens[..., 0], logprobs.gather(-1, tokens)[..., 0] + not_finite

    def refusal(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """See `RolloutEngine.refusal`."""
        return length_refusal(prompt, max_new_tokens, self._model.prompts.max_tokens)

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`; keys and values are freed with each batch already."""

    def close(self) -> None:
        """See `RolloutEngine.close`; there is nothing to end."""


@dataclass
class _RunningCompletion:
    """A completion while it is being sampled."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    """By a stop token."""

    def sampled(self) -> SampledCompletion:
        return SampledCompletion(self.token_ids, self.logprobs, truncated=not self.ended)
