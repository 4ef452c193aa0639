#!/usr/bin/env bash
# Everything that only a CUDA GPU can show, the most important first. Each part writes its JSON as soon as it is done; one that fails
# does not cost the others, but the exit status.
#   bench/gpu.sh [-o OUTPUT_FOLDER] [--shape SHAPE] [PART...]
# default: -o bench/results --shape qwen2-audio-7b correctness races kernels step objectives engine engine_8
# --shape qwen3-omni-30b: its engine alone, which needs a card of 80 GB or more
# correctness  tests of the kernels and of the packed attention, on CUDA
# races        kernels that overwrite what they read, 200 times, against copies, bit for bit
# kernels      every operation beside eager PyTorch, torch.compile and the peers that are installed
# step         the training side of a step at Qwen2-Audio-7B's shape, beside other trainers' structures
# objectives   an update by each objective, at the same shape
# engine       one copy of the weights beside two, at the same shape, of Qwen3-Omni one copy alone; needs vLLM
# engine_8     a step of 64 completions on one copy
# all_cases    not by default: other lengths of the step, and its time and memory against questions, group size and layers
set -uo pipefail
cd "$(dirname "$0")/.." || exit
output=bench/results
shape=qwen2-audio-7b
while [[ ${1:-} = -* ]]; do
    case $1 in
        -o) output=$2 ;;
        --shape) shape=$2 ;;
        *)
            echo "bench/gpu.sh: no option $1; see the head of this script" >&2
            exit 2
            ;;
    esac
    shift 2
done
case $shape in
    qwen2-audio-7b) parts=(correctness races kernels step objectives engine engine_8) engine_name=engine ;;
    qwen3-omni-30b) parts=(engine) engine_name=engine_$shape ;;
    *)
        echo "bench/gpu.sh: no shape $shape; see the head of this script" >&2
        exit 2
        ;;
esac
mkdir -p "$output"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "bench/gpu.sh: torch sees no CUDA GPU")' || exit
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
correctness() {
    python3 -m pytest kernels/tests tests/models/test_packed_attention.py --all --ignore kernels/tests/test_races.py \
        --junitxml "$raw/correctness.xml"
    local status=$?
    python3 bench/report.py "$raw/correctness.xml" "$output/correctness_$card.json" && return $status
}

races() {
    python3 -m pytest kernels/tests/test_races.py -n 0 --junitxml "$raw/races.xml"
    local status=$?
    python3 bench/report.py "$raw/races.xml" "$output/races_$card.json" && return $status
}

kernels() {
    python3 -m pytest bench/test_kernels.py --benchmark-only --benchmark-json="$raw/kernels.json" --benchmark-columns=median,rounds
    local status=$?
    python3 bench/report.py "$raw/kernels.json" "$output/kernels_$card.json" && return $status
}

step() {
    python3 bench/train_step.py --shape "$shape" --cases 10s-512 --repeats 2 --micro-batches 16 --contenders released trl --json "$output/train_step_$card.json"
}

objectives() {
    python3 bench/objectives.py --shape "$shape" --repeats 2 --json "$output/objectives_$card.json"
}

engine() {
    python3 bench/engine.py --shape "$shape" --num-steps 3 --output "$output/${engine_name}_$card.json"
}

engine_8() {
    python3 bench/engine.py --shape "$shape" --questions 8 --arms shared --num-steps 2 --output "$output/engine_8_questions_$card.json"
}

all_cases() {
    python3 bench/train_step.py --shape "$shape" --scaling --json "$output/train_step_all_cases_$card.json"
}

[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
for part in "$@"; do
    case " ${parts[*]} all_cases " in
        *" $part "*) ;;
        *)
            echo "bench/gpu.sh: no part $part of $shape; see the head of this script" >&2
            exit 2
            ;;
    esac
done
for part in "$@"; do
    echo "== $part"
    SECONDS=0
    "$part" || failed+=("$part")
    echo "== $part: $SECONDS s"
done
[ ${#failed[@]} -eq 0 ] || echo "bench/gpu.sh: failed: ${failed[*]}" >&2
exit ${#failed[@]}
