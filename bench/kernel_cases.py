"""Operations of `tars_kernels` beside their peers, as functions of the same inputs.

Every operation is a dict from a contender's name to a function of an `Inputs` that returns a scalar to differentiate. Peers
that are not installed are left out. Shapes: T tokens in N completions, D hidden size, V vocabulary, L layers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import tars_kernels
import torch
from tars_kernels import reference
from torch import Tensor

OURS = "tars_kernels" if torch.cuda.is_available() else "tars_kernels.reference"
"""Without a GPU no kernel runs."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark."""

    num_tokens: int
    completion_length: int
    width: int
    vocabulary: int
    num_layers: int

    def __str__(self) -> str:
        return f"T{self.num_tokens}-C{self.completion_length}-D{self.width}-V{self.vocabulary}-L{self.num_layers}"


ON_GPU = [Shape(tokens, length, 4096, 156032, 33) for tokens, length in ((1024, 128), (4096, 512), (16384, 1024))]
"""Qwen2-Audio-7B: embeddings and 32 layers of width 4096."""
ON_CPU = [Shape(1024, 128, 256, 4000, 5)]
"""So many tokens that what a call costs whatever its size, 0.4 ms, is little of it."""


class Inputs:
    """Random inputs of one shape, made when an operation first asks for them."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def _normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.device, dtype=dtype or self.dtype)

    @cached_property
    def logits(self) -> Tensor:
        return self._normal(self.shape.num_tokens, self.shape.vocabulary).requires_grad_()

    @cached_property
    def logits_and_one(self) -> Tensor:
        """[N, S + 1, V] the same for Liger, which drops the last position of every sequence."""
        size = (-1, self.shape.completion_length, self.shape.vocabulary)
        return torch.nn.functional.pad(self.logits.detach().view(size), (0, 0, 0, 1)).requires_grad_()

    @cached_property
    def hidden(self) -> Tensor:
        return self._normal(self.shape.num_tokens, self.shape.width).requires_grad_()

    @cached_property
    def teacher_hidden(self) -> Tensor:
        """As far from the student's as an answer under another prompt may be."""
        return self.hidden.detach() + self._normal(self.shape.num_tokens, self.shape.width) / 2

    @cached_property
    def weight(self) -> Tensor:
        return self._normal(self.shape.vocabulary, self.shape.width) / self.shape.width**0.5

    @cached_property
    def targets(self) -> Tensor:
        size = (self.shape.num_tokens,)
        return torch.randint(0, self.shape.vocabulary, size, generator=self._generator, device=self.device)

    @cached_property
    def advantages(self) -> Tensor:
        """[N]"""
        return self._normal(self.shape.num_tokens // self.shape.completion_length, dtype=torch.float32)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return torch.arange(0, self.shape.num_tokens + 1, self.shape.completion_length, device=self.device)

    @cached_property
    def old_logprobs(self) -> Tensor:
        """[T] near what an untrained head gives, so that clips are at work."""
        logprobs = torch.full((self.shape.num_tokens,), -torch.log(torch.tensor(float(self.shape.vocabulary))).item())
        return logprobs.to(self.device) - 0.5 + self._normal(self.shape.num_tokens, dtype=torch.float32)

    @cached_property
    def layers(self) -> list[Tensor]:
        return [self._normal(self.shape.num_tokens, self.shape.width).requires_grad_() for _ in range(self.shape.num_layers)]

    @cached_property
    def pairs(self) -> Tensor:
        """[P, 2]: every completion of the first half with one of the second."""
        half = max(1, (self.shape.num_tokens // self.shape.completion_length) // 2)
        return torch.stack([torch.arange(half), torch.arange(half) + half], dim=1).to(self.device)

    @cached_property
    def padded(self) -> dict[str, Tensor]:
        """What peers on [N, S] want."""
        rows = (-1, self.shape.completion_length)
        return {
            "targets": self.targets.view(rows),
            "old": self.old_logprobs.view(rows),
            "mask": torch.ones_like(self.old_logprobs).view(rows),
        }


def eager_loss_from(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """The clipped loss as TRL writes it, on [T]."""
    advantages = inputs.advantages.repeat_interleave(inputs.shape.completion_length)
    ratio = torch.exp(logprobs - inputs.old_logprobs)
    clipped = torch.clamp(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def eager_policy_loss(logits: Tensor, inputs: Inputs) -> Tensor:
    """From logits, with the entropy that a trainer reports."""
    all_logprobs = logits.float().log_softmax(-1)
    logprobs = all_logprobs.gather(-1, inputs.targets[:, None])[:, 0]
    entropy = -(all_logprobs.detach().exp() * all_logprobs.detach()).sum(-1)
    return eager_loss_from(logprobs, inputs) + 0.0 * entropy.mean()


def eager_linear_policy_loss(hidden: Tensor, inputs: Inputs) -> Tensor:
    return eager_policy_loss(hidden @ inputs.weight.T, inputs)


def eager_distillation_loss(hidden: Tensor, inputs: Inputs) -> Tensor:
    """Reverse KL over the whole vocabulary, mean over tokens."""
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.weight.T).float().log_softmax(-1)
    student = (hidden @ inputs.weight.T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(teacher, student, reduction="batchmean", log_target=True)


def released_loop(inputs: Inputs) -> Tensor:
    """R_rep as the released TARS code computes it: pair by pair, layer by layer, a number to the host each time."""
    length = inputs.shape.completion_length
    rows = []
    for i, j in inputs.pairs.tolist():
        means = [[layer[n * length : (n + 1) * length].float().mean(0) for layer in inputs.layers] for n in (i, j)]
        rows.append([torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(*means, strict=True)])
    return torch.tensor(rows, device=inputs.device).sum()


def liger_policy_loss(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, *_ = triton_grpo_loss(
        inputs.logits_and_one, inputs.padded["old"], None, inputs.padded["targets"], inputs.advantages, inputs.padded["mask"],
        temperature=1.0, beta=0.0, eps_low=CLIP_LOW, eps_high=CLIP_HIGH, inplace=False, loss_type="dapo", reduce=True,
    )  # fmt: skip
    return loss


def liger_linear_policy_loss(inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="dapo"
    )
    hidden = inputs.hidden.view(-1, inputs.shape.completion_length, inputs.shape.width)
    return loss(
        hidden, inputs.weight, inputs.padded["targets"], inputs.padded["mask"], inputs.advantages,
        old_per_token_logps=inputs.padded["old"],
    )[0]  # fmt: skip


def liger_distillation_loss(inputs: Inputs) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    reverse_kl, ignore_index, temperature = 1.0, -100, 1.0
    return LigerFusedLinearJSDFunction.apply(
        inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.weight, None, reverse_kl, ignore_index, temperature
    )


def trl_policy_loss(inputs: Inputs) -> Tensor:
    from trl.kernels import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(inputs.logits, inputs.targets)
    return eager_loss_from(logprobs, inputs) + 0.0 * entropy.detach().mean()


def trl_linear_policy_loss(inputs: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.targets, 1.0, chunk_size, None, 1.0, ("entropy",)
    )
    return eager_loss_from(logprobs, inputs) + 0.0 * entropy.detach().mean()


def cce_linear_policy_loss(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    logprobs = -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="none", filter_eps=None)
    return eager_loss_from(logprobs.float(), inputs)


def our_policy_loss(inputs: Inputs) -> Tensor:
    return tars_kernels.policy_loss(
        inputs.logits, inputs.targets, inputs.advantages, cu_seqlens=inputs.cu_seqlens, old_logprobs=inputs.old_logprobs
    ).loss


def our_linear_policy_loss(inputs: Inputs) -> Tensor:
    return tars_kernels.linear_policy_loss(
        inputs.hidden, inputs.weight, inputs.targets, inputs.advantages, cu_seqlens=inputs.cu_seqlens,
        old_logprobs=inputs.old_logprobs,
    ).loss  # fmt: skip


def our_distillation_loss(inputs: Inputs) -> Tensor:
    return tars_kernels.linear_distillation_loss(inputs.hidden, inputs.teacher_hidden, inputs.weight).loss


def _compiled(function: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Tensor, Inputs], Tensor]:
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Operation:
    """One operation: its contenders, what they differentiate, and the least that any of them must do."""

    name: str
    contenders: dict[str, Callable[[Inputs], Tensor]]
    leaves: Callable[[Inputs, str], list[Tensor]]
    """(inputs, contender) -> what is differentiated."""
    num_bytes: Callable[[Shape, int, bool], float]
    """(shape, bytes an element, with gradient) -> bytes that must move."""
    num_flops: Callable[[Shape, bool], float] | None = None
    """(shape, with gradient) -> matrix-product operations; None where bytes are the limit."""
    has_gradient: bool = True


def operations() -> list[Operation]:
    """All operations with the contenders that are installed."""
    compiled_logits, compiled_hidden = _compiled(eager_policy_loss), _compiled(eager_linear_policy_loss)
    compiled_distillation = _compiled(eager_distillation_loss)
    compiled_similarity = torch.compile(reference.layer_similarity, dynamic=False)
    from_logits = {
        OURS: our_policy_loss,
        "eager": lambda inputs: eager_policy_loss(inputs.logits, inputs),
        "torch.compile": lambda inputs: compiled_logits(inputs.logits, inputs),
    }
    from_hidden = {
        OURS: our_linear_policy_loss,
        "eager": lambda inputs: eager_linear_policy_loss(inputs.hidden, inputs),
        "torch.compile": lambda inputs: compiled_hidden(inputs.hidden, inputs),
    }
    distillation = {
        OURS: our_distillation_loss,
        "eager": lambda inputs: eager_distillation_loss(inputs.hidden, inputs),
        "torch.compile": lambda inputs: compiled_distillation(inputs.hidden, inputs),
    }
    similarity = {
        OURS: lambda inputs: tars_kernels.layer_similarity(inputs.layers, inputs.cu_seqlens, inputs.pairs).sum(),
        "eager": lambda inputs: reference.layer_similarity(inputs.layers, inputs.cu_seqlens, inputs.pairs).sum(),
        "torch.compile": lambda inputs: compiled_similarity(inputs.layers, inputs.cu_seqlens, inputs.pairs).sum(),
    }
    if torch.cuda.is_available() and find_spec("liger_kernel"):
        from_logits["liger-kernel"] = liger_policy_loss
        from_hidden["liger-kernel"] = liger_linear_policy_loss
        distillation["liger-kernel"] = liger_distillation_loss
    if torch.cuda.is_available() and find_spec("cut_cross_entropy"):
        from_hidden["cut-cross-entropy"] = cce_linear_policy_loss
    if torch.cuda.is_available() and find_spec("trl"):
        from_logits["trl"] = trl_policy_loss
        from_hidden["trl"] = trl_linear_policy_loss

    def logits_bytes(shape: Shape, size: int, gradient: bool) -> float:
        return (1 + gradient) * shape.num_tokens * shape.vocabulary * size

    def logits_leaves(inputs: Inputs, contender: str) -> list[Tensor]:
        return [inputs.logits_and_one if contender == "liger-kernel" else inputs.logits]

    def head_bytes(shape: Shape, size: int, gradient: bool) -> float:
        return (shape.vocabulary * shape.width + (1 + gradient) * shape.num_tokens * shape.width) * size

    def layer_bytes(shape: Shape, size: int, gradient: bool) -> float:
        return (1 + gradient) * shape.num_layers * shape.num_tokens * shape.width * size

    def head_flops(shape: Shape, gradient: bool) -> float:
        return (2 + 2 * gradient) * shape.num_tokens * shape.vocabulary * shape.width

    def two_heads_bytes(shape: Shape, size: int, gradient: bool) -> float:
        return head_bytes(shape, size, gradient) + shape.num_tokens * shape.width * size

    def two_heads_flops(shape: Shape, gradient: bool) -> float:
        return (4 + 2 * gradient) * shape.num_tokens * shape.vocabulary * shape.width

    return [
        Operation("policy_loss", from_logits, logits_leaves, logits_bytes),
        Operation("linear_policy_loss", from_hidden, lambda inputs, _: [inputs.hidden], head_bytes, head_flops),
        Operation(
            "linear_distillation_loss", distillation, lambda inputs, _: [inputs.hidden], two_heads_bytes, two_heads_flops
        ),
        Operation("layer_similarity", similarity, lambda inputs, _: inputs.layers, layer_bytes),
        Operation(
            "layer_similarity",
            {"released loop": released_loop},
            lambda inputs, _: inputs.layers,
            layer_bytes,
            has_gradient=False,
        ),
        Operation(
            "token_similarity",
            {
                OURS: lambda inputs: tars_kernels.token_similarity(inputs.layers[1:], inputs.layers[:-1]).sum(),
                "eager": lambda inputs: reference.token_similarity(inputs.layers[1:], inputs.layers[:-1]).sum(),
            },
            lambda inputs, _: inputs.layers,
            lambda shape, size, gradient: 2 * layer_bytes(shape, size, gradient),
        ),
        Operation(
            "linear_cka",
            {
                OURS: lambda inputs: tars_kernels.linear_cka(*_prompt_states(inputs)).sum(),
                "eager": lambda inputs: reference.linear_cka(*_prompt_states(inputs)).sum(),
            },
            lambda inputs, _: inputs.layers,
            lambda shape, size, gradient: (1 + gradient) * shape.num_layers * min(shape.num_tokens, 512) * shape.width * size,
        ),
    ]


def _prompt_states(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Alignment looks at prompts, some hundred tokens long."""
    layers = [layer[:512] for layer in inputs.layers]
    return layers, layers[::-1]
