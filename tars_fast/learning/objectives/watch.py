"""Looks whether written answers stay what they were while spoken ones are trained: distillation has nothing else to hold them.

Shapes: T completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.data.splits import choose_by_id
from tars_fast.learning.objectives.policy_gradient import logprobs_of
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.types import Completion, Modality, Prompt, Question

NUM_WATCHED = 16
"""Written prompts looked at, with one completion each."""
_PASS = 4
"""Completions in one forward pass, so that memory does not grow with their number."""


@dataclass(frozen=True)
class WrittenWatch:
    """Completions of written prompts by the model before training, and how likely it found their tokens."""

    prompts: list[Prompt]
    completions: list[Completion]
    """One of each prompt."""
    logprobs_T: Tensor
    """Of their tokens under the model before training, in nats, on the CPU."""

    @classmethod
    def begin(cls, model: SpeechModel, engine: RolloutEngine, questions: Sequence[Question], config: RunConfig) -> WrittenWatch:
        """Sample the completions from the model as it is, behind the written prompts of `NUM_WATCHED` of these questions."""
        chosen = choose_by_id(questions, NUM_WATCHED)
        prompts = model.encode_prompts(chosen, Modality.TEXT)
        sampling = Sampling(1, config.max_new_tokens, config.temperature, config.seed)
        completions = engine.generate(prompts, list(range(len(prompts))), sampling)
        engine.release_memory()
        return cls(prompts, completions, _logprobs(model, prompts, completions, config.temperature))

    def divergence(self, model: SpeechModel, temperature: float) -> float:
        """KL(model before training || model now) in nats a token, estimated from these completions.

        By `exp(d) - 1 - d`, d the change of a token's log-probability, which is never negative (arXiv 2009.01325's k3).
        """
        change_T = (_logprobs(model, self.prompts, self.completions, temperature) - self.logprobs_T).double()
        return (change_T.exp() - 1 - change_T).mean().item()

    def state(self) -> dict[str, object]:
        """What a checkpoint holds of it."""
        return {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "completions": [list(completion.token_ids) for completion in self.completions],
            "logprobs": self.logprobs_T,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> WrittenWatch:
        """Raises LookupError or TypeError where `state` is something else."""
        prompts = [Prompt(Modality.TEXT, tuple(token_ids)) for token_ids in state["prompts"]]
        completions = [
            Completion(number, Modality.TEXT, tuple(token_ids), (), "", truncated=False)
            for number, token_ids in enumerate(state["completions"])
        ]
        return cls(prompts, completions, state["logprobs"])


@torch.no_grad()
def _logprobs(model: SpeechModel, prompts: Sequence[Prompt], completions: Sequence[Completion], temperature: float) -> Tensor:
    parts = []
    for start in range(0, len(prompts), _PASS):
        packed = model.pack(prompts[start : start + _PASS], completions[start : start + _PASS])
        parts.append(logprobs_of(model, model.forward(packed), packed, temperature)[0].cpu())
    return torch.cat(parts)
