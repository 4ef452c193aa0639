"""Rollouts by transformers' `generate` with the very module being trained: one set of weights, nothing to hand over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tars_fast.models import SpeechModel
from tars_fast.sampling import Drawn, RolloutEngine, Sampling, too_long
from tars_fast.types import Prompt


class _SampledLogprobs:
    """A logits processor that suppresses tokens and keeps the log-probability of each sampled token.

    Keeps one step's distribution instead of all steps' (`output_scores`), which at 1,024 tokens and a vocabulary of 156,032
    would be 40 GB for 64 completions. A processor sees a token one step after it was drawn, hence `finish`.
    """

    def __init__(self, suppressed_bias: Tensor, temperature: float):
        self._bias = suppressed_bias
        self._temperature = temperature
        self._pending: Tensor | None = None
        self._logprobs: list[Tensor] = []
        self._all_finite = torch.ones((), dtype=torch.bool, device=suppressed_bias.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._pending is not None:
            self._record(self._pending, input_ids[:, -1])
        # Looked at once at the end: a check a token would wait for the device a token.
        self._all_finite &= scores.isfinite().all()
        scores = scores.float().nan_to_num() + self._bias
        self._pending = (scores / self._temperature).log_softmax(-1)
        return scores

    def _record(self, distribution: Tensor, tokens: Tensor) -> None:
        self._logprobs.append(distribution.gather(-1, tokens[:, None])[:, 0])

    def finish(self, last_tokens: Tensor) -> Tensor:
        """[N, C] log-probability of each generated token, NaN throughout where a logit was NaN or infinite."""
        if self._pending is not None:
            self._record(self._pending, last_tokens)
        logprobs = torch.stack(self._logprobs, dim=1)
        return logprobs.where(self._all_finite, torch.nan)


class TransformersEngine(RolloutEngine):
    """Batched `generate`; each distinct prompt is prefilled once.

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
            self._model, self._apart = self._model.twin(), False

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Prompt], sampling: Sampling, on_drawn: Callable[[int, list[Drawn]], None]) -> None:
        torch.manual_seed(sampling.seed)
        prompts_per_batch = max(1, self._max_batch_size // sampling.num_completions)
        # Prompts of like length share a batch: less padding to attend over.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
        for start in range(0, len(order), prompts_per_batch):
            chosen = order[start : start + prompts_per_batch]
            drawn = self._draw_batch([prompts[index] for index in chosen], sampling)
            for place, index in enumerate(chosen):
                on_drawn(index, drawn[place * sampling.num_completions : (place + 1) * sampling.num_completions])

    def _draw_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Drawn]:
        from transformers import DynamicCache, LogitsProcessorList

        model = self._model
        width = max(len(prompt.token_ids) for prompt in prompts)
        starts = [width - len(prompt.token_ids) for prompt in prompts]
        token_ids = torch.full((len(prompts), width), model.prompts.pad_token_id)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            token_ids[row, start:] = torch.tensor(prompt.token_ids)
        token_ids = token_ids.to(model.device)
        attention_mask = (torch.arange(width) >= torch.tensor(starts)[:, None]).long().to(model.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        places = [row * width + start for row, start in enumerate(starts)]

        # All but the last prompt token are run once a prompt; `generate` continues from the repeated cache.
        cache = DynamicCache(config=model.language_model.config)
        model.language_model(
            inputs_embeds=model.embed_tokens(token_ids, prompts, places)[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=position_ids[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(sampling.num_completions)
        recorder = _SampledLogprobs(model.suppressed_bias, sampling.temperature or 1.0)
        with _bare_generation_config(model, sampling):
            output = model.module.generate(
                stopping_criteria=[self._continue],
                input_ids=token_ids.repeat_interleave(sampling.num_completions, 0),
                attention_mask=attention_mask.repeat_interleave(sampling.num_completions, 0),
                position_ids=position_ids.repeat_interleave(sampling.num_completions, 0),
                past_key_values=cache,
                logits_processor=LogitsProcessorList([recorder]),
            )
        generated = output[:, width:]
        logprobs = recorder.finish(generated[:, -1])
        is_stop = torch.isin(generated, torch.tensor(model.prompts.stop_token_ids, device=generated.device))
        stops = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, generated.shape[1]).tolist()
        finished = is_stop.any(1).tolist()
        rows = zip(generated.tolist(), logprobs.tolist(), stops, finished, strict=True)
        return [Drawn(tokens[:stop], row_logprobs[:stop], truncated=not done) for tokens, row_logprobs, stop, done in rows]

    def _continue(self, input_ids: Tensor, _scores: object, **_settings: object) -> Tensor:
        """Asked by `generate` after every token whether to end a sequence."""
        self.check_stopped()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def refuses(self, prompt: Prompt, max_new_tokens: int) -> str | None:
        """Why `draw` would not take a prompt."""
        return too_long(prompt, max_new_tokens, self._model.prompts.max_tokens)

    def release_memory(self) -> None:
        """Nothing to give back: the cache of a batch goes with the batch."""

    def close(self) -> None:
        """Nothing to end."""


@contextmanager
def _bare_generation_config(model: SpeechModel, sampling: Sampling) -> Iterator[None]:
    """For the length of the block nothing shapes the distribution but the temperature.

    `generate` fills what a call leaves open from the checkpoint's own settings (Qwen2-Audio's repetition penalty, top-k and
    top-p among them), and would then sample from another policy than the one being trained.
    """
    from transformers import GenerationConfig

    decoding = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    original = model.module.generation_config
    model.module.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=model.prompts.stop_token_ids,
        pad_token_id=model.prompts.pad_token_id,
        **(decoding if sampling.temperature else {"do_sample": False}),
    )
    try:
        yield
    finally:
        model.module.generation_config = original
