"""TRL's GRPOTrainer with the log-probabilities of `linear_logprob`: everything after them stays TRL's own."""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tars_kernels import linear_logprob
from tars_kernels.checks import head_parameters

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def patch_grpo_trainer(trainer: Any) -> None:
    """Let a `trl.GRPOTrainer` (1.16) take log-probabilities and entropies from `linear_logprob`, before `train()` is called.

    The policy's forward, and that of the reference model, answer `fused_lm_head=True` as TRL's own fused head does: losses,
    metrics and settings stay those of the trainer. Completion tokens alone meet the head, packed; with a frozen head, as LoRA
    leaves it, the backward pass multiplies nothing with it.

    Raises:
        ValueError: the head carries an adapter, its logits are scaled or capped, routers have a loss, or DeepSpeed holds it in
            parts.
    """
    if trainer.aux_loss_enabled:
        raise ValueError("trainer: its model has a router loss, which needs TRL's own head; leave the trainer as it is")
    if trainer.is_deepspeed_enabled:
        raise ValueError("trainer: DeepSpeed holds the head in parts, which needs TRL's own head; leave the trainer as it is")
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            _replace_fused_head(model, trainer.temperature, trainer.args.cast_lm_head_to_fp32, trainer._entropy_bonus_enabled)


def _replace_fused_head(model: nn.Module, temperature: float, in_fp32: bool, entropy_gradient: bool) -> None:
    from trl.trainer.utils import FusedCausalLMOutput

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = base.config.get_text_config()
    for name in ("final_logit_softcapping", *_SCALES):
        value = getattr(config, name, None)
        if value not in (None, 1.0):
            raise ValueError(f"trainer: {name} is {value}, which needs TRL's own head; leave the trainer as it is")
    head_parameters(base.get_output_embeddings(), None)
    with_logits = base.forward

    def logprobs_and_entropies(head: nn.Module, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = head_parameters(head, None)
        device = states.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        dtype = torch.float32 if in_fp32 else autocast
        result = linear_logprob(
            states.to(dtype), weight.to(dtype), targets, bias=bias, temperature=temperature, return_entropy=True,
            entropy_gradient=entropy_gradient,
        )  # fmt: skip
        logprobs, entropies = result
        return logprobs, entropies

    # The signature of the original, which `generate` looks at.
    @wraps(with_logits)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return with_logits(*args, **kwargs if labels is None else {**kwargs, "labels": labels})
        assert labels is not None, "TRL gives them with fused_lm_head"
        states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        vectors = logprobs_and_entropies(self.get_output_embeddings(), states[mask], targets[mask])
        # Scattered, not written by index: a batch without a label still leads back to the model.
        logprobs, entropies = (vector.new_zeros(mask.shape).masked_scatter(mask, vector) for vector in vectors)
        return FusedCausalLMOutput(log_probs=logprobs, entropy=entropies, label_mask=mask)

    base.forward = MethodType(forward, base)
