"""One of two processes that hold half of a model's weights each, held to the whole model.

`torchrun half_of_the_weights.py CHECKPOINT FOLDER`, with the folder of tests on PYTHONPATH.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steps import gradients, rollout_of, save_checkpoint, update
from torch import nn

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning.batch import Rollout
from tars_fast.learning.likeness import check_alike
from tars_fast.learning.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.models.adapters import has_adapter, load_adapter_weights
from tars_fast.models.checkpoint import CheckpointPart, PendingCheckpoint, fault_of, load_trainer_state
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_module, make_trainable
from tars_fast.models.tensor_parallel import TensorParallel
from tars_fast.models.weights import move_buffers
from tars_fast.types import Modality, TrainingError, UserError

CPU = torch.device("cpu")


def halved(whole: SpeechModel) -> SpeechModel:
    """The model of which this process has a half, cut from `whole`."""
    prompts = whole.prompts
    module = prompts.family.on_meta(prompts.config, torch.float32)
    parallel = TensorParallel(dist.group.WORLD, CPU)
    parallel.cut(module, prompts.family)
    module.tie_weights()
    weights = dict(whole.module.named_parameters(remove_duplicate=False))
    placed: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        part = nn.Parameter(parallel.part(name, weights[name].detach()).clone(), requires_grad=False)
        assert part.shape == parameter.shape, name
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, placed.setdefault(id(parameter), part))
    move_buffers(module, CPU)
    return SpeechModel(module.eval(), prompts, parallel)


def difference(own: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest there is, of at most 1e-4."""
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
    return (own - expected).abs().max().item()


def compare(whole: SpeechModel, half: SpeechModel, rollout, config) -> dict[str, float]:
    """Metrics, log-probabilities, rewards of pooled states and gradients of a step, and the weights after it.

    Returns:
        the largest differences of some of them.
    """
    parallel = half.parallel
    scored, metrics = update(whole, rollout, config, learning_rate=0.1)
    own_scored, own_metrics = update(half, rollout, config, learning_rate=0.1)
    assert own_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert abs(own_metrics[name] - value) <= 1e-4 * max(1.0, abs(value)), (name, own_metrics[name], value)
    found = {
        name: difference(torch.cat(getattr(own_scored, name)), torch.cat(getattr(scored, name)))
        for name in ("logprobs", "entropies")
    }
    found["rewards"] = difference(own_scored.rewards_N, scored.rewards_N)
    found["gradients"] = 0.0
    assert gradients(whole).norm() > 1e-3
    parts = dict(half.module.named_parameters())
    for name, parameter in whole.module.named_parameters():
        assert parts[name].requires_grad == parameter.requires_grad, name
        if parameter.requires_grad:
            part = parallel.part(name, parameter.grad)
            torch.testing.assert_close(parts[name].grad, part, rtol=1e-4, atol=1e-5, msg=name)
            found["gradients"] = max(found["gradients"], difference(parts[name].grad, part))
        torch.testing.assert_close(parts[name], parallel.part(name, parameter), rtol=1e-4, atol=1e-5, msg=name)
    state = {name: parallel.whole(name, value) for name, value in half.module.state_dict().items()}
    if parallel.rank == 0:
        for name, value in whole.module.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    return found


def as_if_answered(rollout: Rollout) -> Rollout:
    """With rewards that differ, of completions that were not cut off; a model that has learned nothing earns none."""
    completions = [dataclasses.replace(one, truncated=False) for one in rollout.completions]
    written = {one.question: row for row, one in enumerate(completions) if one.modality is Modality.TEXT}
    return dataclasses.replace(
        rollout,
        completions=completions,
        completion_rewards=rollout.completion_rewards | {"accuracy": torch.arange(len(completions)) % 2.0},
        references=[written[one.question] if one.modality is Modality.SPEECH else None for one in completions],
    )


def trained(model: SpeechModel, lora_rank: int, *, checkpointed: bool = False) -> SpeechModel:
    torch.manual_seed(0)
    make_trainable(model, lora_rank=lora_rank, lora_alpha=32.0, freeze_audio=True, gradient_checkpointing=checkpointed)
    return model


def same_adapters(whole: SpeechModel, half: SpeechModel) -> None:
    """Give both the same LoRA weights; B is 0 at first, which would leave A without a gradient."""
    parts = dict(half.module.named_parameters())
    for name, parameter in whole.module.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(name)))
            parts[name].data.copy_(half.parallel.part(name, parameter.data))


def take_a_step(model: SpeechModel, shapes: Mapping[str, torch.Size]) -> torch.optim.Optimizer:
    """One step of AdamW on gradients that are the same numbers for a whole model, of these shapes, and for parts of it."""
    trained = model.trainable_by_name()
    optimizer = make_optimizer(list(trained.values()), weight_decay=0.01, seed=0)
    optimizer.param_groups[0]["lr"] = 1e-3
    for name, parameter in trained.items():
        gradient = torch.randn(shapes[name], generator=torch.Generator().manual_seed(len(name)))
        parameter.grad = gradient if model.parallel is None else model.parallel.part(name, gradient)
    optimizer.step()
    return optimizer


def compare_checkpoints(whole: SpeechModel, half: SpeechModel, folder: Path) -> None:
    """Two halves write the files of one process, bit for bit, and read what it wrote."""
    parallel = half.parallel
    with torch.no_grad():
        for name, parameter in half.module.named_parameters():
            parameter.copy_(parallel.part(name, whole.module.get_parameter(name)))
    shapes = {name: parameter.shape for name, parameter in whole.trainable_by_name().items()}
    optimizers = [take_a_step(model, shapes) for model in (whole, half)]
    part = CheckpointPart.copy(3, half, optimizer_state(optimizers[1], half.trainable_by_name()), extra={"seen": [1]})
    written = folder / "checkpoint-3"
    if parallel.rank == 0:
        pending = PendingCheckpoint(folder, part, half)
        assert pending.failure() is None
        assert pending.complete() == written
        assert fault_of(written) is None
        expected = save_checkpoint(folder / "whole", 3, whole, optimizers[0], {"seen": [1]})
        names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
        assert names == sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
        for name in names:
            if name != "trainer_state.pt":
                assert (expected / name).read_bytes() == (written / name).read_bytes(), name
    dist.barrier()
    for source in (written, folder / "whole" / written.name):
        for model, optimizer in ((whole, optimizers[0]), (half, optimizers[1])):
            named = model.trainable_by_name()
            other = make_optimizer(list(named.values()), weight_decay=0.01, seed=0)
            completed, state, extra = load_trainer_state(source, list(named))
            load_optimizer_state(other, named, state, model.parallel)
            assert (completed, extra) == (3, {"seen": [1]})
            loaded, held = optimizer_state(other, named), optimizer_state(optimizer, named)
            assert loaded.keys() == held.keys()
            assert all(torch.equal(loaded[name], held[name]) for name in held)
        if has_adapter(half.module):
            held = {name: parameter.detach().clone() for name, parameter in half.trainable_by_name().items()}
            for parameter in half.trainable_parameters():
                parameter.data.zero_()
            load_adapter_weights(half.module, half.family, source, parallel)
            assert all(torch.equal(parameter, held[name]) for name, parameter in half.trainable_by_name().items())


def settings() -> RunConfig:
    """A policy gradient with an entropy bonus, both distillations, and R_rep."""
    return TrainConfig(
        questions_per_step=2, num_steps=4, group_size=4, max_new_tokens=8, objective="tars+opd", text_anchor="kl",
        entropy_coef=0.01, max_logprob_diff=100.0,
    ).resolve(PRESETS["pocket"], output_dir=Path("unused"), tokens_per_micro_batch=4096)  # fmt: skip


def check_workers(workers: Workers) -> None:
    """Both count as one of the processes with rollouts of their own, and are compared all the same."""
    rank = workers.tensor_rank
    assert (workers.rank, workers.size, workers.num_processes, workers.is_first) == (0, 1, 2, rank == 0)
    assert workers.gather(rank) == [0]
    assert workers.gather_all(rank) == [0, 1]
    assert workers.spread(lambda items: [2 * item for item in items], [1, 2, 3]) == [2, 4, 6]
    workers.check_same([nn.Parameter(torch.ones(3))])
    with pytest.raises(TrainingError, match="have come apart"):
        workers.check_same([nn.Parameter(torch.full((3,), float(rank)))])
    with pytest.raises(UserError, match=r"process 1 on .* has other settings than process 0"):
        check_alike(workers, "settings", {"seed": rank})


def main(source: str, folder: str) -> None:
    torch.set_num_threads(1)
    with join_workers(timeout=600.0, tensor_parallel=2) as workers:
        check_workers(workers)
        compare_halves(source, Path(folder), workers)
    print("equal")


def compare_halves(source: str, folder: Path, workers: Workers) -> None:
    prompts = load_prompt_format(PRESETS["pocket"], source)
    config, questions = settings(), load_questions(TRAINING_DATA)[:2]
    for lora_rank in (0, 4):
        whole = SpeechModel(load_module(prompts, source, CPU, torch.float32), prompts)
        half = halved(whole)
        half.parallel.together = partial(workers.watchdog.waiting, "parts")
        trained(half, lora_rank, checkpointed=True)
        trained(whole, lora_rank)
        if lora_rank:
            # Whole matrices are drawn: processes that share a layer's inputs do not have the same half of it twice.
            drawn = next(own for name, own in half.module.named_parameters() if "o_proj.lora_A" in name)
            halves = [torch.empty_like(drawn) for _ in range(2)]
            dist.all_gather(halves, drawn.detach())
            assert not torch.equal(*halves)
            same_adapters(whole, half)
        rollout = as_if_answered(rollout_of(whole, questions, config))
        for _ in range(2):
            compare(whole, half, copy.deepcopy(rollout), config)
        compare_checkpoints(whole, half, folder / str(lora_rank))
    calls = workers.gather_all(dict(workers.watchdog._calls))
    assert calls[0] == calls[1]
    assert calls[0]["parts"] > 100


if __name__ == "__main__":
    main(*sys.argv[1:])
