"""The terms of the loss beside the policy gradient, each against the same written out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from steps import gradients, rollout_of, save_checkpoint, update
from tars_kernels import LayerPooler
from tars_kernels.reference import linear_distillation_loss

from tars_fast import train as train_command
from tars_fast.config import TrainConfig, parse_objective
from tars_fast.learning import run
from tars_fast.learning.advantages import scaled_in_groups
from tars_fast.learning.metrics import MAX_EMPTY_STEPS, check_progress, check_written, completion_columns, completion_metrics
from tars_fast.learning.objectives.references import References
from tars_fast.learning.objectives.watch import WrittenWatch
from tars_fast.learning.rewards.agreement import agreement
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.update import Learner
from tars_fast.models.checkpoint import checkpoint_bytes
from tars_fast.models.memory import describe, plan_memory
from tars_fast.models.registry import PRESETS, architecture_of
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.train import update_policy
from tars_fast.types import Completion, Modality, Question, TrainingError, UserError


@pytest.fixture
def opd(config):
    # Gradients as they are, not scaled down.
    return dataclasses.replace(config, objective="opd", teacher="moving", text_anchor="none", max_grad_norm=1e9)


def log_distributions(model, prompts, completions):
    """[T, V] of the tokens of these completions, each alone in a row; the audio token, which neither may say, left out."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        packed = model.pack([prompt], [completion])
        logits = model.head(model.forward(packed))
        kept = torch.arange(logits.shape[-1]) != model.prompts.audio_token_id
        rows.append(logits[:, kept].double().log_softmax(-1))
    return torch.cat(rows)


def shift(model, seed=0, scale=0.02):
    """Change what is trained."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(scale * parameter.abs().mean() * torch.randn(parameter.shape, generator=noise))


def test_distillation_is_the_divergence_from_the_written_prompt(model, questions, opd):
    rollout = rollout_of(model, questions[:3], opd)
    assert all(completion.modality is Modality.SPEECH for completion in rollout.completions)
    assert len(rollout.completions) == 3 * opd.group_size // 2
    scored, metrics = update(model, rollout, opd)
    found = gradients(model)
    kept = [row for row, completion in enumerate(rollout.completions) if not completion.truncated]
    completions = [rollout.completions[row] for row in kept]
    written = [model.encode_prompts(questions[:3], Modality.TEXT)[completion.question] for completion in completions]
    with torch.no_grad():
        teacher = log_distributions(model, written, completions)
    model.module.zero_grad()
    student = log_distributions(model, [rollout.prompts[row] for row in kept], completions)
    divergences = (student.exp() * (student - teacher)).sum(-1)
    (divergences.sum() / rollout.num_tokens).backward()
    assert metrics["loss"] == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert metrics["divergence/speech"] == pytest.approx(metrics["loss"], rel=1e-5)
    torch.testing.assert_close(
        torch.cat([scored.divergences[row] for row in kept]).double(), divergences.detach(), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(found, gradients(model), atol=1e-5, rtol=1e-3)
    assert found.any()


@pytest.mark.parametrize("distil_as", ["loss", "advantage"])
def test_one_spoken_completion_of_a_question_is_enough(model, questions, opd, distil_as):
    """Nothing is compared within a question; what a group of one has not is no NaN among the figures of the step."""
    opd = dataclasses.replace(opd, group_size=2, distil_as=distil_as)
    rollout = rollout_of(model, questions[:3], opd)
    assert [completion.question for completion in rollout.completions] == [0, 1, 2]
    scored, metrics = update(model, rollout, opd)
    assert gradients(model).any()
    assert all(map(math.isfinite, (metrics | completion_metrics([completion_columns(scored)])).values()))


def test_micro_batches_change_nothing(model, questions, opd):
    opd = dataclasses.replace(opd, text_anchor="kl")
    rollout = rollout_of(model, questions[:3], opd)
    shift(model)
    _, together = update(model, rollout, opd)
    expected = gradients(model)
    _, apart = update(model, rollout, dataclasses.replace(opd, tokens_per_micro_batch=1))
    torch.testing.assert_close(gradients(model), expected, atol=2e-6, rtol=1e-4)
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_frozen_teacher_is_the_model_before_training(make_model, questions, config, lora_rank):
    config = dataclasses.replace(config, objective="opd", lora_rank=lora_rank)
    model, untouched = make_model(lora_rank=lora_rank), make_model(lora_rank=lora_rank)
    references = References(model, config)
    shift(model, scale=0.5 if lora_rank else 0.02)
    if lora_rank:
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.01)
    before = [parameter.detach().clone() for parameter in model.trainable_parameters()]
    rollout = rollout_of(model, questions[:2], config)
    packed = model.pack(rollout.prompts, rollout.completions)
    with torch.no_grad():
        expected = untouched.forward(packed)
        assert not torch.allclose(model.forward(packed), expected, atol=1e-3)
        with references.using("frozen"):
            torch.testing.assert_close(model.forward(packed), expected, atol=1e-5, rtol=1e-5)
    head = references.head("frozen")
    if lora_rank:
        assert head is None
    else:
        torch.testing.assert_close(head, untouched.head.weight)
    assert all(map(torch.equal, before, model.trainable_parameters()))


def test_the_average_follows_the_weights_and_is_kept(model, config):
    config = dataclasses.replace(config, objective="opd", teacher="ema", teacher_decay=0.75)
    references = References(model, config)
    weight = model.trainable_parameters()[0]
    start = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    references.follow()
    with references.using("ema"):
        torch.testing.assert_close(weight.data, start + 0.25)
    torch.testing.assert_close(weight.data, start + 1)
    later = References(model, config)
    later.load_state(references.state())
    with later.using("ema"):
        torch.testing.assert_close(weight.data, start + 0.25)
    for broken in ({}, {"average": references.state()["average"][1:]}):
        with pytest.raises((LookupError, ValueError, RuntimeError)):
            later.load_state(broken)


def test_weights_are_back_after_a_teacher_that_failed(model, config):
    references = References(model, dataclasses.replace(config, objective="opd"))
    shift(model)
    pointers = [parameter.data_ptr() for parameter in model.trainable_parameters()]
    with pytest.raises(RuntimeError), references.using("frozen"):
        raise RuntimeError
    assert [parameter.data_ptr() for parameter in model.trainable_parameters()] == pointers


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_a_tower_in_training_is_never_exchanged(make_model, config, teacher):
    """The sampler may encode recordings of the next batch while the teacher reads."""
    model = make_model(freeze_audio=False)
    references = References(model, dataclasses.replace(config, objective="opd", teacher=teacher, freeze_audio=False))
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 1
    tower = [parameter for part in model.audio_parts for parameter in part.parameters() if parameter.requires_grad]
    assert tower
    before = [parameter.clone() for parameter in tower]
    layer = model.language_model.layers[0].mlp.up_proj.weight
    own = layer.detach().clone()
    with references.using(teacher):
        assert all(map(torch.equal, tower, before))
        assert not torch.equal(layer, own)


@pytest.mark.parametrize("settings", [{"distil_divergence": "forward_kl"}, {"distil_divergence": "jsd", "distil_beta": 0.3}])
def test_other_divergences(model, questions, opd, settings):
    rollout = rollout_of(model, questions[:2], opd)
    _, metrics = update(model, rollout, dataclasses.replace(opd, **settings))
    teacher = Learner(model, torch.optim.SGD(model.trainable_parameters()), opd).distillation.teacher_states(rollout, range(8))
    packed = model.pack([rollout.prompts[row] for row in teacher.rows], [rollout.completions[row] for row in teacher.rows])
    expected = linear_distillation_loss(
        model.forward(packed), teacher.hidden_TD, model.head, bias=model.suppressed_bias,
        divergence=settings["distil_divergence"], beta=settings.get("distil_beta", 0.5),
    )  # fmt: skip
    assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


def test_cord_weighs_tokens_and_rewards_agreement(model, questions, config):
    config = dataclasses.replace(config, objective="cord", teacher="moving", distil_weight=2.0)
    rollout = rollout_of(model, questions[:3], config)
    assert {completion.modality for completion in rollout.completions} == set(Modality)
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters()), config)
    scored, metrics = update(model, rollout, config)
    torch.testing.assert_close(scored.rewards_N, rollout.completion_rewards["agreement"], rtol=0, atol=0, equal_nan=True)
    text = torch.tensor([completion.modality is Modality.TEXT for completion in rollout.completions])
    assert not scored.advantages_N[text].any()
    assert scored.rewards_N[text].isnan().all(), "a question's spoken completions are not compared with its written ones"
    teacher = learner.distillation.teacher_states(rollout, range(len(rollout.completions)))
    packed = model.pack([rollout.prompts[row] for row in teacher.rows], [rollout.completions[row] for row in teacher.rows])
    expected = linear_distillation_loss(
        model.forward(packed), teacher.hidden_TD, model.head, bias=model.suppressed_bias, cu_seqlens=packed.cu_seqlens,
        top_tokens=20, top_weight=2.0, decay=2.0,
    )  # fmt: skip
    # Fresh completions: the probability ratio is 1, and the policy loss minus their mean advantage.
    lengths = torch.tensor([len(c.token_ids) * (not c.truncated) for c in rollout.completions])
    policy = -(scored.advantages_N * lengths).sum() / lengths.sum()
    assert metrics["loss"] == pytest.approx((policy + 2 * expected.loss).item(), rel=1e-4)


@pytest.mark.parametrize("distil_as", ["advantage", "sequence"])
def test_feedback_as_an_advantage(model, questions, opd, distil_as):
    opd = dataclasses.replace(opd, distil_as=distil_as, distil_weight=0.5)
    rollout = rollout_of(model, questions[:2], opd)
    scored, metrics = update(model, rollout, opd)
    found = gradients(model)
    completions = rollout.completions
    written = [rollout.written[completion.question] for completion in completions]
    with torch.no_grad():
        teacher = log_distributions(model, written, completions)
    student = log_distributions(model, rollout.prompts, completions)
    audio_token = model.prompts.audio_token_id
    targets = torch.tensor([token - (token > audio_token) for c in completions for token in c.token_ids])
    own, teachers = (values.gather(-1, targets[:, None])[:, 0] for values in (student, teacher))
    lengths = [len(completion.token_ids) for completion in completions]
    gaps = (teachers - own.detach()).split(lengths)
    if distil_as == "sequence":
        means = torch.stack([gap.mean() for gap in gaps]).view(2, -1)
        means = (means - means.mean(1, keepdim=True)).flatten()
        advantages = torch.cat([mean.expand(length) for mean, length in zip(means, lengths, strict=True)])
    else:
        advantages = torch.cat(gaps)
    mask = torch.tensor([not c.truncated for c in completions for _ in c.token_ids])
    model.module.zero_grad()
    (-(0.5 * advantages * own * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(found, gradients(model), atol=2e-5, rtol=2e-3)
    assert found.any()
    assert metrics["divergence/speech"] == pytest.approx(-torch.cat(gaps)[mask].mean().item(), rel=1e-3)
    assert all(len(scored.divergences[row]) == length for row, length in enumerate(lengths) if not completions[row].truncated)


def test_the_weight_of_distillation_may_fall(model, questions, opd):
    rollout = rollout_of(model, questions[:2], opd)
    falling = dataclasses.replace(opd, distil_schedule="linear", num_steps=4)
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters()), falling)
    assert [learner.distillation.weight_at(step) for step in (0, 1, 3)] == [1.0, 0.75, 0.25]
    scored = learner.begin_rollout(rollout, 3)
    assert update(model, scored, falling)[1]["loss"] == pytest.approx(update(model, rollout, opd)[1]["loss"] / 4, rel=1e-5)


def test_completions_cut_off_are_distilled_where_asked(model, questions, opd):
    opd = dataclasses.replace(opd, max_new_tokens=4)
    rollout = rollout_of(model, questions[:2], opd)
    assert all(completion.truncated for completion in rollout.completions)
    assert update(model, rollout, opd)[1]["loss"] == 0
    assert not gradients(model).any()
    scored, metrics = update(model, rollout, dataclasses.replace(opd, distil_truncated=True))
    assert metrics["loss"] > 0
    assert not metrics.keys() & {"clip/low", "clip/high"}
    assert gradients(model).any()
    assert scored.trained_N.all()
    step = {"step": 1} | metrics | completion_metrics([completion_columns(scored)])
    assert step["truncated/speech"] == 1
    # They are no reason to stop.
    check_progress([step] * MAX_EMPTY_STEPS, pytest.fail)


def test_the_anchor_holds_written_answers_alone(model, questions, opd):
    """At the start it is 0 with a gradient of 0; later its gradient is that of the KL behind written prompts."""
    anchored = dataclasses.replace(opd, text_anchor="kl", text_anchor_weight=3.0)
    rollout = rollout_of(model, questions[:2], opd)
    _, metrics = update(model, rollout, anchored)
    assert metrics["divergence/text"] == pytest.approx(0, abs=1e-6)
    references = References(model, anchored)
    with torch.no_grad():
        kept = [row for row, completion in enumerate(rollout.completions) if not completion.truncated]
        completions = [rollout.completions[row] for row in kept]
        written = [rollout.written[completion.question] for completion in completions]
        start = log_distributions(model, written, completions)
    shift(model)
    update(model, rollout, opd)
    without = gradients(model)
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=0.0), anchored, made_references=references)
    scored = learner.begin_rollout(rollout)
    learner.start_update(scored)
    rows = list(range(len(rollout.completions)))
    teacher = learner.teacher_states(scored, rows)
    states = learner.forward(scored, rows)
    learner.complete_rewards(scored, states)
    learner.backward(scored, states, teacher)
    found = gradients(model) - without
    model.module.zero_grad()
    now = log_distributions(model, written, completions)
    (3.0 * (start.exp() * (start - now)).sum(-1).mean()).backward()
    torch.testing.assert_close(found, gradients(model), atol=3e-5, rtol=3e-3)
    assert found.abs().max() > 1e-3


def test_written_rollouts_as_the_anchor_train_written_completions_alone(model, questions, opd):
    opd = dataclasses.replace(opd, text_anchor="rollouts", distil_weight=1e-12, temperature=3.0, distil_truncated=True)
    rollout = rollout_of(model, questions[:2], opd)
    text = torch.tensor([completion.modality is Modality.TEXT for completion in rollout.completions])
    assert text.sum() * 2 == len(text)
    rollout.completion_rewards["accuracy"] = torch.tensor([0.0, 1.0] * (len(text) // 2))
    # At this temperature nothing ends by itself.
    rollout.completions = [dataclasses.replace(completion, truncated=False) for completion in rollout.completions]
    scored, _ = update(model, rollout, opd)
    assert scored.advantages_N[text].any()
    assert not scored.advantages_N[~text].any()
    assert gradients(model).abs().max() > 1e-3


def test_the_watch_sees_written_answers_move(model, questions, opd):
    engine = TransformersEngine(model, 8)
    watch = WrittenWatch.begin(model, engine, questions, opd)
    assert watch.divergence(model, 1.0) == pytest.approx(0, abs=1e-9)
    restored = WrittenWatch.from_state(watch.state())
    shift(model)
    moved = watch.divergence(model, 1.0)
    assert moved > 1e-4
    assert restored.divergence(model, 1.0) == moved
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters()), opd)
    learner.watch = watch
    assert learner.written_kl(4) == {}
    assert learner.written_kl(5) == {"written_kl": moved}
    check_written({"step": 5, "written_kl": moved}, opd)
    check_written({"step": 4}, opd)
    for found in (moved, math.nan):
        with pytest.raises(TrainingError, match=r"step 5: written answers have moved by .* more than --max-written-kl"):
            check_written({"step": 5, "written_kl": found}, dataclasses.replace(opd, max_written_kl=moved / 2))
    assert dataclasses.replace(opd, objective="grpo", teacher="frozen").steps_between_looks == 0


def test_scaled_rewards():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    values = torch.tensor([1.0, 3.0, 3.0, 5.0, 2.0, 2.0, 7.0])
    scaled = scaled_in_groups(values, groups, "z-score")
    torch.testing.assert_close(scaled, torch.tensor([-(2**0.5), 0, 0, 2**0.5, 0, 0, 0]))
    assert scaled_in_groups(values, groups, "rank").tolist() == [0, 0.5, 0.5, 1, 0, 0, 0]
    assert scaled_in_groups(values, groups, "none") is values
    # As R_rep of one completion that was sampled three times differs, and of one that is another.
    values = torch.tensor([0.9311683, 0.9311684, 0.9311683, 0.9311684, 0.5, 0.5000001, 0.7])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert scaled_in_groups(values, groups, "rank").tolist() == [0, 0, 0, 0, 0.25, 0.25, 1]
    assert not scaled_in_groups(values, groups, "z-score")[:4].any()


def test_scaled_terms_count_by_their_weights(model, questions, config):
    config = dataclasses.replace(config, objective="grpo", reward_scaling="z-score", max_grad_norm=1e9)
    rollout = rollout_of(model, questions[:1], config)
    # R_base of the first two is the same.
    rollout.completion_rewards |= {"accuracy": torch.tensor([0.5, 0, 0, 0] * 2), "format": torch.tensor([0.0, 1, 0, 0] * 2)}
    scored, _ = update(model, rollout, config)
    expected = torch.tensor([3.0, -1, -1, -1]) / 3**0.5 + 0.5 * torch.tensor([-1.0, 3, -1, -1]) / 3**0.5
    torch.testing.assert_close(scored.advantages_N, expected.repeat(2))
    torch.testing.assert_close(scored.rewards_N, torch.tensor([0.5, 0.5, 0, 0] * 2))


def test_centred_states(model, questions, config):
    """The first step compares states as they are, the next ones less the mean of those before."""
    config = dataclasses.replace(config, representation_centre=True)
    rollout = rollout_of(model, questions[:3], config)
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=0.0), config)
    plain = (
        update(model, rollout, dataclasses.replace(config, representation_centre=False))[0].terms["representation"].nan_to_num()
    )
    assert plain.any()
    first = learner.begin_rollout(rollout)
    update_policy(learner, first)
    assert torch.equal(first.terms["representation"].nan_to_num(), plain)
    pooler = LayerPooler(model.language_model.layers, model.language_model.norm)
    packed = model.pack(rollout.prompts, rollout.completions)
    with torch.no_grad(), pooler.pooling(packed.cu_seqlens, positions=packed.positions):
        model.forward(packed)
    is_speech = torch.tensor([completion.modality is Modality.SPEECH for completion in rollout.completions])
    speech, text = (pooler.pooled[:, chosen].mean(1) for chosen in (is_speech, ~is_speech))
    second = learner.begin_rollout(rollout)
    update_policy(learner, second)
    row = next(row for row, reference in enumerate(rollout.references) if reference is not None)
    pair = pooler.pooled[:, row] - speech, pooler.pooled[:, rollout.references[row]] - text
    expected = torch.nn.functional.cosine_similarity(*pair, dim=-1).mean()
    assert second.terms["representation"][row].item() == pytest.approx(expected.item(), abs=1e-5)
    assert second.terms["representation"][is_speech].std() > 2 * plain[is_speech].std()
    resumed = Learner(model, learner.optimizer, config)
    resumed.load_extra(learner.extra())
    assert torch.equal(resumed.means.means, learner.means.means)


def test_agreement_needs_no_reference_answer():
    questions = [Question("a", "?", "", ("one", "two")), Question("b", "?", "", ("one", "two"))]

    def completion(question: int, modality: Modality, choice: str) -> Completion:
        return Completion(question, modality, (5,), (0.0,), f"<answer> The answer is {choice}. </answer>", False)

    speech, text = Modality.SPEECH, Modality.TEXT
    completions = [
        completion(0, speech, "one"), completion(0, speech, "two"), completion(0, speech, "none of it"),
        completion(0, text, "two"), completion(0, text, "two"), completion(0, text, "one"),
        # Undecided.
        completion(1, speech, "one"), completion(1, text, "one"), completion(1, text, "two"),
    ]  # fmt: skip
    assert agreement(reward_inputs(completions, questions)) == [0, 1, 0, None, None, None, 0, None, None]
    assert agreement(reward_inputs(completions[:3], questions)) == [0, 0, 0]


def test_objectives_add_up():
    both = parse_objective("tars+opd")
    assert (both.uses_rewards, both.uses_alignment, both.distils, both.weighs_tokens) == (True, True, True, False)
    assert not parse_objective("opd").has_policy_gradient
    assert parse_objective("grpo+cord").uses_agreement


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft"}, r"--objective sft: 'sft' is none of tars, grpo, opd, cord"),
        ({"objective": ""}, "--objective : '' is none of"),
        ({"objective": "tars+"}, r"--objective tars\+: '' is none of"),
        ({"objective": "opd+opd"}, r"--objective opd\+opd: opd is in it already"),
        ({"objective": "tars+grpo"}, r"--objective tars\+grpo: grpo is in it already"),
        ({"objective": "cord+opd"}, r"--objective cord\+opd: opd is in it already"),
        ({"objective": "tars", "text_anchor": "kl"}, "--text-anchor kl: --objective tars trains written completions itself"),
        (
            {"objective": "grpo+opd", "text_anchor": "rollouts"},
            "--text-anchor rollouts: .* samples written completions already",
        ),
        ({"objective": "opd", "teacher_decay": 1.0}, r"--teacher-decay 1.0: must lie between 0 and 1"),
        ({"objective": "opd", "distil_beta": 0.0}, r"--distil-beta 0.0: must lie between 0 and 1"),
        ({"objective": "cord", "distil_as": "sequence"}, "--distil-as sequence: --objective cord weighs tokens"),
        (
            {"objective": "tars", "teacher": "moving"},
            "--teacher moving: has no effect without opd or cord in --objective; leave it out",
        ),
        ({"objective": "grpo", "max_written_kl": 0.5}, "--max-written-kl 0.5: has no effect without opd or cord"),
        ({"objective": "opd", "teacher_decay": 0.9}, "--teacher-decay 0.9: has no effect without --teacher ema"),
        (
            {"objective": "opd", "distil_as": "advantage", "distil_divergence": "jsd"},
            "--distil-divergence jsd: has no effect without --distil-as loss",
        ),
        (
            {"objective": "opd", "distil_as": "advantage", "distil_truncated": True},
            "--distil-truncated True: has no effect without --distil-as loss",
        ),
        ({"objective": "opd", "distil_beta": 0.3}, "--distil-beta 0.3: has no effect without --distil-divergence jsd"),
        (
            {"text_anchor": "none", "text_anchor_weight": 2.0},
            "--text-anchor-weight 2.0: has no effect without --text-anchor kl",
        ),
        ({"objective": "tars+opd", "text_anchor_weight": 2.0}, "--text-anchor-weight 2.0: has no effect without"),
        ({"objective": "grpo", "behaviour_weight": 2.0}, "--behaviour-weight 2.0: has no effect without tars"),
        ({"objective": "opd", "representation_centre": True}, "--representation-centre True: has no effect without written"),
        ({"objective": "opd", "reward_scaling": "rank"}, "--reward-scaling rank: has no effect without a reward"),
        ({"objective": "opd", "loss_type": "gspo"}, "--loss-type gspo: has no effect without a policy loss"),
        ({"objective": "opd", "kl_coef": 0.1}, "--kl-coef 0.1: has no effect without a policy loss"),
        ({"objective": "opd", "entropy_coef": 0.1}, "--entropy-coef 0.1: has no effect without a policy loss"),
        ({"objective": "opd", "max_written_kl": 0.1, "watch_every": 0}, "--max-written-kl 0.1: has no effect without --watch"),
        ({"objective": "opd", "distil_as": "advantage", "loss_type": "gspo"}, "--loss-type gspo: has one ratio for all tokens"),
        ({"select_floor": 0.5}, "--select-floor 0.5: has no effect without --select gap, disagreement or kl"),
        ({"objective": "opd", "distil_weight": float("nan")}, "--distil-weight nan"),
    ],
)
def test_objectives_that_contradict_themselves(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def without_answers(questions, **changes):
    return [dataclasses.replace(question, answer="", same_as_answer=(), **changes) for question in questions]


@pytest.mark.parametrize(
    "settings",
    [{}, {"distil_as": "advantage"}, {"objective": "cord"}],
    ids=["opd", "as an advantage", "cord"],
)
def test_a_missing_answer_changes_no_gradient(model, questions, opd, settings):
    """Where no reward that is trained on needs it; the figures of rewards are those of the questions that have one."""
    opd = dataclasses.replace(opd, **settings)
    asked = questions[:2]
    scored, metrics = update(model, rollout_of(model, asked, opd), opd)
    expected = gradients(model)
    assert expected.any()
    of_first = [
        completion.question == 0 and completion.modality is Modality.SPEECH for completion in scored.rollout.completions
    ]
    accuracy = scored.terms["accuracy"][of_first].mean().item()
    scored, mixed = update(model, rollout_of(model, [asked[0], *without_answers(asked[1:])], opd), opd)
    assert torch.equal(gradients(model), expected)
    assert mixed == metrics
    assert completion_metrics([completion_columns(scored)])["accuracy/speech"] == accuracy
    scored, _ = update(model, rollout_of(model, without_answers(asked), opd), opd)
    assert torch.equal(gradients(model), expected)
    counted = completion_metrics([completion_columns(scored)])
    assert all(math.isfinite(value) for value in counted.values())
    assert not {name.split("/")[0] for name in counted} & {"accuracy", "format", "unparsed"}
    assert not counted.keys() & {"disagreeing/speech", "reward/representation", "reward/without_reference"}
    assert ("reward/speech" in counted) == ("disagreeing/any" in counted) == opd.parts.uses_agreement
    check_progress([{"step": 1} | counted | metrics], pytest.fail)


def test_a_transcript_is_a_written_prompt_to_distil_from(model, questions, opd):
    """Answers, their set and even the question's form do not matter: what is written is all there is."""
    (plain,) = without_answers([dataclasses.replace(questions[0], text="good morning to you")], choices=())
    rollout = rollout_of(model, [plain], opd)
    scored, metrics = update(model, rollout, opd)
    assert gradients(model).any()
    assert metrics["divergence/speech"] > 0
    assert scored.rewards_N.isnan().all()
    assert not scored.advantages_N.any()


def test_the_plan_counts_copies_of_weights():
    architecture = PRESETS["qwen2-audio-7b"].architecture

    def planned(**settings) -> tuple[int, int]:
        config = TrainConfig(model="qwen2-audio-7b", **settings)
        workload = config.workload(config.as_preset(PRESETS["qwen2-audio-7b"]), architecture, "transformers", 2)
        return workload.resident["reference weights"], workload.num_trained

    for settings, bytes_each in (
        ({"lora_rank": 0, "objective": "tars"}, 0),
        ({"lora_rank": 0, "objective": "opd"}, 2),
        ({"lora_rank": 0, "objective": "opd", "teacher": "moving", "text_anchor": "none"}, 0),
        ({"lora_rank": 0, "objective": "opd", "teacher": "moving"}, 2),
        ({"lora_rank": 0, "objective": "opd", "teacher": "ema", "text_anchor": "kl"}, 8),
        ({"objective": "opd"}, 0),
        ({"objective": "opd", "teacher": "ema"}, 4),
    ):
        found, num_trained = planned(**settings)
        assert found == bytes_each * num_trained, settings
    plain, distilling = (
        TrainConfig(model="qwen2-audio-7b", objective=name).workload(
            PRESETS["qwen2-audio-7b"], architecture, "transformers", 2, longest_prompt=100
        )
        for name in ("grpo", "opd")
    )
    # The teacher's logits of 512 tokens in float32, and its states.
    more = 512 * 4 * architecture.vocabulary_size + 2 * 16_384 * architecture.hidden_size
    assert distilling.logits(16_384) - plain.logits(16_384) == more
    pocket = PRESETS["pocket"]
    workload = TrainConfig(objective="opd").workload(pocket, architecture_of(pocket), "transformers", 4)
    assert "reference weights" in describe(plan_memory(workload, 10**9))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "--teacher frozen"), ({"teacher": "moving", "text_anchor": "kl"}, "--text-anchor kl")],
    ids=["frozen", "anchor"],
)
def test_a_teacher_without_room_is_refused_with_a_remedy(monkeypatch, tmp_path, settings, named):
    monkeypatch.setattr(run, "available_bytes", lambda _device: 10**8)
    config = TrainConfig(objective="opd", output_dir=tmp_path / "run", eval_items=2, **settings)
    with pytest.raises(UserError, match=rf"{named}: .+ for another copy of what is trained do not fit beside the rest"):
        train_command.command(config)


def test_a_checkpoint_is_as_large_as_planned_with_an_average_too(model, config, tmp_path):
    references = References(model, dataclasses.replace(config, objective="opd", teacher="ema"))
    planned = checkpoint_bytes(model, references.state())
    assert planned == checkpoint_bytes(model) + 4 * sum(parameter.numel() for parameter in model.trainable_parameters())
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    for parameter in model.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    folder = save_checkpoint(tmp_path, 1, model, optimizer, references.state())
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors"))
    assert written == pytest.approx(planned, rel=0.02)
