"""The training side of one step as other trainers arrange it, on the same model and rollout as `update_policy`.

- `released_step`: the released TARS code. Three passes over one padded row per completion: old log-probabilities, hidden states
  of all layers for R_rep, training; logits of the whole vocabulary at prompt and completion alike.
- `trl_step`: GRPOTrainer of TRL 1.x with vLLM's importance correction and `loss_type="dapo"`. A pass without gradient over the
  whole batch, as rewards and old log-probabilities precede the loss, then one with gradient; head at completion tokens only.
  Up to TRL 1.14 that head makes padded logits (`keep_logits`); from 1.15 on it is fused and leaves out what is masked.

The method is the right one in both, so gradients equal ours; only structure differs. In the baselines' favour: audio is
encoded already; padding is on the right, so that attention needs no mask, and reaches only to the longest row of a
micro-batch (TRL: of the batch, prompts on the left); the pass for hidden states makes no logits; a fused head is ours.

Shapes: N completions of the rollout, B of a micro-batch, S its width, C its longest completion, T its completion tokens,
V vocabulary, L layers, D hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from engine import timed
from tars_kernels import linear_logprob, pool_sequences, pooled_similarity
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import centred_advantages
from tars_fast.learning.batch import Rollout
from tars_fast.models.speech_model import SpeechModel
from tars_fast.types import Prompt

_ENTROPY_CHUNK = 128
"""Tokens whose distribution is held at a time, as in TRL's `entropy_from_logits`."""


@dataclass
class StepTimer:
    """Seconds by phase as `PhaseTimer` takes them; a phase that runs out of memory raises torch's own error."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return timed(self.seconds, name)


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch of completions, each behind a copy of its prompt."""

    prompts: list[Prompt]
    token_ids: Tensor
    """[B, S] int64."""
    predictors: Tensor
    """[B, C] places in the flattened B * S of the states that predict completion tokens; any place where there is none."""
    targets: Tensor
    """[B, C] int64."""
    mask: Tensor
    """[B, C] bool: a token of a completion that was not cut off."""
    positions: Tensor
    """[T] places of completion tokens in the flattened B * S."""
    cu_seqlens: Tensor
    """[B + 1] int64 boundaries of completions among the T packed tokens."""
    rollout_logprobs: Tensor
    """[B, C] fp32, 0 where there is no token."""


def pad_rows(model: SpeechModel, rollout: Rollout, rows: slice) -> PaddedBatch:
    prompts, completions = rollout.prompts[rows], rollout.completions[rows]
    starts_B = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions])
    width, longest = int((starts_B + lengths_B).max()), int(lengths_B.max())

    def padded(rows: list[tuple], value: float, width: int) -> Tensor:
        return torch.tensor([row + (value,) * (width - len(row)) for row in rows])

    both = [prompt.token_ids + completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)]
    held_BC = torch.arange(longest) < lengths_B[:, None]
    columns_BC = torch.where(held_BC, starts_B[:, None] + torch.arange(longest), 1)
    places_BC = torch.arange(len(prompts))[:, None] * width + columns_BC
    finished_B = torch.tensor([not completion.truncated for completion in completions])
    tensors = {
        "token_ids": padded(both, model.prompts.pad_token_id, width),
        "predictors": places_BC - 1,
        "targets": padded([completion.token_ids for completion in completions], 0, longest),
        "mask": held_BC & finished_B[:, None],
        "positions": places_BC[held_BC],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths_B.cumsum(0)]),
        "rollout_logprobs": padded([completion.rollout_logprobs for completion in completions], 0.0, longest),
    }
    return PaddedBatch(prompts, **{name: tensor.to(model.device) for name, tensor in tensors.items()})


def split_rollout(model: SpeechModel, rollout: Rollout, size: int) -> list[PaddedBatch]:
    num = len(rollout.completions)
    return [pad_rows(model, rollout, slice(start, min(start + size, num))) for start in range(0, num, size)]


def run_layers(model: SpeechModel, batch: PaddedBatch, *, hidden_states: bool = False) -> BaseModelOutputWithPast:
    """The decoder without its head."""
    width = batch.token_ids.shape[1]
    embeddings = model.embed_tokens(batch.token_ids, batch.prompts, range(0, batch.token_ids.numel(), width))
    layers = model.language_model.layers
    for layer in layers:
        layer.training = model.gradient_checkpointing and torch.is_grad_enabled()
    output = model.language_model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=hidden_states)
    for layer in layers:
        layer.training = False
    return output


def pool_layers(output: BaseModelOutputWithPast, batch: PaddedBatch) -> Tensor:
    """[L, B, D] mean over completion tokens of every layer's output; the embeddings are left out."""
    pooled = [
        pool_sequences(states.flatten(0, 1), batch.cu_seqlens, positions=batch.positions) for states in output.hidden_states[1:]
    ]
    return torch.stack(pooled)


def all_logprobs(model: SpeechModel, batch: PaddedBatch, temperature: float) -> Tensor:
    """[B, C] log-probabilities out of logits [B, S, V] at every position of the row."""
    logits = as_sampled(model.head(run_layers(model, batch).last_hidden_state), model, temperature)
    # Everything but the last position, which predicts nothing.
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.token_ids[:, 1:, None])[..., 0]
    width = batch.token_ids.shape[1]
    return logprobs.gather(1, batch.predictors % width)


def completion_logprobs(
    model: SpeechModel, states: Tensor, batch: PaddedBatch, temperature: float, *, keep_logits: bool, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """([B, C] log-probabilities, [B, C] entropies without gradient) as TRL takes them; 0, or arbitrary, where masked.

    Args:
        states: [B, S, D]
        keep_logits: make logits [B, C, V].
        entropy: only the training pass of TRL asks for it.
    """
    flat = states.flatten(0, 1)
    if not keep_logits:
        taken = linear_logprob(
            flat[batch.predictors[batch.mask]],
            model.head,
            batch.targets[batch.mask],
            bias=model.suppressed_bias,
            temperature=temperature,
            return_entropy=entropy,
        )
        unpacked = [
            torch.zeros(batch.mask.shape, device=flat.device).masked_scatter(batch.mask, values)
            for values in (taken if entropy else (taken,))
        ]
        return unpacked[0], unpacked[1] if entropy else None
    logits = as_sampled(model.head(flat[batch.predictors]), model, temperature)
    logprobs = selective_log_softmax(logits, batch.targets)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        chunks = logits.flatten(0, 1).split(_ENTROPY_CHUNK)
        return logprobs, torch.cat([torch.special.entr(chunk.softmax(-1)).sum(-1) for chunk in chunks]).view(batch.mask.shape)


def as_sampled(logits: Tensor, model: SpeechModel, temperature: float) -> Tensor:
    """Logits of the distribution that was sampled from, in place."""
    logits.add_(model.suppressed_bias)
    return logits if temperature == 1 else logits.div_(temperature)


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """As TRL does it: row by row, for a low peak; by log-sum-exp in fp32, by log-softmax, which is more stable, in bf16."""
    if logits.dtype == torch.float32:
        return logits.gather(-1, index[..., None])[..., 0] - torch.stack([row.logsumexp(-1) for row in logits])
    rows = zip(logits, index, strict=True)
    return torch.stack([row.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for row, targets in rows])


def rewards_and_advantages(rollout: Rollout, pooled_LND: Tensor, config: RunConfig) -> tuple[Tensor, Tensor]:
    """([N] rewards, [N] advantages) on the host (docs/method.md, Rewards and Advantages)."""
    pairs = [(row, reference) for row, reference in enumerate(rollout.references) if reference is not None]
    representation_N = torch.zeros(len(rollout.references))
    cosines = pooled_similarity(pooled_LND, torch.tensor(pairs, device=pooled_LND.device))
    representation_N[[row for row, _ in pairs]] = cosines.mean(-1).cpu()
    rewards_N = (
        rollout.completion_rewards["accuracy"]
        + 0.5 * rollout.completion_rewards["format"]
        + config.representation_weight * representation_N
    )
    rewards_N = rewards_N + config.behaviour_weight * rollout.late["behaviour"].of(range(len(rollout.completions)))
    return rewards_N, centred_advantages(rewards_N, rollout.groups_N)


def dapo_loss(
    logprobs: Tensor, old_logprobs: Tensor, batch: PaddedBatch, advantages_B: Tensor, num_tokens: int, config: RunConfig
) -> Tensor:
    """[] the part of the whole batch's loss that these tokens, [B, C], contribute."""
    importance = torch.exp((old_logprobs - batch.rollout_logprobs) * batch.mask).clamp(max=config.importance_cap)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.min(ratio * advantages_B[:, None], clipped * advantages_B[:, None]) * importance
    return (per_token * batch.mask).sum() / num_tokens


def apply_gradient(model: SpeechModel, optimizer: torch.optim.Optimizer, losses: list[Tensor], config: RunConfig) -> float:
    torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), config.max_grad_norm)
    optimizer.step()
    return torch.stack(losses).sum().item()


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a training step, the same for every contender."""

    model: SpeechModel
    optimizer: torch.optim.Optimizer
    rollout: Rollout
    config: RunConfig
    timer: StepTimer
    size: int
    """Completions in a micro-batch."""


def released_step(inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """([N] rewards, [N] advantages)."""
    model, optimizer, rollout = inputs.model, inputs.optimizer, inputs.rollout
    config, timer, size = inputs.config, inputs.timer, inputs.size
    optimizer.zero_grad(set_to_none=True)
    num_tokens = max(1, rollout.num_tokens)
    batches = split_rollout(model, rollout, size)
    with timer.phase("old_logprobs"), torch.no_grad():
        old = [all_logprobs(model, batch, config.temperature) for batch in batches]
    with timer.phase("hidden_states"), torch.no_grad():
        pooled = [pool_layers(run_layers(model, batch, hidden_states=True), batch) for batch in batches]
    with timer.phase("reward"):
        rewards_N, advantages_N = rewards_and_advantages(rollout, torch.cat(pooled, dim=1), config)
        advantages = advantages_N.to(model.device).split(size)
    losses: list[Tensor] = []
    for batch, old_logprobs, advantages_B in zip(batches, old, advantages, strict=True):
        with timer.phase("forward"):
            logprobs = all_logprobs(model, batch, config.temperature)
            loss = dapo_loss(logprobs, old_logprobs, batch, advantages_B, num_tokens, config)
        with timer.phase("backward"):
            loss.backward()
        losses.append(loss.detach())
        # Nothing of one micro-batch may be in memory beside the next one's.
        del logprobs, loss
    with timer.phase("optimiser"):
        apply_gradient(model, optimizer, losses, config)
    return rewards_N, advantages_N


def trl_step(
    inputs: StepInputs, *, keep_logits: bool = False, advantages_N: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """([N] rewards, [N] advantages).

    Args:
        keep_logits: see `completion_logprobs`.
        advantages_N: plain GRPO, one pass: no R_rep, and the training pass's own log-probabilities are the old ones.
    """
    model, optimizer, rollout = inputs.model, inputs.optimizer, inputs.rollout
    config, timer, size = inputs.config, inputs.timer, inputs.size
    optimizer.zero_grad(set_to_none=True)
    num_tokens = max(1, rollout.num_tokens)
    batches = split_rollout(model, rollout, size)
    rewards_N, old = None, [None] * len(batches)
    if advantages_N is None:
        pooled: list[Tensor] = []
        with timer.phase("old_logprobs"), torch.no_grad():
            for number, batch in enumerate(batches):
                output = run_layers(model, batch, hidden_states=True)
                pooled.append(pool_layers(output, batch))
                states = output.last_hidden_state
                del output
                old[number], _ = completion_logprobs(
                    model, states, batch, config.temperature, keep_logits=keep_logits, entropy=False
                )
                del states
        with timer.phase("reward"):
            rewards_N, advantages_N = rewards_and_advantages(rollout, torch.cat(pooled, dim=1), config)
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    for batch, old_logprobs, advantages_B in zip(batches, old, advantages_N.to(model.device).split(size), strict=True):
        with timer.phase("forward"):
            states = run_layers(model, batch).last_hidden_state
            logprobs, entropy = completion_logprobs(
                model, states, batch, config.temperature, keep_logits=keep_logits, entropy=True
            )
            del states
            old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
            loss = dapo_loss(logprobs, old_logprobs, batch, advantages_B, num_tokens, config)
        with timer.phase("backward"):
            loss.backward()
        losses.append(loss.detach())
        entropies.append((entropy * batch.mask).sum())
        del logprobs, entropy, loss
    with timer.phase("optimiser"):
        apply_gradient(model, optimizer, losses, config)
    return rewards_N, advantages_N
