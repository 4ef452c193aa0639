"""Figures that README and docs lead with are those of the files in bench/results that they name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tars_fast.config import TrainConfig
from tars_fast.models.memory import plan_memory
from tars_fast.models.registry import PRESETS
from tars_fast.support.text import GB

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
SUMMARY = {
    "speech, greedy %": "speech_accuracy",
    "text, greedy %": "text_accuracy",
    "speech, sampled %": "speech_accuracy_sampled",
    "text, sampled %": "text_accuracy_sampled",
    "MRR, fixed %": "mrr",
    "MRR, same %": "mrr_same_model",
    "behaviour sim. %": "behaviour_similarity",
}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def lines_of(page: str) -> list[str]:
    return (ROOT / page).read_text(encoding="utf-8").splitlines()


def table_of(page: str, head: str) -> list[list[str]]:
    """The cells of each row of the one table whose first line begins so, without that line and the one under it."""
    lines = lines_of(page)
    (place,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    rows = takewhile(lambda line: line.startswith("|"), lines[place + 2 :])
    return [[part.strip() for part in row.split("|")[1:-1]] for row in rows]


def words_of(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def cell(figures: dict, key: str, sign: str = "") -> str:
    """`54.2 [49, 59]`, or as a difference `+18.5 [+13.5, +23.8]`."""
    scale, places = (1 if key.startswith("mrr") else 100), (1 if sign else 0)
    value, (low, high) = scale * figures[key], (scale * bound for bound in figures[f"{key}_ci95"])
    return f"{value:{sign}.1f} [{low:{sign}.{places}f}, {high:{sign}.{places}f}]"


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/evaluation.md"])
def test_the_default_run(page):
    run = read("default_run_cpu.json")
    found = 0
    for line in lines_of(page):
        name, *shown = re.split(r" {2,}", line.strip())
        if name in SUMMARY and shown:
            key = SUMMARY[name]
            possible = {cell(run[part], key) for part in ("before", "after")} | {"-"}
            possible |= {cell(run["change"], key, "+")} if key in run["change"] else set()
            assert set(shown) <= possible, line
            found += 1
    assert found >= 5


def test_other_voices():
    measured = read("neural_voice_cpu.json")
    page = lines_of("docs/evaluation.md")
    rows = [[part.strip() for part in line.split("|")[3:-1]] for line in page if re.search(r"\|.* s \|.*\]", line)]
    expected = [
        [
            f"{measured['data'][name]['mean_seconds']:.2f} s",
            *(cell(measured["accuracy"][model][name]["clean"], "speech_accuracy") for model in ("start", "trained")),
            cell(measured["recognised"][name], "all_words_right"),
        ]
        for name in measured["data"]
    ]
    assert rows == expected
    start, trained = (measured["accuracy"][model] for model in ("start", "trained"))
    run = read("default_run_cpu.json")
    assert [model["espeak-ng"]["clean"]["speech_accuracy"] for model in (start, trained)] == [
        run[part]["speech_accuracy"] for part in ("before", "after")
    ]
    words = words_of("docs/evaluation.md")
    assert f"the most frequent answer is right in {100 * measured['data']['espeak-ng']['most_frequent_answer']:.1f} %" in words
    assert f"answers {100 * trained['Joe']['clean']['text_accuracy']:.1f} % of the same questions" in words
    joe = 100 * trained["Joe"]["clean"]["speech_accuracy"]
    assert f"In a neural voice that it never heard it stays at {joe:.1f} %" in words_of("README.md")


def test_noise_and_telephones():
    measured = read("robustness_cpu.json")["accuracy"]
    words = words_of("docs/evaluation.md")
    at = {
        model: {name: 100 * figures["speech_accuracy"] for name, figures in own["held_out"].items()}
        for model, own in measured.items()
    }
    for name, text in (("noise:20", "with white noise of 20 dB"), ("telephone", "through a telephone")):
        assert f"{at['trained'][name]:.1f} % {text} (before training {at['start'][name]:.1f} %)" in words


def test_the_duration_of_the_default_run():
    minutes, seconds = divmod(round(read("default_run_cpu.json")["seconds_command_to_summary"]), 60)
    for page in ("README.md", "docs/getting-started.md"):
        assert f"{minutes} min {seconds} s on 2 cores" in words_of(page)


def test_the_default_run_in_fewer_steps():
    run = read("default_run_100_steps_cpu.json")
    minutes, seconds = divmod(round(run["seconds_command_to_summary"]), 60)
    # 89.75 and 99.75 are a little less in binary.
    speech, text = (100 * run["after"][f"{modality}_accuracy"] + 1e-6 for modality in ("speech", "text"))
    took = f"With `--num-steps 100` it took {minutes} min {seconds} s"
    assert f"{took}, and ended at {speech:.1f} % from speech and {text:.1f} % from text" in words_of("docs/getting-started.md")


def test_what_the_default_run_reaches():
    """Nine of ten spoken questions, and what README says of the gap."""
    run = read("default_run_cpu.json")
    assert run["after"]["speech_accuracy"] >= 0.9
    gaps = [100 * (run[part]["text_accuracy"] - run[part]["speech_accuracy"]) for part in ("before", "after")]
    accuracies = [100 * run[part]["speech_accuracy"] for part in ("before", "after")]
    text = words_of("README.md")
    # 45.5 and 7.75 are a little less in binary.
    assert "shrinks from {:.1f} to {:.1f} points".format(*(gap + 1e-6 for gap in gaps)) in text
    assert "from speech rises from {:.1f} to {:.1f} %".format(*accuracies) in text
    assert f"({cell(run['change'], 'speech_accuracy', '+')}), from text it stays" in text


def test_the_arms():
    ablation = read("ablation_pocket/ablation.json")
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines_of("docs/ablations.md") if line.startswith("|")]
    tables = {row[0].split()[0].strip("`"): row[1:] for row in rows if len(row) == 6}
    for arm, figures in {"before": ablation["start"], **ablation["arms"]}.items():
        keys = ("speech_accuracy", "speech_accuracy_sampled", "text_accuracy")
        assert tables[arm][:3] == [cell(figures, key) for key in keys]
    for arm, figures in ablation["minus_grpo"].items():
        assert tables[arm][3] == cell(figures, "speech_accuracy", "+")
        assert float(tables[arm][4]) == pytest.approx(figures["speech_accuracy_p_holm"], abs=0.005)
    assert "+1.7 [-1.7, +5.4], five seeds each, p = 0.83" in words_of("README.md")


def test_what_summing_and_sharing_out_cost():
    report, page = read("sharding_cpu.json"), words_of("docs/several-gpus.md")
    lora, full = (report["reduction"][name]["ratio_to_one_by_one"] for name in ("lora", "full"))
    step = report["step"]["ratio_to_replicated"]["shared out"]["median"]
    assert f"one bucket takes {lora['one bucket']['median']:.2f} times as long as one call each" in page
    to_owners = full["to owners"]
    assert f"buckets to their owners {to_owners['median']:.2f} times as long as one call each" in page
    assert "between {:.2f} and {:.2f}".format(*to_owners["range"]) in page
    assert f"takes {step:.2f} times as long as one where" in page


def test_full_fine_tuning_on_several_cards():
    """The table is what `plan` computes now."""
    rows = table_of("docs/models-and-hardware.md", "| model, GPUs |")
    assert len(rows) >= 5
    for row in rows:
        name, *shown = row
        model, number = re.fullmatch(r"`(.*)`, (\d+)", name).groups()
        config = TrainConfig(model=model, lora_rank=0, objective="tars")
        preset = config.as_preset(PRESETS[model])
        workload = replace(config.workload(preset, preset.architecture, "vllm", 2), num_processes=int(number))
        plan = plan_memory(workload, 80 * GB)
        phase = max(plan.peaks, key=plan.peaks.get)
        most = plan.peaks[phase]
        sizes = [workload.weights, workload.optimiser, workload.gradients, most, workload.sent_bytes]
        expected = [f"{one / GB:.1f} GB" if one else "-" for one in sizes]
        excess = most - 0.95 * 80 * GB
        expected[3] += f", {phase}" if plan.fits else f", {phase}; {excess / GB:.1f} GB too much"
        assert shown == expected, row


@pytest.mark.parametrize(
    ("task", "folder", "table"),
    [
        ("pocket", "evidence_pocket", "| arm | rate |"),
        ("pocket", "evidence_pocket_objectives", "| arm of all objectives | rate |"),
        ("pocket-hard", "evidence_pocket-hard", "| arm of `pocket-hard` | rate |"),
        ("pocket-hard", "evidence_pocket-hard_objectives", "| arm of all objectives, `pocket-hard` | rate |"),
    ],
)
def test_the_other_objectives(task, folder, table):
    ablation = read(f"{folder}/ablation.json")
    start, *arms = table_of("docs/ablations.md", table)
    keys = ("speech_accuracy_sampled", "speech_accuracy", "text_accuracy_sampled", "text_accuracy")
    assert start[2:6] == [cell(ablation["start"], key) for key in keys]
    assert {len(own["seeds"]) for own in ablation["arms"].values()} == {5}
    names = {f"`{name}`": name for name in ("grpo", "rep", "beh", "tars")}
    names |= {
        "`opd`, `--text-anchor none`": "opd",
        "`opd` with its anchor, the default": "opd-anchored",
        "`tars+opd`": "tars-opd",
    }
    names |= {"`opd`, `--teacher moving`": "opd-moving", "`cord`, `--teacher moving`": "cord"}
    names["`opd`, eight spoken completions"] = "opd-8"
    chosen = read(f"evidence_{task}_rates.json")["arms"]
    baseline = f"grpo_{chosen['grpo']['chosen']}"
    minus = ablation[f"minus_{baseline}"]
    assert set(ablation["arms"]) == {f"{names[name]}_{rate}" for name, rate, *_ in arms}
    if folder == "evidence_pocket_objectives":
        heard = read(f"{folder}/neural_voice.json")
        key = "speech_accuracy_sampled"
        expected = [cell(heard["start"], key), *(cell(heard["arms"][f"{names[name]}_{rate}"], key) for name, rate, *_ in arms)]
        assert [row.pop() for row in (start, *arms)] == expected
        assert all(own[f"{key}_ci95"][0] < 0.098 for own in heard["arms"].values()), "more than the most frequent answer gets"
    for name, rate, *figures, difference, p in arms:
        arm = f"{names[name]}_{rate}"
        assert chosen[names[name]]["chosen"] == rate
        assert figures == [cell(ablation["arms"][arm], key) for key in keys]
        if arm != baseline:
            assert difference == cell(minus[arm], "speech_accuracy_sampled", "+")
            assert float(p) == pytest.approx(minus[arm]["speech_accuracy_sampled_p_holm"], rel=0.05)


def test_every_objective_in_short():
    arms, page = read("evidence_pocket_objectives/ablation.json")["arms"], words_of("docs/ablations.md")
    names = ("cord_8e-4", "tars-opd_8e-4", "opd-8_8e-4", "opd-anchored_8e-4")
    cord, both, eight, default = (100 * arms[name]["speech_accuracy_sampled"] for name in names)

    def p_of(one: str, other: str) -> str:
        seeds = (arms[name]["speech_accuracy_sampled_by_seed"] for name in (one, other))
        return f"{stats.ttest_rel(*seeds).pvalue:.2f}"

    assert f"end {cord - default:.1f} and {both - default:.1f} points above the default" in page
    assert f"ends {eight - default:.1f} points higher itself, {cord - eight:.1f} and {both - eight:.1f} below the two" in page
    assert f"p = {p_of(names[0], names[2])} and {p_of(names[1], names[2])}" in page
    assert "half the tokens: {}, {} and {})".format(*(p_of(name, names[3]) for name in names[:3])) in page
    rounded = [f"{round(arms[name]['sampled_tokens'], -3):,.0f}" for name in names]
    assert f"({rounded[2]}; {rounded[0]} and {rounded[1]})" in page
    assert arms[names[0]]["sampled_tokens"] == pytest.approx(2 * arms[names[3]]["sampled_tokens"], rel=0.01)
    plain = max(arms["grpo_4e-4"]["speech_accuracy_sampled_by_seed"])
    assert all(min(arms[name]["speech_accuracy_sampled_by_seed"]) > plain for name in (*names, "opd-moving_8e-4"))


def test_every_objective_on_the_harder_task_in_short():
    ablation = read("evidence_pocket-hard_objectives/ablation.json")
    arms, minus = ablation["arms"], ablation["minus_grpo_4e-4"]
    best = max(arms["grpo_4e-4"]["speech_accuracy_sampled_by_seed"])
    default = arms["opd-anchored_4e-4"]
    for name in ("opd-anchored_4e-4", "opd-moving_4e-4", "cord_4e-4", "tars-opd_4e-4"):
        assert min(arms[name]["speech_accuracy_sampled_by_seed"]) > best, "in every seed"
        assert minus[name]["speech_accuracy_sampled_ci95"][0] > 0
        assert 0.055 < minus[name]["speech_accuracy_sampled"] < 0.075
        assert f"{minus[name]['speech_accuracy_sampled_p_holm']:.4f}" == "0.0096"
        assert -0.0025 < arms[name]["speech_accuracy_sampled"] - default["speech_accuracy_sampled"] < 0.0085
        if name != "opd-anchored_4e-4":
            seeds = (own["speech_accuracy_sampled_by_seed"] for own in (arms[name], default))
            assert stats.ttest_rel(*seeds).pvalue > 0.085
    for name in ("rep_4e-4", "beh_2e-4"):
        assert minus[name]["speech_accuracy_sampled_ci95"][0] < 0


def test_variants_of_tars():
    found = read("evidence_pocket-hard_variants.json")
    names = {
        "`tars`, the paper's": "tars",
        "`--representation-centre`": "centred",
        "`--reward-scaling z-score`": "z-score",
        "`--reward-scaling rank`": "rank",
        "centred states and z-scores": "centred-z-score",
        "`--representation-weight 5 --behaviour-weight 5`": "weights-5",
        "`--representation-layers deep`": "deep",
        "`--representation-layers last`": "last",
        "`--behaviour-model`, a sentence embedder": "embeddings",
    }
    rows = table_of("docs/ablations.md", "| variant of TARS |")
    tried = {(name, rate) for name, arm in found["arms"].items() for rate in arm["tried"]}
    assert {(names[name], rate) for name, rate, *_ in rows} == tried
    for name, rate, *figures, difference in rows:
        own = found["arms"][names[name]]["tried"][rate]
        assert figures == [f"{100 * own[key]:.1f}" for key in ("speech_accuracy_sampled", "text_accuracy_sampled")], name
        if names[name] != "tars":
            minus = found[f"minus_tars_{rate}"][f"{names[name]}_{rate}"]
            assert difference == cell(minus, "speech_accuracy_sampled", "+"), name
    lost = found["arms"]["weights-5"]["tried"]["2e-4"]["most_lost_in_text"]
    assert f"in one seed of two they cost {100 * lost:.1f} points of text" in words_of("docs/ablations.md")
    assert found["seeds"] == 2


def test_the_other_objectives_in_short():
    easier, harder = (read(f"evidence_{task}/ablation.json") for task in ("pocket", "pocket-hard"))
    text, page = words_of("README.md"), words_of("docs/ablations.md")
    best = easier["minus_grpo_4e-4"]["opd-anchored_8e-4"]
    assert f"ends at {100 * easier['arms']['opd-anchored_8e-4']['speech_accuracy']:.1f} % greedy" in text
    low, high = (100 * bound for bound in best["speech_accuracy_sampled_ci95"])
    assert f"{100 * best['speech_accuracy_sampled']:.1f} points above plain GRPO ([{low:+.1f}, {high:+.1f}]" in text
    assert f"text greedy {100 * best['text_accuracy']:+.1f}, with half the sampled tokens" in text
    ends = [100 * harder["arms"][arm]["speech_accuracy_sampled"] for arm in ("opd-anchored_4e-4", "grpo_4e-4")]
    begins = 100 * harder["start"]["speech_accuracy_sampled"]
    best = harder["minus_grpo_4e-4"]["opd-anchored_4e-4"]
    assert f"starts at {begins:.1f} %, it ends at {ends[0]:.1f} % and plain GRPO at {ends[1]:.1f} %" in text
    assert f"({cell(best, 'speech_accuracy_sampled', '+')}), text greedy {100 * best['text_accuracy']:+.1f}" in text
    assert f"rises by {ends[0] - begins:.1f} points where plain GRPO rises by {ends[1] - begins:.1f}" in page
    for ablation, arms in ((easier, ("opd-anchored_8e-4", "grpo_4e-4")), (harder, ("opd-anchored_4e-4", "grpo_4e-4"))):
        assert "{:,.0f} against {:,.0f}".format(*(round(ablation["arms"][arm]["sampled_tokens"], -3) for arm in arms)) in page
        seeds = [ablation["arms"][arm]["speech_accuracy_sampled_by_seed"] for arm in arms]
        assert min(seeds[0]) > max(seeds[1]), "in every seed"


def test_routing_with_and_without_replay():
    arms = read("engine_qwen3_omni_2_layers_cpu.json")["arms"]
    apart, replayed = arms["shared"], arms["shared_replay"]
    page = words_of("docs/models-and-hardware.md")
    assert f"{100 * apart['other_experts']:.1f} % of the tokens would go through other experts" in page
    differ = f"differ by {apart['logprob_diff_mean']:.4f} nats in the mean and {apart['logprob_diff_max']:.3f} at most"
    assert f"{differ}; with replay by {replayed['logprob_diff_mean']:.4f} and {replayed['logprob_diff_max']:.3f}" in page


def test_the_start_of_pocket_hard():
    """The table, and that the task is what it is said to be."""
    measured = read("pocket_hard_start.json")
    columns = [measured["start"]["validation"], measured["start"]["held_out"], measured["supervised"]["held_out"]]
    page = lines_of("docs/models-and-hardware.md")
    for label, key in (
        ("speech, greedy %", "speech_greedy"),
        ("speech, sampled %", "speech_sampled"),
        ("text, sampled %", "text_sampled"),
        ("groups of 4 spoken completions all wrong %", "groups_all_wrong"),
        ("of these, with different numbers of right steps %", "all_wrong_groups_that_differ_in_right_steps"),
        ("wrong chains answered right, by chance %", "wrong_chains_answered_right"),
    ):
        assert f"| {label} | {' | '.join(f'{column[key]:.1f}' for column in columns)} |" in page
    for start in columns[:2]:
        assert start["text_sampled"] >= 98
        assert 5 <= start["speech_greedy"] <= 30
        assert start["groups_all_wrong"] >= 60
        assert start["all_wrong_groups_that_differ_in_right_steps"] >= 60
    assert abs(columns[0]["speech_greedy"] - columns[1]["speech_greedy"]) <= 3, "voices equally hard"


def test_the_training_step():
    contenders = read("train_step_cpu.json")["cases"]["pocket"]["contenders"]
    page = "\n".join(lines_of("docs/how-a-step-works.md"))
    ours = contenders["ours"]["median_seconds"]
    for name, label in (
        ("ours", "ours"),
        ("released", "released TARS code"),
        ("trl", "TRL 1.16"),
        ("trl_single_pass", "trl_single"),
    ):
        one = contenders[name]
        row = next(line for line in page.splitlines() if line.startswith(("| " + label, "| `" + label)))
        assert f"{one['forward_positions']:,} / {one['backward_positions']:,}" in row
        assert f"| {one['median_seconds']:.2f} |" in row
        assert name == "ours" or f"{one['median_seconds'] / ours:.1f} x" in row
    readme = words_of("README.md")
    for name in ("ours", "released", "trl"):
        assert f"{contenders[name]['median_seconds']:.2f} s" in readme


def test_the_alignment_path():
    made = read("alignment_path_pocket.json")
    page = words_of("docs/inside-a-model.md")
    models, own = made["checkpoints"]["models"], made["paths"]
    first, last = own["pocket"], own["checkpoint-60"]
    gaps = [100 * models[name]["accuracy_gap"] for name in ("pocket", "checkpoint-60")]
    assert f"the gap falls from {gaps[0]:.1f} to {gaps[1]:.1f} points" in page
    assert (
        f"the cosine is {first['own']['path_cosine']:.3f}, with another item's text {first['mismatched']['path_cosine']:.3f}"
        in page
    )
    order = [first[kind]["monotonicity_cosine"] for kind in ("own", "mismatched")]
    assert f"(rank correlation {order[0]:.3f} and {order[1]:.3f})" in page
    found = {name: own["mean"] for name, own in made["checkpoints"]["correlation"].items()}
    ends = made["checkpoints"]["correlation"]["path_cosine"]["mean_ci95"]
    distances, cosines, others = (
        f"{first[kind][name]:{spec}} to {last[kind][name]:{spec}}"
        for kind, name, spec in (
            ("own", "path_distance", ".1f"),
            ("own", "sequence_cosine", ".3f"),
            ("mismatched", "sequence_cosine", ".3f"),
        )
    )
    assert f"({distances}, r = {found['path_distance']:+.2f} over the seven models)" in page
    assert f"(r = {found['path_cosine']:+.2f} [{ends[0]:.2f}, {ends[1]:+.2f}])" in page
    assert f"({cosines}, r = {found['sequence_cosine']:+.2f})" in page
    assert f"({others})" in page
    assert f"(own, pooled: r = {found['own_pooled']:.2f})" in page
    assert len(models) == 7
    lost = {name: -100 * own["change"]["speech_accuracy"] for name, own in made["interventions"].items() if "change" in own}
    early = [value for name, value in lost.items() if name.startswith(("angle_0", "angle_1"))]
    assert f"costs {min(early):.0f} to {max(early):.0f} points" in page
    assert f"their length {lost['length_0_lowest_3']:.0f} and {lost['length_0_all']:.0f}" in page


def test_kernels_on_a_gpu():
    columns = ["eager", "torch.compile", "liger-kernel", "trl", "cut-cross-entropy"]
    rows = {}
    for row in read("kernels_nvidia_h100_80gb_hbm3.json")["kernels"]:
        if row["gradient"] and row["shape"]["num_tokens"] == 4096:
            rows.setdefault(row["operation"], {})[row["contender"]] = row
    lines = lines_of("docs/kernels.md")
    assert len(rows) == 5
    for name, found in rows.items():
        (line,) = [line for line in lines if re.match(rf"\| `{name}` \| [\d.]+ \|", line)]
        ours, share, *peers = [part.strip() for part in line.strip("| ").split("|")][1:]
        assert ours == f"{found['tars_kernels']['median_ms']:.2f}"
        assert share in ("-", f"{found['tars_kernels']['percent_of_ceiling']:.0f} % of a {found['tars_kernels']['limit']}")
        assert peers == [f"{found[peer]['median_ms']:.2f}" if peer in found else "-" for peer in columns]


@pytest.mark.parametrize(
    ("file", "arm", "pages"),
    [
        ("engine_nvidia_h200.json", "shared", ("README.md", "docs/models-and-hardware.md")),
        ("engine_8_questions_nvidia_h200.json", "shared", ("README.md", "docs/models-and-hardware.md")),
        ("engine_qwen3-omni-30b_nvidia_h200.json", "shared_replay", ("README.md", "docs/models-and-hardware.md")),
    ],
)
def test_one_copy_on_a_gpu(file, arm, pages):
    own = read(file)["arms"][arm]
    peak, plan, seconds = max(own["peak_gb"].values()), max(own["plan_gb"].values()), own["median_seconds"]
    (row,) = [
        line for line in lines_of("docs/architecture.md") if f"(../bench/results/{file})" in line and line.startswith("|")
    ]
    _, speed, rollout, training, *memory = [part.strip() for part in row.strip("| ").split("|")]
    assert speed == f"{own['median_tokens_per_second']:,.0f}"
    assert rollout == f"{seconds['rollout']:.1f} s"
    assert float(training.removesuffix(" s")) == pytest.approx(seconds["training"], abs=0.05)
    assert memory == [f"{peak:.1f} GB", f"{plan:.1f}"]
    for page in pages:
        assert f"{peak:.1f} GB" in words_of(page) or f"{peak:.1f} and {plan:.1f}" in words_of(page)
        assert f"{plan:.1f}" in words_of(page)


def test_one_copy_beside_two():
    arms = read("engine_nvidia_h200.json")["arms"]
    page = words_of("docs/architecture.md")
    assert f"{max(arms['two_copies']['peak_gb'].values()):.1f} GB without any training" in page
    for arm in ("two_copies", "shared_no_adapter"):
        assert f"{arms[arm]['median_tokens_per_second']:,.0f}" in page
    whole = read("engine_8_questions_nvidia_h200.json")["arms"]["shared"]["median_seconds"]
    assert f"takes {whole['rollout'] + whole['training']:.1f} s of an H200" in words_of("README.md")


def test_what_rewards_cost():
    run = read("rewards_cpu.json")
    assert run["python"]["added_percent_of_step"] < 2
    page = words_of("docs/adding-a-reward.md")
    assert (
        f"add {1000 * run['python']['added_seconds_reward']:.1f} ms, {run['python']['added_percent_of_step']:.2f} % of a step"
        in page
    )
    waits, overlaps = (run["judge"][arm]["seconds/after sampling"] for arm in ("waits", "overlaps"))
    assert f"needs {run['judge']['waits']['seconds/wait']:.1f} s for the {run['judge']['answers']} answers" in page
    assert f"what follows sampling takes {waits:.1f} s, beside the passes, as training has it, {overlaps:.1f} s" in page


def test_objectives_on_a_gpu():
    objectives = read("objectives_nvidia_h200.json")["objectives"]
    page = words_of("docs/rewards-and-objectives.md")
    shown = {"`tars`": "tars", "`grpo`": "grpo", "`opd`": "opd", "anchored": "opd, anchored", "`tars+opd`": "tars+opd"}
    for name, arm in shown.items():
        assert f"{name} {objectives[arm]['seconds/update']:.2f} s" in page


def test_a_step_on_a_gpu():
    seconds = read("train_step_nvidia_h100_80gb_hbm3.json")["seconds"]
    page = words_of("docs/how-a-step-works.md")
    assert all(f"{seconds[name]:.1f} s" in page for name in ("ours", "released", "trl"))
    assert f"{seconds['ours']:.1f}, {seconds['trl']:.1f} and {seconds['released']:.1f} s" in words_of("README.md")


def test_an_update_by_objective():
    seconds = {name: own["seconds/update"] for name, own in read("objectives_cpu.json")["objectives"].items()}
    said = (
        f"`tars` {seconds['tars']:.2f} s, `grpo` {seconds['grpo']:.2f} s, `opd` {seconds['opd']:.2f} s, anchored "
        f"{seconds['opd, anchored']:.2f} s, `tars+opd` {seconds['tars+opd']:.2f} s"
    )
    assert said in words_of("docs/rewards-and-objectives.md")


def test_scaling_on_one_card_and_apart():
    """The table of measured times, and what follows from a line through them."""
    page, lines = words_of("docs/scaling.md"), lines_of("docs/scaling.md")
    measured = {
        1: read("engine_nvidia_h200.json")["arms"]["shared"],
        8: read("engine_8_questions_nvidia_h200.json")["arms"]["shared"],
    }
    seconds = {k: (arm["median_seconds"]["rollout"], arm["median_seconds"]["training"]) for k, arm in measured.items()}
    (fixed, each), (start, token) = (
        (first - (last - first) / 7, (last - first) / 7) for first, last in zip(seconds[1], seconds[8], strict=True)
    )
    assert f"{fixed:.2f} s + {each:.2f} s a question" in page
    assert f"the longer of {fixed:.2f} s + {each:.2f} s x k / f and {start:.2f} s + {token:.2f} s x k / (1 - f)" in page
    together = {k: sum(both) for k, both in seconds.items()}
    assert f"takes {together[8]:.2f} s on one card and {together[1]:.2f} s on eight, {together[8] / together[1]:.1f}" in page
    assert f"the longer of the two: {max(seconds[8]):.2f} s" in page
    gains = []
    for k, (rollout, training) in seconds.items():
        assert f"| {k} | {rollout:.2f} s | {training:.2f} s | {together[k]:.2f} s |" in lines
        parts = [part / 1000 for part in range(1, 1000)]
        best, part = min((max(fixed + each * k / f, start + token * k / (1 - f)), f) for f in parts)
        assert f"| {k} | {together[k]:.2f} s | {best:.2f} s (f = {part:.2f}) | {100 * fixed / together[k]:.0f} % |" in lines
        gains.append(together[k] / best)
        if k == 1:
            assert together[k] - best < 1.24, "more than is won"
    assert f"Apart is {gains[0]:.2f} and {gains[1]:.2f} times as fast" in page
    peak = max(measured[1]["peak_gb"].values())
    two = max(read("engine_nvidia_h200.json")["arms"]["two_copies"]["peak_gb"].values())
    assert f"{peak:.1f} GB instead of {two:.1f} GB" in page


def test_idle_time_and_512_cards():
    page, lines = words_of("docs/scaling.md"), lines_of("docs/scaling.md")
    result = read("balance.json")
    rows = {(row["ranks"], row["questions a rank"]): row for row in result["training"] if row["deviation over mean"] == 0.5}
    for ranks in (8, 64, 512):
        row = rows[ranks, 4]
        idle = [f"{100 * row[name]:.1f} %" for name in ("idle by number", "idle exchanged")]
        assert f"| {ranks} | {' | '.join(idle)} | {100 * row['part of questions moved']:.0f} % |" in lines
    after = {per_rank: f"{100 * rows[512, per_rank]['idle exchanged']:.0f} %" for per_rank in (1, 2, 8)}
    assert f"nothing can move: {after[1]} of 512" in page
    assert f"With two it falls to {after[2]}, with eight to {after[8]}." in page
    four = rows[512, 4]
    prompts = [f"{100 * four[name]:.0f} %" for name in ("idle of prompts by tokens", "idle of prompts by number")]
    assert f"{prompts[0]} instead of {prompts[1]} is idle" in page
    assert f"{100 * four['idle of sampling']:.0f} % of the time is idle at four" in page
    assert f"An exchange moves {four['megabytes moved a process']:.1f} MB a process" in page
    assert f"| {four['megabytes moved a process'] / 1000:.4f} GB |" in page
    assert f"finds the moves in {four['milliseconds to find moves']:.0f} ms" in page
    assert f"costs {result['two processes']['watching a call, microseconds']:.1f} microseconds a call" in page
    seconds = read("engine_8_questions_nvidia_h200.json")["arms"]["shared"]["median_seconds"]
    idle = [rows[512, 8][name] for name in ("idle by number", "idle exchanged")]
    assert f"idle is {100 * idle[0]:.1f} % by number and {100 * idle[1]:.1f} % by tokens" in page
    steps = [seconds["rollout"] + seconds["training"] / (1 - part) for part in idle]
    assert f"{steps[0]:.2f} s by number and {steps[1]:.2f} s by tokens, {512 * 8 / steps[1]:.0f} questions a second" in page


def test_communication():
    page = words_of("docs/scaling.md")
    preset = PRESETS["qwen2-audio-7b"]
    adapters, full = (
        TrainConfig(lora_rank=rank).workload(
            TrainConfig(lora_rank=rank).as_preset(preset), preset.architecture, "vllm", dtype_bytes=2
        )
        for rank in (8, 0)
    )
    assert f"{adapters.gradients / 1e6:.1f} MB are {adapters.num_trained:,} weights" in page
    assert f"{full.gradients / 1e9:.1f} GB are {full.num_trained / 1e9:.2f} billion weights in bfloat16" in page
    for sent in (2 * adapters.gradients, 2 * full.gradients):
        sent = 511 / 512 * sent / 1e9
        digits = 2 if sent < 1 else 1
        assert f"| {sent:.{digits}f} GB | {sent / 12.5:.2f} s | {sent / 50:.2f} s |" in page
    assert f"{full.gradients / 1e9 / 12.5:.2f} s at 12.5 GB/s, more than is won" in page


def test_what_a_checkpoint_costs():
    measured = read("checkpoints_cpu.json")
    saving, steps = measured["median_seconds_in_saving"], measured["median_seconds_of_two_steps"]
    words = words_of("docs/training.md")
    assert f"the bundled model's {measured['checkpoint_bytes'] / 1e6:.1f} MB" in words
    assert f"spent {saving['background']:.2f} s in a checkpoint instead of the {saving['waited for']:.2f} s of one" in words
    both = f"took {steps['background']:.2f} s instead of {steps['waited for']:.2f} s"
    assert f"{both}, and {steps['none']:.2f} s without any" in words


def test_what_a_kill_costs():
    log = read("kill_log_elastic.json")
    seconds = sorted(kill["seconds_to_first_new_step"] for kill in log["kills"])
    words = words_of("docs/several-gpus.md")
    assert f"Of {log['kills_made']} kills" in words
    quick = [one for one in seconds if one < 60]
    assert f"{quick[0]:.0f} to {quick[-1]:.0f} s after {len(quick)} of them" in words
    assert "after two of them {:.0f} and {:.0f} s".format(*seconds[len(quick) :]) in words
    for kill in log["kills"]:
        assert kill["went_on_with_step"] > kill["newest_checkpoint"]


def test_two_processes_against_one():
    report, page = read("equality_cpu.json"), lines_of("docs/several-gpus.md")
    for figures in report["questions"].values():
        assert figures["same_weights_in_both"]
        assert any(line.endswith(f"| {figures['weights']:.0e} | {figures['gradient_norm']:.0e} |") for line in page)
    for family, name in (("qwen2-audio", "Qwen2-Audio"), ("qwen2.5-omni", "Qwen2.5-Omni")):
        for kind, shown in (("full", "full"), ("lora", "LoRA")):
            parts = [own for part, own in report["weights"][family].items() if part.startswith(f"{kind},")]
            names = ("logprobs", "pooled", "gradients", "engine_logprobs")
            most = [max(part[name] for part in parts if name in part) for name in names]
            assert max(most) < 1e-4
            assert " | ".join([f"| {name}, {shown}", *(f"{value:.0e}" for value in most)]) + " |" in page


def test_the_collapse_of_a_moving_teacher():
    looks = {look["step"]: look for look in read("evidence_pocket_collapse.json")["steps"]}
    words = words_of("docs/rewards-and-objectives.md")
    best = max(looks.values(), key=lambda look: look["accuracy/speech"])
    assert f"{100 * best['accuracy/speech']:.0f} % of what it sampled from speech was right at step {best['step']}" in words
    assert looks[115]["truncated/speech"] == 1
    moved = [f"{looks[step]['written_kl']:.2f}" for step in (105, 110, 115)]
    assert f"{moved[0]} nats a token at step 105, {moved[1]} at step 110 and {moved[2]} at step 115" in words
    limit = TrainConfig().max_written_kl
    assert looks[105]["written_kl"] < limit < looks[110]["written_kl"]
    assert f"the watch stops such a run at {limit}" in words


def test_the_model_of_pretrained_parts():
    report, other = read("smol_cpu.json"), read("smol_bfloat16_cpu.json")
    lines, words = lines_of("examples/smol/README.md"), words_of("examples/smol/README.md")
    espeak, joe = report["evaluation"]["held_out"], report["evaluation"]["neural"]
    names = ("350, in espeak-ng's voices that training never heard", "the same, in the neural voice of Joe")
    rows = [
        [name, *(cell(items, key) for key in ("speech_accuracy", "text_accuracy", "speech_unparsed"))]
        for name, items in zip(names, (espeak, joe), strict=True)
    ]
    assert table_of("examples/smol/README.md", "| held-out questions |") == rows
    for items in (espeak, joe):
        assert items["num_items"] == 350
        assert items["text_accuracy"] >= 0.85, "what the warm-up is to reach"
        assert items["speech_accuracy_ci95"][1] < items["text_accuracy_ci95"][0], "a gap to be closed"
    others = [f"{100 * other['evaluation']['held_out'][key]:.1f} %" for key in ("speech_accuracy", "text_accuracy")]
    assert "gave {} from speech and {} from text".format(*others) in words
    heard = [cell(items, "speech_accuracy").replace(" ", " % ", 1) for items in (joe, espeak)]
    assert f"{heard[0]} of its held-out questions right in Joe's voice and {heard[1]}" in words_of("docs/evaluation.md")
    kinds = {
        "story": "two or three sums in a story",
        "comparison": "who has most or fewest",
        "order": "orders",
        "counting": "days and months counted on",
        "month_lengths": "lengths of months",
        "legs": "legs of animals",
        "alphabet": "the alphabet",
    }
    for kind, own in espeak["categories"].items():
        accuracies = (own["speech_accuracy"], joe["categories"][kind]["speech_accuracy"], own["text_accuracy"])
        assert f"| {kinds[kind]} | {' | '.join(f'{100 * accuracy:.0f}' for accuracy in accuracies)} |" in lines
    seconds = report["seconds"]
    spoken = seconds["speak training"] + seconds["speak held_out"]
    assert f"assembling {seconds['assemble']:.0f} s, speaking all questions {spoken:.0f} s" in words
    assert f"the warm-up {seconds['warm up'] / 60:.0f} min on two threads" in words
    assert report["command"].partition(" --output ")[2].partition(" ")[2] in words


def test_objectives_on_pretrained_weights():
    found = read("smol_arms_cpu.json")
    arms, minus, inside = found["ablation"]["arms"], found["ablation"]["minus_grpo"], found["inside"]
    rows = table_of("docs/ablations.md", "| arm on pretrained weights |")
    assert [name.strip("`") for name, *_ in rows] == ["before training", *arms]
    names = ("speech_accuracy", "text_accuracy")
    for name, *shown in rows:
        own = arms.get(name.strip("`"), found["ablation"]["start"])
        assert shown[:2] == [cell(own, key) for key in names], name
        if difference := minus.get(name.strip("`")):
            assert shown[2:] == [cell(difference, key, "+") for key in names], name
    rewards = ("accuracy", "format", "representation", "behaviour")
    rows = table_of("docs/ablations.md", "| spread within groups, pretrained weights |")
    for name, *shown in rows:
        own = found["spread_of_rewards"][name.strip("`")]
        assert shown == [f"{own[key]:.4f}" if key in own else "" for key in rewards], name
    assert len(rows) == len(arms)
    figures = {
        "cosine of pooled completion states": ("own_pooled", 4),
        "CKA of prompts, debiased": ("debiased_cka", 3),
        "Alignment Path Score": ("path_cosine", 4),
    }
    rows = table_of("docs/ablations.md", "| mean over layers, pretrained weights |")
    assert [name for name, *_ in rows] == list(figures)
    models = [inside[name] for name in ("start", *arms)]
    for name, *shown in rows:
        key, places = figures[name]
        assert shown == [f"{np.mean(own[key]):.{places}f}" for own in models], name
    # What is said of single runs and layers.
    changes = [found["changes"][arm] for arm in arms]
    assert all(len(own) == 2 for own in changes), "two seeds each"
    assert all(run[f"{key}_ci95"][0] < 0 < run[f"{key}_ci95"][1] for own in changes for run in own for key in names)
    page = words_of("docs/ablations.md")
    sampled = [
        f"{100 * own['first']:.0f} % and {100 * own['last']:.0f} % with `{arm}`"
        for arm, own in found["sampled_in_training"].items()
    ]
    assert ", ".join(sampled) in page
    assert all(own["last"] < own["first"] for own in found["sampled_in_training"].values())
    changed = {
        key: {
            arm: [np.sign(low) if low * high > 0 else 0 for low, high in inside[arm]["minus_start"][f"{key}_ci95"]]
            for arm in arms
        }
        for key in ("own_pooled", "path_cosine")
    }
    assert {arm: own.count(1) for arm, own in changed["own_pooled"].items()} == {"grpo": 1, "tars": 1, "opd-1e-3": 22}
    assert all(own[-1] == 1 and -1 not in own for own in changed["own_pooled"].values())
    assert [changed["path_cosine"][arm].count(-1) for arm in ("grpo", "tars")] == [30, 29]
    assert changed["path_cosine"]["opd-1e-3"].count(1) == 24
    last = [f"{model['own_pooled'][-1]:.3f}" for model in models]
    assert "from a cosine of {} to {}, {} and {}".format(*last) in page
    assert f"{found['seconds']['arms'] / 3600:.1f} hours of one or two cores" in page
    repeated = read("smol_repeat_cpu.json")
    divergences, right = (repeated["by_step"][f"{name}/speech"] for name in ("divergence", "accuracy"))
    number = repeated["num_questions"]
    learned = f"from {divergences[0]:.3f} to {divergences[-1]:.4f} nats a token in {len(right)} steps"
    learned += f", and right answers rise from {number * right[0]:.0f} of {number} to {number * right[-1]:.0f}"
    assert learned in page
    earlier = read("smol_arms_earlier_cpu.json")["ablation"]
    assert f"which heard less ({100 * earlier['start']['speech_accuracy']:.1f} % of {earlier['num_items']} questions)" in page
    gains, lost = ([100 * (own[key] - earlier["start"][key]) for own in earlier["arms"].values()] for key in names)
    assert f"gave {min(gains):.0f} to {max(gains):.0f} points" in page
    assert f"cost the policy gradients {-lost[1]:.1f} to {-lost[0]:.1f} points of text" in page
    words = words_of("examples/smol/README.md")
    for modality, key in zip(("speech", "text"), names, strict=True):
        shown = [f"{100 * own[key]:.1f}" for own in (found["ablation"]["start"], *arms.values())]
        assert "from {} {} % before, {}, {} and {} % after".format(modality, *shown) in words
    assert "A step takes one core {:.0f}, {:.0f} and {:.0f} s".format(*found["seconds_of_a_step"].values()) in words


def test_parity_with_vllm_of_the_model_of_pretrained_parts():
    before, *after = read("smol_vllm_cpu.json")["by_step"]["logprob_diff_max"]
    words = words_of("examples/smol/README.md")
    assert f"at most {before:.1e} from the trainer's before the first update" in words
    assert "at most {:.1e} and {:.1e} after one and two updates".format(*after) in words
    assert max(before, *after) < 1e-4
