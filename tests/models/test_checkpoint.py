"""Checkpoints: what several processes write any number reads, what is written is what was, and older ones still load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from steps import save_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tars_fast.learning.optimizer import StochasticAdamW, load_optimizer_state, make_optimizer, optimizer_state
from tars_fast.models.checkpoint import CheckpointPart, PendingCheckpoint, fault_of, load_trainer_state, set_damaged_aside
from tars_fast.support.files import partial_of


def step(model, optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trainable_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()


def state_of(optimizer) -> dict[str, torch.Tensor]:
    held = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number in held for name, value in held[number].items()}


def check_loads(folder: Path, model, optimizer) -> None:
    names = model.trainable_by_name()
    other = make_optimizer(list(names.values()), weight_decay=0.01, seed=0)
    completed, state, extra = load_trainer_state(folder, list(names))
    load_optimizer_state(other, names, state)
    assert completed == 3
    assert extra == {"seen": [1, 2]}
    expected, loaded = state_of(optimizer), state_of(other)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name
    if isinstance(other, StochasticAdamW):
        assert all(type(held["step"]) is int for held in other.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_several_processes_write_one_reads(model, tmp_path, dtype):
    model.module.to(dtype)
    optimizer = make_optimizer(model.trainable_parameters(), weight_decay=0.01, seed=0)
    step(model, optimizer)
    names = model.trainable_by_name()
    parts = [dict(list(names.items())[number::3]) for number in range(3)]
    parts[1] |= parts.pop()
    # The last of three owns nothing.
    parts.append({})
    pending = [
        PendingCheckpoint(
            tmp_path,
            CheckpointPart.copy(
                3, model if number == 0 else None, optimizer_state(optimizer, part), (number, 3), {"seen": [1, 2]}
            ),
            model,
        )
        for number, part in enumerate(parts)
    ]
    assert [one.failure() for one in pending] == [None] * 3
    assert fault_of(partial_of(pending[0].target)) is None
    folder = pending[0].complete()
    assert fault_of(folder) is None
    check_loads(folder, model, optimizer)

    # torch's own reader of safetensors files sees the same.
    saved = optimizer_state(optimizer, names)
    read = {name: torch.zeros_like(value) for name, value in saved.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(folder / "optimizer")), no_dist=True)
    assert all(torch.equal(read[name], value) for name, value in saved.items())

    next((folder / "optimizer").glob("shard-00003*")).unlink()
    assert fault_of(folder).startswith("shard-00003-of-00003.safetensors: ")


def test_what_is_written_is_what_was_when_it_was_copied(model, tmp_path):
    from safetensors.torch import load_file

    optimizer = make_optimizer(model.trainable_parameters(), weight_decay=0.01, seed=0)
    step(model, optimizer)
    extra = {"average": [torch.ones(2)]}
    part = CheckpointPart.copy(3, model, optimizer_state(optimizer, model.trainable_by_name()), extra=extra)
    weights = {name: value.clone() for name, value in part.weights.items()}
    before = state_of(optimizer)
    before = {name: value.clone() for name, value in before.items()}
    step(model, optimizer)
    extra["average"][0].zero_()
    pending = PendingCheckpoint(tmp_path, part, model)
    assert pending.failure() is None
    folder = pending.complete()
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in weights.items())
    _, state, held = load_trainer_state(folder, [])
    assert torch.equal(held["average"][0], torch.ones(2))
    assert sorted(value.double().sum().item() for value in state.values()) == pytest.approx(
        sorted(value.double().sum().item() for value in before.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_earlier_versions_still_load(model, tmp_path, dtype):
    model.module.to(dtype)
    optimizer = make_optimizer(model.trainable_parameters(), weight_decay=0.01, seed=0)
    step(model, optimizer)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"seen": [1, 2]})
    for path in (folder / "optimizer").iterdir():
        path.unlink()
    state = {"num_completed": 3, "optimizer": optimizer.state_dict(), "extra": {"seen": [1, 2]}}
    torch.save(state, folder / "trainer_state.pt")
    assert fault_of(folder) is None
    check_loads(folder, model, optimizer)


def test_a_state_of_other_weights_is_refused(model, lora_model, tmp_path):
    def load(other, state) -> None:
        names = other.trainable_by_name()
        load_optimizer_state(make_optimizer(list(names.values()), weight_decay=0.01, seed=0), names, state)

    optimizer = make_optimizer(model.trainable_parameters(), weight_decay=0.01, seed=0)
    load(model, optimizer_state(optimizer, model.trainable_by_name()))
    step(model, optimizer)
    state = optimizer_state(optimizer, model.trainable_by_name())
    with pytest.raises(ValueError, match="of other weights than the model's, "):
        load(lora_model, state)
    name = next(name for name in state if name.endswith(".exp_avg"))
    with pytest.raises(ValueError, match=rf"{name.removesuffix('.exp_avg')} is of \(7,\), not "):
        load(model, state | {name: torch.zeros(7)})
    del state[max(other for other in state if other.endswith(".exp_avg"))]
    with pytest.raises(ValueError, match="of other weights than the model's, 1 names differ"):
        load(model, state)


def test_damaged_checkpoints_are_set_aside_and_whole_ones_stay(model, tmp_path):
    optimizer = torch.optim.SGD(model.trainable_parameters())
    assert not set_damaged_aside(tmp_path, print)
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, model, optimizer)
    for number in (2, 3):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.pt").write_bytes(b"")
    said: list[str] = []
    assert set_damaged_aside(tmp_path, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"]
    assert [line.partition(" is damaged (trainer_state.pt: ")[0][-12:] for line in said] == ["checkpoint-3", "checkpoint-2"]
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    assert not set_damaged_aside(tmp_path, said.append)
