"""AdamW that can hold small steps in bfloat16 weights, by rounding stochastically (full fine-tuning without fp32 masters).

In full fine-tuning several processes share it out (ZeRO stage 1, Rajbhandari et al. 2020): each holds the moments of its own
parameters, updates these, and sends them to the others. A parameter belongs to one process whole, and stays where it is in
memory, because the engine samples from it there; FSDP2 would move it into shards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.config import RunConfig
from tars_fast.models.tensor_parallel import TensorParallel


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 neighbours of float32 values, the nearer one the likelier, so that the mean over draws is the value itself.

    A bf16 number has 8 bits of mantissa: at learning rates of 1e-6 rounding to the nearest loses nearly every update.

    Args:
        values: float32, any shape.
        generator: on the device of `values`.
    """
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # The lower half of a float32's bits is what bf16 drops; a carry out of it is rounding up. Masked, the cast is exact.
    # NaN and infinity get no noise, whose carry could make a number of them.
    bits.masked_fill_(~values.isfinite(), 0).add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019) on bfloat16 parameters in place, moments in float32.

    Each step computes the new weight in float32 and rounds it stochastically. Draws depend on the seed, the step and the
    parameter alone, so a resumed run repeats an unbroken one, and a parameter becomes the same whichever process updates it.

    Args:
        numbers: the place of each parameter among all of the model; None: they are all given, in order.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        seed: int = 0,
        numbers: Mapping[nn.Parameter, int] | None = None,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self._seed = seed
        self._numbers = numbered(held_parameters(self)) if numbers is None else numbers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the loop has taken the gradients
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                generator = generators.setdefault(parameter.device, torch.Generator(parameter.device))
                drawn_for = f"{self._seed} {state['step']} {self._numbers[parameter]}"
                generator.manual_seed(random.Random(drawn_for).getrandbits(63))
                gradient = parameter.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                # Float32 temporaries are the step's peak memory; each goes before the next is made.
                del gradient
                deviation = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
                step_size = group["lr"] / (1 - beta1 ** state["step"])
                updated = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
                updated.addcdiv_(state["exp_avg"], deviation, value=-step_size)
                del deviation
                parameter.copy_(stochastic_round(updated, generator))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that moments stay float32 where torch would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = held_parameters(self)
        for number, saved in state_dict["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                parameter = parameters[number]
                self.state[parameter][name] = saved[name].to(parameter.device, copy=True)
            self.state[parameters[number]]["step"] = int(saved["step"])


def held_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def numbered(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """The place of each in their order."""
    return {parameter: number for number, parameter in enumerate(parameters)}


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser of those parameters whose moments this process holds, with their state: itself, where it is not sharded."""
    own: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return own


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each process holds the state of some parameters only."""
    return own_part(optimizer) is not optimizer


def make_optimizer(
    parameters: list[nn.Parameter], weight_decay: float, seed: int, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """AdamW for parameters of either dtype; the loop sets the learning rate of each step.

    Args:
        sharded: whether each of the processes holds the moments of its own part of the parameters only. Its step needs the
            gradients of that part alone, and must be taken by all processes.
    """
    make: Callable[..., torch.optim.Optimizer]
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        make = partial(StochasticAdamW, seed=seed, numbers=numbered(parameters))
    else:
        # Fused needs no temporaries as large as all parameters; on a CPU there is no such kernel to gain from.
        fused = all(parameter.is_cuda for parameter in parameters)
        make = partial(torch.optim.AdamW, fused=fused or None)
    if not sharded:
        return make(parameters, lr=0.0, weight_decay=weight_decay)

    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Any callable will do as a class. Views of buckets would take the parameters away from the engine.
    settings: dict[str, Any] = {"optimizer_class": make, "parameters_as_bucket_view": False}
    return ZeroRedundancyOptimizer(parameters, lr=0.0, weight_decay=weight_decay, **settings)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What this process holds of the optimiser's state, as `<name of the parameter>.<entry>`, e.g. `head.weight.exp_avg`."""
    states = own_part(optimizer).state
    held = {name: states.get(parameter, {}) for name, parameter in parameters.items()}
    return {f"{name}.{entry}": torch.as_tensor(value) for name, entries in held.items() for entry, value in entries.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    parallel: TensorParallel | None = None,
) -> None:
    """Have the optimiser go on from what `optimizer_state` returned in all processes, of which there were any number.

    Args:
        state: of all parameters, of which this process reads its own; empty before the first step.
        parallel: see `SpeechModel`; of each whole tensor the process takes its part.

    Raises:
        ValueError: it is not of these parameters.
    """
    if not state:
        return
    entries: dict[str, list[str]] = {name: [] for name in parameters}
    for saved in state:
        name, _, entry = saved.rpartition(".")
        entries.setdefault(name, []).append(entry)
    expected = sorted(next(iter(entries.values())))
    if others := [name for name, found in entries.items() if name not in parameters or sorted(found) != expected]:
        raise ValueError(f"of other weights than the model's, {len(others)} names differ, first {others[0]}")
    local = own_part(optimizer)
    name_of = {parameter: name for name, parameter in parameters.items()}
    held: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(held_parameters(local)):
        name = name_of[parameter]
        held[number] = {}
        for entry in entries[name]:
            value = state[f"{name}.{entry}"]
            if value.ndim and parallel is not None:
                value = parallel.part(name, value)
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is of {tuple(value.shape)}, not {tuple(parameter.shape)} weights")
            held[number][entry] = value
    local.load_state_dict({"state": held, "param_groups": local.state_dict()["param_groups"]})


def learning_rate_at(config: RunConfig, step: int) -> float:
    """Linear warm-up, then linear decay to 0 after the last step; a pure function of the step, so there is nothing to save."""
    warmup_steps = round(config.warmup_fraction * config.num_steps)
    rising = (step + 1) / (warmup_steps + 1)
    falling = (config.num_steps - step) / max(1, config.num_steps - warmup_steps)
    return config.learning_rate * min(1.0, rising, falling)
