"""The losses under DDP and FSDP2 on two processes, whose gradients are those of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tars_kernels
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WORKERS = 2


class Policy(nn.Module):
    """Computes its loss in its own forward, where FSDP has gathered the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 33, bias=False)

    def forward(self, states, targets, advantages):
        hidden = self.body(states).tanh()
        logprobs = tars_kernels.linear_logprob(hidden, self.head, targets)
        loss = tars_kernels.linear_policy_loss(hidden, self.head, targets, advantages, num_tokens=len(targets)).loss
        return loss + 0.1 * logprobs.mean()


def batch(parts: slice = slice(None)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states, advantages = torch.randn(6, 8, generator=generator), torch.randn(6, generator=generator)
    return [tensor[parts] for tensor in (states, torch.arange(6) * 5, advantages)]


def check_gradients(rank: int, kind: str) -> None:
    expected = Policy()
    expected(*batch()).backward()
    policy = Policy()
    if kind == "ddp":
        wrapped = DistributedDataParallel(policy)
    else:
        wrapped = fully_shard(policy)
        with pytest.raises(ValueError, match="full_tensor"):
            tars_kernels.linear_logprob(torch.randn(3, 8), policy.head.weight, torch.arange(3))
    wrapped(*batch(slice(rank * 3, rank * 3 + 3))).backward()
    for own, whole in zip(policy.parameters(), expected.parameters(), strict=True):
        gradient = own.grad.full_tensor() if kind == "fsdp2" else own.grad
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-6)


def work(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{kind}", rank=rank, world_size=WORKERS)
    torch.set_num_threads(1)
    # DDP must be gone before its group: where its reducer is the last to hold the group, the group is freed under the GIL,
    # waiting for a thread that may wait for the GIL itself.
    check_gradients(rank, kind)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradient_of_one(tmp_path, kind):
    command = [sys.executable, __file__, str(tmp_path), kind]
    # FSDP takes a GPU where it sees one, which gloo cannot serve.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    multiprocessing.spawn(work, tuple(sys.argv[1:]), nprocs=WORKERS)
