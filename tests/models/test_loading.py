"""Peak of memory while a mixture of experts is loaded: published weights, one of each expert, become one tensor a layer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import MAKERS
from huggingface_hub import save_torch_state_dict
from transformers import Qwen3OmniMoeThinkerConfig

from tars_fast.models.families.qwen3_omni import FAMILY

LOADING = """
import copy, json, sys
import torch
sys.path[:0] = ["tests/rollout", "tests"]
from anonymous_memory import peak_of
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import load_module

def load(folder):
    if sys.argv[1] == "vllm":
        from test_vllm_engine import start
        return start(folder, torch.bfloat16, max_tokens=256).model.module
    return load_module(load_prompt_format(find_preset(folder), folder), folder, torch.device("cpu"), torch.bfloat16)

load(sys.argv[2])  # imports, allocator and a first engine are not what is measured
module, peak = peak_of(lambda: load(sys.argv[3]))
storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
second = peak_of(lambda: copy.deepcopy(module))[1]
print(json.dumps({"peak": peak, "weights": sum(storages.values()), "second": second}))
"""


def make_large_mixture(folder: Path) -> Path:
    """1.1 GB in bfloat16, 24 layers of 16 experts, in four shards."""
    MAKERS["qwen3-omni"](folder)
    config = json.loads((folder / "config.json").read_text())
    thinker = config["thinker_config"]
    thinker["text_config"] |= {"hidden_size": 1024, "moe_intermediate_size": 448, "num_experts": 16, "num_hidden_layers": 24}
    thinker["audio_config"]["output_dim"] = thinker["vision_config"]["out_hidden_size"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    module = FAMILY.transformers_class()._from_config(Qwen3OmniMoeThinkerConfig(**thinker), dtype=torch.bfloat16)
    pieces = (piece for name, value in module.state_dict().items() for piece in FAMILY.published_weights(name, value))
    (folder / "model.safetensors").unlink()
    save_torch_state_dict({name: value.clone() for name, value in pieces}, folder, max_shard_size="300MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_loading_a_mixture_of_experts_holds_no_second_copy(engine, tmp_path):
    """Peak of anonymous memory, by a measure that sees a copy of the module."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    folders = [str(MAKERS["qwen3-omni"](tmp_path / "small")), str(make_large_mixture(tmp_path / "large"))]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    # Else glibc keeps freed blocks of up to 32 MB for later, by chance more than a layer's experts.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", LOADING, engine, *folders]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
    found = json.loads(output.stdout.strip().splitlines()[-1])
    assert found["weights"] > 1e9
    assert found["peak"] < 1.3 * found["weights"]
    assert found["second"] > 0.9 * found["weights"], "the measure would not have seen a second copy"
