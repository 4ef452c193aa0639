"""The losses of TRL, verl and Liger as their installed packages compute them, on padded batches, from log-probabilities.

TRL's `GRPOTrainer._compute_loss` runs on a stand-in for the trainer, and the lines that make importance weights are cut out of
the method that generates. verl cannot be imported without ray, so its functions are compiled from its source files.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tars_kernels import Objective
from torch import Tensor


class PaddedBatch(NamedTuple):
    """B completions, padded to S tokens."""

    logprobs: Tensor
    """[B, S], and so all but `advantages`."""
    entropies: Tensor
    mask: Tensor
    """Float."""
    advantages: Tensor
    """[B]"""
    old: Tensor
    rollout: Tensor
    ref: Tensor


def compiled(nodes: list[ast.stmt], known: dict[str, Any]) -> dict[str, Any]:
    """The names that these statements define."""
    module = ast.Module(body=nodes, type_ignores=[])
    names = dict(known)
    exec(compile(module, "peer", "exec", flags=__future__.annotations.compiler_flag), names)
    return names


# --- TRL

TRL_NAMES = {
    ("ppo", "sequence-mean"): "grpo", ("ppo", "token-mean"): "dapo", ("ppo", "constant"): "dr_grpo",
    ("ppo", "sequence-sum"): "luspo", ("cispo", "token-mean"): "cispo", ("sapo", "sequence-mean"): "sapo",
    ("vespo", "token-mean"): "vespo",
}  # fmt: skip
"""`loss_type` of its GRPOConfig for our loss and normaliser; Liger has the same."""


class _Accelerator:
    """Of one process."""

    num_processes, sync_gradients = 1, False

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, **_: object) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, **_: object) -> Tensor:
        return tensor


def trl_loss(batch: PaddedBatch, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    """Loss and logged metrics of TRL's trainer with the settings that an objective has there."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    loss, ratio_level, normalise = objective.formula
    trainer = SimpleNamespace(
        loss_type="bnpo" if objective.loss_type == "bnpo" else TRL_NAMES[loss, normalise],
        importance_sampling_level=ratio_level,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.high,
        beta=objective.kl_coef,
        entropy_coef=objective.entropy_coef,
        top_entropy_quantile=objective.top_entropy_quantile,
        off_policy_mask_threshold=objective.off_policy_threshold,
        max_completion_length=batch.mask.shape[1],
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{objective.importance_level}_{objective.importance_mode}",
        vllm_importance_sampling_clip_max=objective.importance_cap,
        vllm_importance_sampling_clip_min=objective.importance_floor,
        args=SimpleNamespace(
            use_bias_correction_kl=objective.kl_bias_correction,
            delta=objective.dual_clip,
            sapo_temperature_pos=objective.sapo_temperatures[0],
            sapo_temperature_neg=objective.sapo_temperatures[1],
            vespo_k_pos=objective.vespo_positive[0],
            vespo_lambda_pos=objective.vespo_positive[1],
            vespo_k_neg=objective.vespo_negative[0],
            vespo_lambda_neg=objective.vespo_negative[1],
            steps_per_generation=1,
        ),
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=objective.entropy_coef != 0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    tokens = torch.zeros_like(batch.mask, dtype=torch.int64)
    num_items = batch.mask.sum() if objective.num_tokens is None else torch.tensor(float(objective.num_tokens))
    inputs = {
        "prompt_ids": tokens[:, :1], "prompt_mask": tokens[:, :1], "completion_ids": tokens, "completion_mask": batch.mask,
        "advantages": batch.advantages, "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref,
        "sampling_per_token_logps": batch.rollout, "num_items_in_batch": num_items,
        "importance_sampling_ratio": trl_importance(trainer, batch),
    }  # fmt: skip
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    return value, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_importance(trainer: SimpleNamespace, batch: PaddedBatch) -> Tensor:
    """Importance weights by the lines of TRL's `_generate_and_score_completions`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    (block,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and "vllm_importance_sampling_ratio = torch.exp" in ast.unparse(node.body)
        and "generate_every" not in ast.unparse(node)
    )  # fmt: skip
    names = {
        "self": trainer, "torch": torch, "math": math, "completion_mask": batch.mask, "tool_mask": None,
        "old_per_token_logps": batch.old, "sampling_per_token_logps": batch.rollout,
    }  # fmt: skip
    return compiled([block], names)["vllm_importance_sampling_ratio"]


# --- verl

VERL_LOSSES = {
    "ppo": "vanilla", "cispo": "cispo", "sapo": "sapo", "dppo-tv": "dppo_tv", "dppo-kl": "dppo_kl", "gmpo": "geo_mean",
    "reinforce": "reinforce",
}  # fmt: skip
VERL_AGGREGATION = {
    "token-mean": "token-mean", "sequence-mean": "seq-mean-token-mean", "sequence-sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}  # fmt: skip
"""`loss_agg_mode` of its actor."""


def verl_functions() -> SimpleNamespace:
    """Its loss functions, and those they call."""

    def functions(path: str, wanted: Callable[[str], bool], **known: Any) -> dict[str, Any]:
        (folder,) = find_spec("verl").submodule_search_locations
        nodes = [
            node
            for node in ast.parse((Path(folder) / path).read_text()).body
            if isinstance(node, ast.FunctionDef) and wanted(node.name)
        ]
        for node in nodes:
            node.decorator_list = []
        return compiled(nodes, {"torch": torch, **known})

    helpers = SimpleNamespace(**functions("utils/torch_functional.py", lambda name: name in ("masked_sum", "masked_mean")))
    losses = functions(
        "trainer/ppo/core_algos.py",
        lambda name: name.startswith(("compute_policy_loss_", "kl_penalty")) or name == "agg_loss",
        verl_F=helpers, ActorConfig=_ActorConfig, AlgoConfig=type(None),
    )  # fmt: skip
    weights = functions(
        "trainer/ppo/rollout_corr_helper.py",
        lambda name: name in ("_parse_rollout_is_threshold", "compute_rollout_correction_weights"),
        verl_F=helpers, SAFETY_BOUND=20.0, compute_is_metrics=lambda **_: {},
    )  # fmt: skip
    return SimpleNamespace(**losses, importance=weights["compute_rollout_correction_weights"])


class _ActorConfig(SimpleNamespace):
    """What a loss function reads of verl's actor settings."""

    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


def verl_loss(batch: PaddedBatch, objective: Objective) -> Tensor:
    """The loss that verl's actor takes a gradient of."""
    verl = verl_functions()
    loss, ratio_level, normalise = objective.formula
    rows, longest = batch.mask.shape
    low = objective.clip_low if loss != "cispo" else 1 - objective.cispo_low
    config = _ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=low,
        clip_ratio_high=objective.high - (loss == "cispo"),
        clip_ratio_c=objective.dual_clip or 1e30,
        tau_pos=objective.sapo_temperatures[0],
        tau_neg=objective.sapo_temperatures[1],
        global_batch_info={
            "batch_num_tokens": objective.num_tokens if normalise == "token-mean" else None,
            "global_batch_size": objective.num_sequences or rows,
            "loss_scale_factor": longest,
        },
    )
    threshold = objective.importance_cap
    if objective.importance_mode == "mask":
        threshold = f"{objective.importance_floor}_{objective.importance_cap}"
    weights, _ = verl.importance(
        (batch.old - batch.rollout).nan_to_num(nan=0.0), batch.mask, objective.importance_level, threshold
    )
    mode = VERL_AGGREGATION[normalise]
    name = "gspo" if ratio_level == "sequence-token" else VERL_LOSSES[loss]
    advantages = batch.advantages[:, None].expand_as(batch.mask)
    value, _ = getattr(verl, f"compute_policy_loss_{name}")(
        batch.old, batch.logprobs, advantages, batch.mask, mode, config, weights
    )
    if objective.kl_coef:
        kl = verl.kl_penalty(batch.logprobs, batch.ref, objective.kl_estimator)
        value = value + objective.kl_coef * verl.agg_loss(kl, batch.mask, mode, **config.global_batch_info)
    return value


# --- Liger


def liger_loss(batch: PaddedBatch, objective: Objective) -> Tensor:
    """The loss of `LigerFusedLinearGRPOLoss` from the log-probabilities that it computes first."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    loss, ratio_level, normalise = objective.formula
    weights = trl_importance(
        SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=f"{objective.importance_level}_{objective.importance_mode}",
            vllm_importance_sampling_clip_max=objective.importance_cap,
            vllm_importance_sampling_clip_min=objective.importance_floor,
        ),
        batch,
    )
    value, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        batch.logprobs,
        batch.mask,
        batch.advantages,
        batch.mask,
        ref_per_token_logps=batch.ref,
        old_per_token_logps=batch.old,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.high,
        beta=objective.kl_coef,
        loss_type=TRL_NAMES[loss, normalise],
        max_completion_length=batch.mask.shape[1],
        importance_sampling_level=ratio_level,
        sapo_temperature_pos=objective.sapo_temperatures[0],
        sapo_temperature_neg=objective.sapo_temperatures[1],
        vllm_is_ratio=weights,
        delta=objective.dual_clip,
        use_bias_correction_kl=objective.kl_bias_correction,
        vespo_k_pos=objective.vespo_positive[0],
        vespo_lambda_pos=objective.vespo_positive[1],
        vespo_k_neg=objective.vespo_negative[0],
        vespo_lambda_neg=objective.vespo_negative[1],
        num_items_in_batch=batch.mask.sum() if objective.num_tokens is None else torch.tensor(float(objective.num_tokens)),
    )
    return value
