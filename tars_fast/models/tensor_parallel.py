"""Weights of a language model in equal parts on the processes of a group, cut as vLLM cuts them (Shoeybi et al. 2019,
arXiv 1909.08053).

Query, key, value, gate and up are cut by outputs, so that a process has some heads and some inner features; `o_proj` and
`down_proj` behind them by inputs, so that a process has its share of a sum. Embedding and head are cut by tokens, after vLLM's
padding of the vocabulary. All else every process has whole: norms, audio tower and projector, and the states between layers.

Every parameter is this process's part alone, an ordinary tensor, so that it can be a view of vLLM's (`weights.py`), and that
optimisers, adapters and fused losses take it as it is. What processes exchange is done by torch's DTensor around attention and
feed-forward layers: in front of them a gradient is added up, behind them the states are.

Shapes: V tokens of the vocabulary, D hidden size, S tokens of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tars_fast.models.architecture import VOCABULARY_MULTIPLE
from tars_fast.models.families.base import Family
from tars_fast.models.modules import PolicyModule
from tars_fast.types import TrainingError, UserError

Cut = Literal["colwise", "rowwise", "vocabulary"]
"""By outputs, by inputs (the names are those of transformers' plans), or by tokens."""

_PARAMETER = re.compile(r"(?P<layer>.+?)(\.base_layer|\.lora_(?P<matrix>[AB])(\.\w+)?)?\.\w+")
"""A parameter's name, in a LoRA wrapper of peft's or not."""


class Placement(NamedTuple):
    """Where the parts of a parameter are."""

    dim: int | None
    """The dimension that is cut; None: every process has all of it."""
    is_partial: bool = False
    """Of a whole parameter: whether every process finds a part of the sum that its gradient is."""


def check_number(size: int, started: int) -> None:
    """Raises UserError unless as many processes were started as are to share the weights."""
    if started != size:
        raise UserError(
            f"--tensor-parallel {size}: needs {size} processes, {started} started; torchrun --nproc-per-node {size} starts them"
        )


def _plan_of(config: Any) -> dict[str, str]:
    """How transformers would cut the layers of a decoder, by their last names."""
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    return {name.rpartition(".")[2]: cut for name, cut in plan.items()}


class TensorParallel:
    """This process among those that share one model's weights.

    Args:
        group: all of them.
        device: where the weights are.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        # Here and below: it takes a second to load, and only runs with parts need it.
        from torch.distributed.device_mesh import DeviceMesh

        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.together: Callable[[], AbstractContextManager[None]] = nullcontext
        """Around what all of them compute together, where somebody watches that none hangs, see `Watchdog.waiting`."""
        self._mesh = DeviceMesh.from_group(group, device.type)
        self._cuts: dict[str, Cut] = {}
        self._vocabulary_size = 0
        self._rows = 0

    @classmethod
    def of_all(cls, size: int, device: torch.device) -> TensorParallel:
        """All processes that torchrun started.

        Raises:
            UserError: they are not `size`.
        """
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        started = 1 if world is None else dist.get_world_size(world)
        check_number(size, started)
        assert world is not None, "one process has whole weights"
        return cls(world, device)

    def cut(self, module: PolicyModule, family: Family) -> None:
        """Leave of a module on the meta device this process's part, and have it exchange states with the others.

        Args:
            module: see `Family.on_meta`; weights that it ties may be apart afterwards.
        """
        text = module.config.get_text_config()
        decoder, plan = family.decoder_of(module), _plan_of(module.config)
        for name, layer in list(decoder.named_modules()):
            cut = plan.get(name.rpartition(".")[2])
            if cut is None:
                continue
            assert isinstance(layer, nn.Linear), name
            assert cut == "colwise" or layer.bias is None, f"{name}: its bias would be added once by each process"
            self._cuts[f"{family.language_model}.{name}"] = "colwise" if cut == "colwise" else "rowwise"
            if cut == "colwise":
                layer.out_features //= self.size
            else:
                layer.in_features //= self.size
                block = decoder.get_submodule(name.rpartition(".")[0])
                block.register_forward_pre_hook(self._before_block, with_kwargs=True)
                block.register_forward_hook(self._after_block)
        self._vocabulary_size = text.vocab_size
        self._rows = -(-text.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // self.size
        embedding, head = decoder.embed_tokens, module.get_output_embeddings()
        vocabularies = [name for name, layer in module.named_modules() if layer in (embedding, head)]
        self._cuts |= dict.fromkeys(vocabularies, "vocabulary")
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            if self.placement(name).dim is not None:
                part = nn.Parameter(self.part(name, parameter.detach()), requires_grad=parameter.requires_grad)
                setattr(module.get_submodule(owner), leaf, part)
        head.out_features = self._rows
        decoder.embed_tokens = _PartOfEmbedding(embedding, self)

    @property
    def vocabulary_size(self) -> int:
        """V, without padding."""
        return self._vocabulary_size

    def part_of_bias(self, bias: Tensor) -> Tensor:
        """[V / processes] of [V] numbers that are added to logits: this process's; padding gets no probability."""
        return _rows_of(bias, self.first_row, self._rows, -torch.inf)

    @property
    def first_row(self) -> int:
        """The first token of this process's part of the vocabulary."""
        return self.rank * self._rows

    def _cut_of(self, name: str) -> tuple[Cut | None, str | None]:
        """(how a parameter's layer is cut, which matrix of an adapter it is)"""
        found = _PARAMETER.fullmatch(name)
        return (None, None) if found is None else (self._cuts.get(found["layer"]), found["matrix"])

    def placement(self, name: str) -> Placement:
        """Where the parts of a parameter are, by its name in `model_class`, of an adapter too."""
        cut, matrix = self._cut_of(name)
        if cut is None:
            return Placement(None)
        if matrix is None:
            return Placement(1 if cut == "rowwise" else 0)
        # B A x: of a layer that is cut by outputs B is, of one that is cut by inputs A is.
        if (matrix == "B") == (cut == "colwise"):
            return Placement(0 if matrix == "B" else 1)
        return Placement(None, is_partial=True)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a parameter, or of anything that has its shape."""
        dim = self.placement(name).dim
        if dim is None:
            return whole
        if self._cut_of(name)[0] == "vocabulary":
            return _rows_of(whole, self.first_row, self._rows, 0.0)
        # A copy: a view would keep all of it.
        return whole.chunk(self.size, dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """What `part` is this process's part of, on the CPU of the first process; on others something empty. Called by all."""
        part = part.detach().cpu().contiguous()
        dim = self.placement(name).dim
        if dim is None:
            return part if self.rank == 0 else part.new_empty(0)
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        with self.together():
            dist.gather(part, parts, group=self.group, group_dst=0)
        if parts is None:
            return part.new_empty(0)
        whole = torch.cat(parts, dim)
        return whole[: self._vocabulary_size] if self._cut_of(name)[0] == "vocabulary" else whole

    def redraw_adapters(self, module: nn.Module) -> None:
        """Draw new LoRA weights whole and keep a part: peft has drawn them at the width of the part, the same everywhere."""
        for name, parameter in module.named_parameters():
            if ".lora_A." in name and self.placement(name).dim is not None:
                rank, width = parameter.shape
                whole = torch.empty(rank, width * self.size, dtype=parameter.dtype, device=parameter.device)
                # As peft's `reset_lora_parameters` does.
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                parameter.data.copy_(self.part(name, whole))

    def clip_gradients(self, module: nn.Module, max_norm: float) -> Tensor:
        """Complete the gradients and clip them by the norm of all parts; returns that norm before clipping.

        A gradient of which every process has found a part is added up. One that every process has found whole is the first's in
        all of them, so that what all hold stays the same, bit for bit.
        """
        split: list[Tensor] = []
        same: list[Tensor] = []
        parameters = [(name, own) for name, own in module.named_parameters() if own.requires_grad and own.grad is not None]
        for name, parameter in parameters:
            assert parameter.grad is not None
            placement = self.placement(name)
            (same if placement.dim is None else split).append(parameter.grad)
            if placement.dim is None and not placement.is_partial and self.rank:
                parameter.grad.zero_()
        squared = nn.utils.get_total_norm(split).float().square() if split else torch.zeros((), device=self._device(same))
        with self.together():
            self._add_up(same)
            dist.all_reduce(squared, group=self.group)
        if same:
            squared += nn.utils.get_total_norm(same).float().square()
        norm = squared.sqrt()
        nn.utils.clip_grads_with_norm_([parameter for _, parameter in parameters], max_norm, norm)
        return norm

    def _device(self, tensors: Sequence[Tensor]) -> torch.device:
        return tensors[0].device if tensors else torch.device(self._mesh.device_type)

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of all processes' ones, in one call for each dtype."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in alike])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([tensor.numel() for tensor in alike])
            torch._foreach_copy_(alike, [piece.view_as(own) for piece, own in zip(pieces, alike, strict=True)])

    def whole_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The trained parameters that every process holds whole."""
        named = module.named_parameters()
        return [own for name, own in named if own.requires_grad and self.placement(name).dim is None]

    def smallest(self, number: int) -> int:
        """The smallest number that any of the processes has."""
        return min(self._gathered(number))

    def _gathered(self, value: Any) -> list[Any]:
        """What every process has, by rank."""
        values: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, value: object, what: str) -> None:
        """Raises TrainingError where the processes have different ones of `value`, which `what` names."""
        first, *others = self._gathered(value)
        if any(other != first for other in others):
            raise TrainingError(
                f"the {self.size} processes that share one model's weights have other {what} each; start again with --resume"
            )

    def shared_input(self, states: Tensor) -> Tensor:
        """The same states, whose gradient becomes the sum of those of all processes."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not (torch.is_grad_enabled() and states.requires_grad):
            return states
        whole = DTensor.from_local(states, self._mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def added_up(self, states: Tensor) -> Tensor:
        """The sum of all processes' states; each gets its gradient as it is."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = DTensor.from_local(states, self._mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    def _before_block(
        self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in keywords:
            return arguments, keywords | {"hidden_states": self.shared_input(keywords["hidden_states"])}
        return (self.shared_input(arguments[0]), *arguments[1:]), keywords

    def _after_block(self, _module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return self.added_up(output[0]), *output[1:]
        return self.added_up(output)


def _rows_of(whole: Tensor, first: int, number: int, padding: float) -> Tensor:
    """[number, ...] rows from `first`, those behind the last filled with `padding`."""
    rows = whole[first : first + number]
    missing = number - len(rows)
    return torch.cat([rows, whole.new_full((missing, *whole.shape[1:]), padding)]) if missing else rows.clone()


class _PartOfEmbedding(nn.Embedding):
    """[*, S, D] embeddings of tokens, of which each process looks up those that it has."""

    def __init__(self, part: nn.Embedding, parallel: TensorParallel):
        padding = part.padding_idx
        if padding is not None:
            # Its row gets no gradient.
            padding -= parallel.first_row
            padding = padding if 0 <= padding < len(part.weight) else None
        rows, width = part.weight.shape
        super().__init__(rows, width, padding_idx=padding, _weight=part.weight.detach())
        self._parallel = parallel

    def forward(self, input: Tensor) -> Tensor:  # its name in torch
        rows = input - self._parallel.first_row
        is_elsewhere = (rows < 0) | (rows >= len(self.weight))
        own = super().forward(rows.masked_fill(is_elsewhere, 0))
        return self._parallel.added_up(own.masked_fill(is_elsewhere[..., None], 0.0))
