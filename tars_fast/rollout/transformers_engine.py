"""Rollouts by the very module being trained, decoded token by token: one set of weights, nothing to hand over.

transformers' `generate` does the same, but makes its masks anew and copies its cache for every token, holds a prompt once for
each completion, and goes on with completions that have ended.

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
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, too_long
from tars_fast.types import Prompt

_ROOM = 64
"""New tokens that memory is taken for at a time: 1,024 of 64 completions would be 34 GB at 7B, and most end earlier."""
_FEWEST_RUNNING = 0.75
"""Share of a batch that has not ended; below it the others are dropped, which copies the keys and values of those that stay."""


class TransformersEngine(RolloutEngine):
    """Batches of completions; each distinct prompt is run once.

    Args:
        max_batch_size: completions in flight.
        apart: run modules of its own around the same weights, so that it can sample while the model trains.
    """

    name = "transformers"

    def __init__(self, model: SpeechModel, max_batch_size: int, *, apart: bool = False):
        self.prompt_format = model.prompts
        self._model = model
        self._max_batch_size = max_batch_size
        self._apart = apart

    def wake_up(self) -> None:
        """The weights are those of the model at any moment."""
        if self._apart:
            # Not earlier, because adapters come after the engine.
            self._model, self._apart = self._model.copy_sharing_weights(), False

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_sampled: Callable[[int, list[SampledCompletion]], None]
    ) -> None:
        generator = torch.Generator(self._model.device).manual_seed(sampling.seed)
        prompts_per_batch = max(1, self._max_batch_size // sampling.num_completions)
        # Prompts of like length share a batch: less padding to attend over.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
        for start in range(0, len(order), prompts_per_batch):
            chosen = order[start : start + prompts_per_batch]
            groups = [[_Growing() for _ in range(sampling.num_completions)] for _ in chosen]
            for place in self._draw_batch([prompts[index] for index in chosen], groups, sampling, generator):
                on_sampled(chosen[place], [one.sampled() for one in groups[place]])

    def _draw_batch(
        self, prompts: Sequence[Prompt], groups: list[list[_Growing]], sampling: Sampling, generator: torch.Generator
    ) -> Iterator[int]:
        """Write completions, one group a prompt; yields the number of each prompt when its group is complete."""
        model = self._model
        stop_tokens = set(model.prompts.stop_token_ids)
        key_values, hidden, positions = self._run_prompts(prompts, sampling)
        rows = list(range(len(prompts)))
        unfinished = set(rows)
        for tokens_left in reversed(range(sampling.max_new_tokens)):
            self.check_stopped()
            tokens, logprobs = self._sample(hidden, sampling.temperature, generator)
            for row, row_tokens, row_logprobs in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                for one, token, logprob in zip(groups[row], row_tokens, row_logprobs, strict=True):
                    if not one.ended:
                        one.token_ids.append(token)
                        one.logprobs.append(logprob)
                        one.ended = token in stop_tokens
            complete = {row for row in unfinished if not tokens_left or all(one.ended for one in groups[row])}
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
        """Keys and values, [R, N, D] states that predict the first tokens, [R, N] where those will stand."""
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

    def _sample(self, hidden: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """[R, N] tokens sampled from the full distribution, and their log-probability: NaN where a logit is NaN or infinite."""
        logits = self._model.head(hidden).float()
        logprobs = ((logits + self._model.suppressed_bias) / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            # By inversion, in double precision: torch.multinomial draws a random number for every word of the vocabulary.
            cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
            uniform = torch.rand(*hidden.shape[:-1], 1, dtype=torch.float64, device=hidden.device, generator=generator)
            # Below the last sum, so that it finds a token of some probability; not among NaNs, hence the clamp.
            tokens = torch.searchsorted(cumulated, uniform * cumulated[..., -1:], right=True).clamp_(max=logits.shape[-1] - 1)
        else:
            tokens = logprobs.argmax(-1, keepdim=True)
        flaws = (logits * 0).sum(-1)
        return tokens[..., 0], logprobs.gather(-1, tokens)[..., 0] + flaws

    def refusal(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """Why `sample` would not take a prompt."""
        return too_long(prompt, max_new_tokens, self._model.prompts.max_tokens)

    def release_memory(self) -> None:
        """Nothing to give back: keys and values go with their batch."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Growing:
    """A completion in the making."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    """By a stop token."""

    def sampled(self) -> SampledCompletion:
        return SampledCompletion(self.token_ids, self.logprobs, truncated=not self.ended)
