"""The speech LLM of examples/smol: `python bench/smol.py make --folder FOLDER --output FILE`, then `arms`, `repeat` and `vllm`.

`make` runs the commands of examples/smol/README.md one after the other, from nothing to the warm model's evaluation on held-out
questions in espeak-ng's voices and in a neural one, and times each. `arms` trains from the warm model: objectives with several
seeds, compared by `tars_fast.ablate`; how far each reward spreads within the groups of a step, in the mean over steps; and by
`tars_fast.analyse` the drift of hidden states, their CKA and the alignment path, of the warm model and of each arm's first
seed. `repeat` distils on eight questions only, again in every step, and reports what that does to them. `vllm` takes three
steps with vLLM's engine, at a rate that moves the policy, and reports how far its log-probabilities are from the trainer's,
before and after each hand-over.

What is there already is not made again, so the same command goes on where it was stopped; the seconds of a command that was
stopped are those of all its starts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tars_fast.data.synthesis import ACCENTS, SPEAKERS
from tars_fast.support.files import write_atomically
from tars_fast.support.provenance import provenance

SMOL = Path(__file__).parents[1] / "examples" / "smol"
HELD_OUT_SPEAKERS = ("f4", "m4", "m7", "Michael")
PARTS = {
    "training": [speaker for speaker in SPEAKERS if speaker not in HELD_OUT_SPEAKERS],
    "held_out": HELD_OUT_SPEAKERS,
}
TRAINING, HELD_OUT, NEURAL = (f"data/{part}/items.jsonl" for part in (*PARTS, "held_out_neural"))
REPEATED = "data/training/repeated.jsonl"
_NUM_REPEATED = 8
WARM = "warm"
Command = tuple[str, Sequence[str]]
"""What a command leaves when it is done, and its arguments, in the folder that it runs in."""


def voices(part: str) -> list[str]:
    return ["+".join(pair) for pair in product(ACCENTS, PARTS[part])]


def commands_of_make(arguments: argparse.Namespace) -> dict[str, Command]:
    """By name, each command of README.md."""
    dtype = arguments.dtype
    spoken = {
        part: ["--data", f"data/{part}.jsonl", "--output-dir", f"data/{part}", "--voices", *voices(part)] for part in PARTS
    }
    joe = ["--synthesiser", f"{SMOL}/voices.py:piper", "--voices", "joe"]
    spoken["held_out_neural"] = ["--data", "data/held_out.jsonl", "--output-dir", "data/held_out_neural", *joe]
    learned = ["--questions", "data/training.jsonl", "--speech", TRAINING, "--output-dir", "warm-up", "--thinking-dtype", dtype]
    sets = ["--data", f"held_out={HELD_OUT}", "--data", f"neural={NEURAL}"]
    evaluated = ["-m", "tars_fast.evaluate", "--model", WARM, *sets, "--dtype", dtype, "--output-dir", "evaluated"]
    return {
        "assemble": ("smol/preset.json", [f"{SMOL}/assemble.py", "--output-dir", "smol"]),
        "questions": ("data/held_out.jsonl", [f"{SMOL}/questions.py", "--output-dir", "data"]),
        **{f"speak {part}": (f"data/{part}/items.jsonl", ["-m", "tars_fast.prepare", *own]) for part, own in spoken.items()},
        "warm up": ("warm-up/projector.safetensors", [f"{SMOL}/warm_up.py", "--model", "smol", *learned, *arguments.warm_up]),
        "assemble warm": (f"{WARM}/preset.json", [f"{SMOL}/assemble.py", "--warm-up", "warm-up", "--output-dir", WARM]),
        "evaluate": ("evaluated/evaluation.json", evaluated),
    }


def commands_of_arms(arguments: argparse.Namespace) -> dict[str, Command]:
    """By name: the ablation, then an analysis of the warm model and one of each arm's first seed."""
    settings = (f"dtype={arguments.dtype}", f"eval_items={arguments.eval_items}", *arguments.setting)
    trained = ["--model", WARM, "--data", TRAINING, "--eval-data", HELD_OUT, "--num-steps", str(arguments.num_steps)]
    trained += ["--arms", arguments.arms, "--seeds", str(arguments.seeds), "--jobs", str(arguments.jobs)]
    trained += [part for setting in settings for part in ("--setting", setting)]
    trained += [part for defined in arguments.define for part in ("--define", defined)]
    looked_at = ["-m", "tars_fast.analyse", "--data", HELD_OUT, "--items", str(arguments.analysed)]
    looked_at += ["--dtype", arguments.dtype]
    models = {"start": ["--model", WARM]}
    for arm in arguments.arms.split(","):
        checkpoint = f"arms/{arm}/seed-0/checkpoint-{arguments.num_steps}"
        models[arm] = ["--model", checkpoint, "--compare", "analysed/start"]
    return {
        # Also when all is there: it adds seeds and arms.
        "arms": ("", ["-m", "tars_fast.ablate", *trained, "--output-dir", "arms"]),
        **{
            f"analyse {name}": (f"analysed/{name}/analysis.json", [*looked_at, *own, "--output-dir", f"analysed/{name}"])
            for name, own in models.items()
        },
    }


def commands_of_repeat(arguments: argparse.Namespace) -> dict[str, Command]:
    """By name: the run, each of whose steps has all of its questions, some of every kind."""
    items = (arguments.folder / TRAINING).read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = items[:: len(items) // _NUM_REPEATED][:_NUM_REPEATED]
    write_atomically(arguments.folder / REPEATED, "".join(chosen))
    trained = ["--model", WARM, "--data", REPEATED, "--eval-data", HELD_OUT, "--eval-items", "2", "--eval-samples", "0"]
    trained += ["--objective", "opd", "--group-size", "2", "--questions-per-step", str(_NUM_REPEATED), "--num-steps", "20"]
    trained += ["--learning-rate", "5e-4", "--dtype", arguments.dtype]
    return {"repeat": ("repeated/evaluation.json", ["-m", "tars_fast.train", *trained, "--output-dir", "repeated"])}


def commands_of_vllm(_: argparse.Namespace) -> dict[str, Command]:
    """By name: the run, in float32 so that nothing but a fault tells the two apart."""
    trained = ["--model", WARM, "--data", TRAINING, "--eval-data", HELD_OUT, "--eval-items", "2", "--eval-samples", "0"]
    trained += ["--engine", "vllm", "--objective", "tars", "--num-steps", "3", "--learning-rate", "1e-3"]
    return {"train": ("vllm/evaluation.json", ["-m", "tars_fast.train", *trained, "--output-dir", "vllm"])}


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def run(folder: Path, commands: Mapping[str, Command]) -> Mapping[str, float]:
    """Seconds by command. Raises SystemExit where one has been run with other arguments."""
    path = folder / "commands.json"
    seconds = {}
    for name, (made, arguments) in commands.items():
        own = read_record(path).get(name, {"arguments": list(arguments), "seconds": 0.0})
        seconds[name] = own["seconds"]
        if not made:
            own["arguments"] = list(arguments)
        if own["arguments"] != list(arguments):
            raise SystemExit(f"{folder}: {name} was run as {shlex.join(own['arguments'])}; name another --folder")
        if (folder / made).is_file():
            continue
        started = time.perf_counter()
        try:
            subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
        finally:
            seconds[name] = own["seconds"] = round(own["seconds"] + time.perf_counter() - started, 1)
            # Read anew: `arms` may run beside what `make` still evaluates.
            write_atomically(path, json.dumps(read_record(path) | {name: own}, indent=1))
    return seconds


def change_of(run: Path) -> dict[str, Any]:
    """What training changed in a run's greedy answers, paired by item."""
    change = json.loads((run / "evaluation.json").read_text())["change"]
    return {key: change[key] for key in _with_interval("speech_accuracy", "text_accuracy")}


def steps_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for folder in runs for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sampled_in_training(runs: Sequence[Path], num_steps: int = 10) -> dict[str, float]:
    """Accuracy of what was sampled from speech in the first and in the last steps, in the mean over runs."""
    steps = [steps_of([folder]) for folder in runs]
    parts = {"first": slice(num_steps), "last": slice(-num_steps, None)}
    return {
        name: statistics.mean(step["accuracy/speech"] for own in steps for step in own[part]) for name, part in parts.items()
    }


def spread_of_rewards(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard deviation of each reward within the spoken groups of a step, in the mean over steps."""
    names = sorted({name for step in steps for name in step if name.startswith("deviation/") and name.endswith("/speech")})
    return {name.split("/")[1]: statistics.mean(step[name] for step in steps if name in step) for name in names}


def inside(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Of an analysis what is compared between arms; of CKA each speech layer with its own text layer."""
    drift, debiased, paths = analysis["drift"]["own"], analysis["alignment"]["debiased"], analysis["paths"]["own"]["mean"]
    own = range(len(debiased["matrix"]))
    figures = {
        "num_items": analysis["num_items"],
        "own_pooled": drift["pooled"],
        "own_pooled_ci95": drift["pooled_ci95"],
        "debiased_cka": [debiased["matrix"][layer][layer] for layer in own],
        "above_mismatched": [debiased["above_mismatched"][layer][layer] for layer in own],
        "above_mismatched_ci95": [debiased["above_mismatched_ci95"][layer][layer] for layer in own],
    }
    figures |= {key: debiased[key] for key in ("best_text_layer", *_with_interval("mean_band_width", "mean_shift"))}
    figures |= {key: paths[key] for key in _with_interval("path_cosine", "monotonicity_cosine")}
    if "change" in analysis:
        names = _with_interval("own_pooled", "path_cosine")
        figures["minus_start"] = {key: analysis["change"][key] for key in names}
    return figures


def _with_interval(*names: str) -> list[str]:
    return [key for name in names for key in (name, f"{name}_ci95")]


def report_make(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    return {"evaluation": json.loads((folder / "evaluated" / "evaluation.json").read_text())}


def report_arms(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The ablation with each arm's rewards and states."""
    arms = arguments.arms.split(",")
    ablation = json.loads((folder / "arms" / "ablation.json").read_text())
    runs = {arm: [path.parent for path in sorted((folder / "arms" / arm).glob("seed-*/evaluation.json"))] for arm in arms}
    steps = {arm: steps_of(own) for arm, own in runs.items()}
    analyses = {arm: json.loads((folder / "analysed" / arm / "analysis.json").read_text()) for arm in ("start", *arms)}
    return {
        "ablation": ablation,
        "changes": {arm: [change_of(path) for path in own] for arm, own in runs.items()},
        "sampled_in_training": {arm: sampled_in_training(own) for arm, own in runs.items()},
        "spread_of_rewards": {arm: spread_of_rewards(own) for arm, own in steps.items()},
        "seconds_of_a_step": {arm: statistics.median(step["seconds/step"] for step in own) for arm, own in steps.items()},
        "inside": {arm: inside(analysis) for arm, analysis in analyses.items()},
    }


def report_repeat(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """By step, before its update, of one spoken completion of each question."""
    steps = steps_of([folder / "repeated"])
    names = ("divergence/speech", "divergence/text", "accuracy/speech")
    return {"num_questions": _NUM_REPEATED, "by_step": {name: [step[name] for step in steps] for name in names}}


def report_vllm(folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """By step, of the completions that vLLM sampled with the weights as they were before the step."""
    steps = steps_of([folder / "vllm"])
    names = ("logprob_diff_max", "logprob_diff_mean", "accuracy/speech", "accuracy/text", "grad_norm")
    return {"by_step": {name: [step[name] for step in steps] for name in names}}


WHAT = {
    "make": (commands_of_make, report_make),
    "arms": (commands_of_arms, report_arms),
    "repeat": (commands_of_repeat, report_repeat),
    "vllm": (commands_of_vllm, report_vllm),
}
"""What there is to run, and what is read of its results."""


def main() -> None:
    # An abbreviation would take arguments of warm_up.py for those of this script.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=WHAT, help="make takes arguments of warm_up.py too")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is made")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of all but vllm: what models compute in; on a processor without AMX bfloat16 takes twice as long",
    )
    arms = parser.add_argument_group("arms")
    arms.add_argument("--arms", default="grpo,tars,opd")
    arms.add_argument("--define", action="append", default=[], help="NAME:SETTING=VALUE,... an arm as tars_fast.ablate has it")
    arms.add_argument("--seeds", type=int, default=2)
    arms.add_argument("--num-steps", type=int, default=60)
    arms.add_argument("--jobs", type=int, default=2)
    arms.add_argument("--eval-items", type=int, default=175, help="of the held-out ones, in espeak-ng's voices")
    arms.add_argument("--analysed", type=int, default=40, help="of the held-out ones")
    arms.add_argument("--setting", action="append", default=[], help="SETTING=VALUE of tars_fast.train, for all arms")
    arguments, rest = parser.parse_known_args()
    arguments.warm_up = rest
    if rest and arguments.what != "make":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commands, report = WHAT[arguments.what]
    seconds = run(folder, commands(arguments))
    given = provenance() | {"command": shlex.join(["python", "bench/smol.py", *sys.argv[1:]]), "seconds": seconds}
    write_atomically(arguments.output, json.dumps(given | report(folder, arguments), indent=1) + "\n")


if __name__ == "__main__":
    main()
