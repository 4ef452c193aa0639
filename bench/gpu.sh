#!/usr/bin/env bash
# Everything that only a CUDA GPU can show: kernel tests, benchmarks beside the peers that are installed, the training step beside
# other trainers' structures and the shared-weight engine at Qwen2-Audio-7B's shape. One JSON a part, charts beside them.
#   bench/gpu.sh [OUTPUT_FOLDER]     default: bench/results
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-bench/results}
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "bench/gpu.sh: torch sees no CUDA GPU")'
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
raw=$(mktemp)
trap 'rm -f "$raw"' EXIT

python3 -m pytest kernels/tests --all
python3 -m pytest bench/test_kernels.py --benchmark-only --benchmark-json="$raw" --benchmark-columns=median,rounds
python3 bench/report.py "$raw" "$output/kernels_$card.json"
vllm_usable='import sys, torch; from tars_fast.models.families import qwen2_audio; from tars_fast.rollout.vllm_engine import vllm_refusal
sys.exit(vllm_refusal(qwen2_audio.FAMILY, torch.device("cuda"), torch.bfloat16, lora_rank=8))'
python3 -m pytest tests/models/test_packed_attention.py --all
python3 bench/train_step.py --shape qwen2-audio-7b --json "$output/train_step_$card.json"
python3 bench/train_step.py --shape qwen2-audio-7b --cases 10s-512 --scaling --json "$output/train_step_scaling_$card.json"
if python3 -c "$vllm_usable"; then
    python3 bench/engine.py --shape qwen2-audio-7b --output "$output/engine_$card.json"
fi
