"""One training step, against the defects of the released code in docs/method.md: each test fails if its defect is put in."""

from __future__ import annotations

import dataclasses
import random
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from peft.helpers import rescale_adapter_scale
from steps import base_rewards, gradients, rollout_of, update
from tars_kernels import LayerPooler, reference
from tars_kernels.objective import PRESETS as LOSS_TYPES

from tars_fast.config import TrainConfig
from tars_fast.learning.advantages import centred_advantages, group_indices
from tars_fast.learning.batch import Rollout, RolloutCollector, micro_batches, prepare_batch
from tars_fast.learning.metrics import completion_columns, completion_metrics
from tars_fast.learning.rewards.behaviour import Behaviour, HashedNgrams
from tars_fast.learning.rewards.inputs import Needs, reward_inputs
from tars_fast.learning.rewards.references import choose_references
from tars_fast.learning.rewards.representation import Representation
from tars_fast.learning.rewards.reward import Reward, completed, reward_values
from tars_fast.learning.rewards.total import Rewards
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Completion, Modality, Question, TrainingError


def alone(model: SpeechModel, prompt, completion) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [C], pooled states [L, D]) of one completion by plain transformers: no padding, no batch, no hooks."""
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    embeddings = model.module.get_input_embeddings()(ids)
    if prompt.audio_clips:
        where = ids[0, : len(prompt.token_ids)] == model.prompts.audio_token_id
        embeddings[0, : len(prompt.token_ids)][where] = torch.cat(prompt.audio_clips)
    output = model.module(inputs_embeds=embeddings, output_hidden_states=True)
    start = len(prompt.token_ids)
    logits = output.logits[0, start - 1 : -1] + model.suppressed_bias
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
    return logprobs, torch.stack([states[0, start:].mean(0) for states in output.hidden_states[1:]])


def loss_of_each_alone(model: SpeechModel, rollout: Rollout, advantages_N: torch.Tensor) -> torch.Tensor:
    """The policy loss of fresh completions, whose probability ratio is 1."""
    loss = torch.zeros(())
    for prompt, completion, advantage in zip(rollout.prompts, rollout.completions, advantages_N, strict=True):
        if not completion.truncated:
            loss = loss - advantage * alone(model, prompt, completion)[0].sum() / rollout.num_tokens
    return loss


@torch.no_grad()
def test_batched_forward_equals_each_completion_alone(model, questions, config):
    """Defects 1 and 3: each completion under its own prompt, padding never between prompt and completion."""
    rollout = rollout_of(model, questions[:3], config)
    layout = model.pack(rollout.prompts, rollout.completions)
    pooler = LayerPooler(model.language_model.layers, model.language_model.norm)
    with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
        hidden = model.forward(layout)
    logits = model.head(hidden) + model.suppressed_bias
    logprobs = logits.log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0].split(layout.cu_seqlens.diff().tolist())
    for index, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        assert prompt.modality is completion.modality
        assert bool(prompt.audio_clips) == (completion.modality is Modality.SPEECH)
        expected_logprobs, expected_pooled = alone(model, prompt, completion)
        torch.testing.assert_close(logprobs[index], expected_logprobs, atol=2e-5, rtol=0)
        torch.testing.assert_close(pooler.pooled[:, index], expected_pooled, atol=2e-5, rtol=1e-4)


def test_rollout_and_trainer_agree_token_by_token(model, questions, config):
    """Defects 1, 3 and 9: any mismatch of prompt, padding, temperature or mode shows as a difference in log-probability."""
    config = dataclasses.replace(config, temperature=0.7)
    # Settings that checkpoints ship with (Qwen2-Audio's, and then some) must not reshape the sampled distribution.
    shipped = {"repetition_penalty": 1.3, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "no_repeat_ngram_size": 3, "temperature": 0.1}
    model.module.generation_config.update(**shipped)
    rollout = rollout_of(model, questions[:4], config)
    assert model.module.generation_config.repetition_penalty == 1.3
    _, metrics = update(model, rollout, config)
    assert metrics["logprob_diff_max"] < 1e-4
    assert metrics["importance_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip/low"] == metrics["clip/high"] == 0.0


def test_references_are_correct_texts_of_the_same_question():
    """Defect 2."""

    def completion(question, modality, truncated=False):
        return Completion(question, modality, (5,), (0.0,), "", truncated)

    speech, text = Modality.SPEECH, Modality.TEXT
    completions = [
        completion(0, speech), completion(0, text), completion(0, text),
        completion(1, text), completion(1, speech), completion(1, speech, truncated=True),
        completion(2, speech), completion(2, text),
    ]  # fmt: skip
    # A text cut off in its thinking is nothing to be like, whatever answer was read out of it.
    completions.append(completion(2, text, truncated=True))
    accuracy = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 1])
    for seed in range(20):
        references = choose_references(completions, accuracy, random.Random(seed))
        # Question 2 has no correct text completion, and another question's must not stand in.
        assert references == [2, None, None, None, 3, None, None, None, None]
    many = [completion(0, speech), *(completion(0, text) for _ in range(4))]
    drawn = {choose_references(many, torch.ones(5), random.Random(seed))[0] for seed in range(40)}
    assert drawn == {1, 2, 3, 4}


def test_truncated_completions_earn_no_alignment_and_poison_nothing(model, questions, config):
    """Defect 4, and docs/method.md, Advantages: they stay in the mean of their group."""
    rollout = rollout_of(model, questions[:4], dataclasses.replace(config, max_new_tokens=27))
    cut = [index for index, c in enumerate(rollout.completions) if c.modality is Modality.SPEECH][:2]
    for index in cut:
        rollout.completions[index] = dataclasses.replace(rollout.completions[index], truncated=True, text="<think>five")
    rebuilt = choose_references(rollout.completions, rollout.completion_rewards["accuracy"], random.Random(0))
    rollout = dataclasses.replace(rollout, references=rebuilt)
    behaviour = Reward("behaviour", Behaviour(HashedNgrams()))
    rollout.late["behaviour"] = completed(reward_values(behaviour, rollout.reward_inputs))
    scored, _ = update(model, rollout, config)
    assert torch.isfinite(scored.rewards_N).all()
    assert scored.terms["representation"][cut].tolist() == [0.0, 0.0] == scored.terms["behaviour"][cut].tolist()
    group = rollout.groups_N == rollout.groups_N[cut[0]]
    assert scored.advantages_N[group].sum().item() == pytest.approx(0.0, abs=1e-5)
    assert scored.advantages_N[cut[0]] != 0


def test_normaliser_counts_tokens_after_masking(model, questions, config):
    """Defect 5: masking a completion must not dilute the gradient of the others."""
    rollout = rollout_of(model, questions[:2], config)
    assert not any(completion.truncated for completion in rollout.completions)
    scored, _ = update(model, rollout, config)
    index = int(scored.advantages_N.abs().argmax())
    completions = list(rollout.completions)
    completions[index] = dataclasses.replace(completions[index], truncated=True)
    kept_tokens = rollout.num_tokens - len(completions[index].token_ids)
    masked = dataclasses.replace(rollout, completions=completions)
    scored.rollout = masked
    update(model, scored, config)
    expected = torch.zeros(())
    for prompt, completion, advantage in zip(rollout.prompts, completions, scored.advantages_N, strict=True):
        if not completion.truncated:
            expected = expected - advantage * alone(model, prompt, completion)[0].sum() / kept_tokens
    got = gradients(model).clone()
    model.module.zero_grad()
    expected.backward()
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-3)


def test_only_speech_earns_alignment(model, questions, config):
    """Defect 6."""
    rollout = rollout_of(model, questions[:4], config)
    scored, _ = update(model, rollout, config)
    is_text = torch.tensor([completion.modality is Modality.TEXT for completion in rollout.completions])
    assert scored.terms["representation"][is_text].isnan().all()
    assert scored.terms["behaviour"][is_text].isnan().all()
    torch.testing.assert_close(scored.rewards_N[is_text], base_rewards(rollout)[is_text])
    has_reference = torch.tensor([reference is not None for reference in rollout.references])
    assert has_reference.any()
    assert (scored.terms["representation"][has_reference] > 0.3).all()
    expected = base_rewards(rollout) + (scored.terms["representation"] + scored.terms["behaviour"]).nan_to_num()
    torch.testing.assert_close(scored.rewards_N, expected)


def test_representation_reward_is_the_mean_over_layers_of_cosines(model, questions, config):
    """Equation of R_rep, from plain transformers' hidden states of each completion alone."""
    rollout = rollout_of(model, questions[:4], config)
    scored, _ = update(model, rollout, config)
    index, reference = next((i, r) for i, r in enumerate(rollout.references) if r is not None)
    with torch.no_grad():
        _, speech = alone(model, rollout.prompts[index], rollout.completions[index])
        _, text = alone(model, rollout.prompts[reference], rollout.completions[reference])
    cosines = F.cosine_similarity(speech.double(), text.double(), dim=-1)
    assert scored.terms["representation"][index].item() == pytest.approx(cosines.mean().item(), abs=1e-5)
    # Of some layers only (Fig. 3).
    for layers, chosen in (("2", slice(1, 2)), ("2-3", slice(1, 3)), ("last", slice(3, 4))):
        scored, _ = update(model, rollout, dataclasses.replace(config, representation_layers=layers))
        assert scored.terms["representation"][index].item() == pytest.approx(cosines[chosen].mean().item(), abs=1e-5)


def test_modality_is_a_field_not_a_place():
    """Defect 8: advantages follow completions through any reordering."""
    questions = [0, 0, 0, 0, 1, 1, 1, 1]
    modalities = [Modality.SPEECH, Modality.SPEECH, Modality.TEXT, Modality.TEXT] * 2
    rewards = torch.tensor([0.0, 1.0, 3.0, 7.0, 2.0, 2.0, 5.0, 4.0])
    expected = [-0.5, 0.5, -2.0, 2.0, 0.0, 0.0, 0.5, -0.5]
    for seed in range(5):
        order = random.Random(seed).sample(range(8), 8)
        groups = group_indices([questions[i] for i in order], [modalities[i] for i in order])
        assert centred_advantages(rewards[order], groups).tolist() == [expected[i] for i in order]


def test_policy_is_one_and_the_same_in_rollout_reward_and_loss(lora_model, questions, config):
    """Defect 9: no dropout anywhere, LoRA's included."""
    assert not any(module.training for module in lora_model.module.modules())
    rollout = rollout_of(lora_model, questions[:2], config)
    _, metrics = update(lora_model, rollout, config)
    assert metrics["logprob_diff_max"] < 1e-4
    assert not any(module.training for module in lora_model.module.modules())


def passes_of(model: SpeechModel) -> list[tuple[bool, int, object]]:
    """(gradient, tokens, kept hidden states) of each forward pass from here on."""
    passes = []
    model.language_model.register_forward_hook(
        lambda _module, _args, kwargs, output: passes.append(
            (torch.is_grad_enabled(), kwargs["inputs_embeds"].shape[1], output.hidden_states)
        ),
        with_kwargs=True,
    )
    return passes


def num_row_tokens(rollout: Rollout) -> int:
    """Every prompt once, every completion."""
    prompts = {id(prompt): len(prompt.token_ids) for prompt in rollout.prompts}
    return sum(prompts.values()) + sum(len(completion.token_ids) for completion in rollout.completions)


def test_every_token_goes_through_one_forward_pass(model, questions, config):
    """Defect 10: one pass, in which groups that cannot have an advantage carry no gradient; no padding, no kept states."""
    rollout = rollout_of(model, questions[:4], config)
    passes = passes_of(model)
    scored, _ = update(model, rollout, config)
    assert [gradient for gradient, _, _ in passes] == [False, True]
    assert sum(tokens for _, tokens, _ in passes) == num_row_tokens(rollout)
    assert all(states is None for _, _, states in passes)
    assert 0 < scored.trained_N.sum() < len(rollout.completions)


def test_groups_without_an_advantage_have_no_backward_pass(model, questions, config):
    """Skipping them changes no gradient, and they are counted."""
    config = dataclasses.replace(config, max_grad_norm=1e9)
    rollout = rollout_of(model, questions, config)
    scored, metrics = update(model, rollout, config)
    got = gradients(model).clone()
    silent = ~scored.trained_N
    assert scored.advantages_N[silent].abs().max() == 0
    assert all(rollout.completions[index].modality is Modality.TEXT for index in silent.nonzero()[:, 0].tolist())
    counted = completion_metrics([completion_columns(scored)])
    assert counted["without_backward/text"] == pytest.approx(silent.sum().item() / 4 / len(questions))
    assert counted["without_backward/speech"] == 0.0
    # The same loss with every group in the graph.
    expected = loss_of_each_alone(model, rollout, scored.advantages_N)
    model.module.zero_grad()
    expected.backward()
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-3)
    tokens = torch.tensor([0 if one.truncated else len(one.token_ids) for one in rollout.completions])
    assert metrics["loss"] == pytest.approx(-(scored.advantages_N @ tokens.float()).item() / rollout.num_tokens, abs=1e-5)


def test_a_step_without_any_advantage_moves_nothing(model, questions, config):
    """Plain GRPO where all earn the same: no backward pass at all, figures all the same."""
    config = dataclasses.replace(config, representation_weight=0.0, behaviour_weight=0.0)
    rollout = rollout_of(model, questions[:2], config)
    rollout = dataclasses.replace(rollout, completion_rewards={name: torch.ones(16) for name in rollout.completion_rewards})
    before = gradients(model)
    passes = passes_of(model)
    scored, metrics = update(model, rollout, config, learning_rate=1.0)
    assert [gradient for gradient, _, _ in passes] == [False]
    assert torch.equal(gradients(model), before)
    assert all(parameter.grad is not None for parameter in model.trainable_parameters()), "momentum goes on, as with zeros"
    assert metrics["grad_norm"] == metrics["loss"] == 0.0
    assert metrics["entropy/speech"] > 0
    assert metrics["logprob_diff_max"] < 1e-4
    assert completion_metrics([completion_columns(scored)])["without_backward/speech"] == 1.0


def test_a_group_cut_off_throughout_has_no_backward_pass(model, questions, config):
    rollout = rollout_of(model, questions[:2], config)
    cut = (rollout.groups_N == 0).nonzero()[:, 0].tolist()
    completions = list(rollout.completions)
    for index in cut:
        completions[index] = dataclasses.replace(completions[index], truncated=True)
    accuracy = rollout.completion_rewards["accuracy"].clone()
    accuracy[cut] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    references = choose_references(completions, accuracy, random.Random(0))
    rewards = rollout.completion_rewards | {"accuracy": accuracy}
    rollout = dataclasses.replace(rollout, completions=completions, completion_rewards=rewards, references=references)
    scored, _ = update(model, rollout, config)
    assert scored.advantages_N[cut].abs().min() > 0
    assert not scored.trained_N[cut].any()
    assert scored.trained_N.any()


def test_each_recording_goes_through_the_tower_once_a_step(model, questions, config):
    """Defect 12."""
    heard = []
    model.module.model.audio_tower.conv1.register_forward_hook(lambda _module, args, _output: heard.append(len(args[0])))
    rollout = rollout_of(model, questions[:4], config)
    update(model, rollout, config)
    assert sum(heard) == 4


def test_lora_never_touches_the_base(lora_model, questions, config):
    """Defect 13: no merging; and the adapters sit on exactly the language model's linear layers."""
    named = dict(lora_model.module.named_parameters())
    base = {name: parameter.detach().clone() for name, parameter in named.items() if not parameter.requires_grad}
    trained = {name: parameter.detach().clone() for name, parameter in named.items() if parameter.requires_grad}
    for step in range(2):
        rollout = rollout_of(lora_model, questions[:2], config, step)
        update(lora_model, rollout, config, learning_rate=0.1)
    assert all(torch.equal(named[name], value) for name, value in base.items())
    assert any(not torch.equal(named[name], value) for name, value in trained.items())
    layers = {name.split(".lora_")[0] for name in trained}
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(layers) == 4 * len(projections)
    assert all("language_model" in name and name.rpartition(".")[2] in projections for name in layers)


@pytest.mark.parametrize("stop_token", ["<|im_end|>", "<|endoftext|>"])
def test_every_stop_token_ends_a_completion(model, questions, stop_token):
    """Defect 14: a head that can only say this stop token ends each completion with it."""
    stop_id = model.prompts.tokenizer.convert_tokens_to_ids(stop_token)
    model.suppressed_bias.fill_(-1e4)
    model.suppressed_bias[stop_id] = 0.0
    prompts = model.encode_prompts(questions[:2], Modality.TEXT)
    completions = TransformersEngine(model, 8).generate(prompts, [0, 1], Sampling(2, 5, 1.0, 0))
    assert [(completion.token_ids, completion.truncated) for completion in completions] == [((stop_id,), False)] * 4


def test_the_policy_cannot_say_the_audio_token(model, questions, config):
    """The head is made to prefer `<|AUDIO|>` by far; it is never sampled, and the trainer agrees that it could not be."""
    with torch.no_grad():
        model.head.weight[model.prompts.audio_token_id] = 50 * model.head.weight.mean(0)
        model.head.weight[model.prompts.audio_token_id] += 50 * model.head.weight[model.prompts.stop_token_ids[-1]]
    rollout = rollout_of(model, questions[:2], config)
    assert all(model.prompts.audio_token_id not in completion.token_ids for completion in rollout.completions)
    _, metrics = update(model, rollout, config)
    assert metrics["logprob_diff_max"] < 1e-3


@torch.no_grad()
def test_audio_stands_at_prompt_positions_only(model, questions):
    """A completion that holds the audio token all the same keeps that token's own embedding there."""
    (prompt,) = model.encode_prompts(questions[:1], Modality.SPEECH)
    tokens = (40, model.prompts.audio_token_id, 41, model.prompts.audio_token_id, 42)
    completion = Completion(0, Modality.SPEECH, tokens, (0.0,) * 5, "", truncated=False)
    layout = model.pack([prompt], [completion])
    states = model.forward(layout)
    logprobs = (model.head(states)).log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]
    model.suppressed_bias.zero_()
    torch.testing.assert_close(logprobs, alone(model, prompt, completion)[0], atol=2e-5, rtol=0)


def test_result_does_not_depend_on_packing(model, questions, config):
    """The normaliser is global: a micro-batch a question, some, or one for all give the same loss and gradient."""
    rollout = rollout_of(model, questions, config)
    seen = []
    passes = passes_of(model)
    for tokens in (1, 700, 10**6):
        config = dataclasses.replace(config, tokens_per_micro_batch=tokens)
        passes.clear()
        scored, metrics = update(model, rollout, config)
        seen.append((gradients(model).clone(), scored, metrics, sum(gradient for gradient, _, _ in passes)))
    assert [number for *_, number in seen] == [6, seen[1][3], 1]
    assert 1 < seen[1][3] < 6
    for got, scored, metrics, _ in seen[:-1]:
        torch.testing.assert_close(got, seen[-1][0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(scored.rewards_N, seen[-1][1].rewards_N, atol=1e-5, rtol=0)
        assert metrics == pytest.approx(seen[-1][2], abs=1e-5)


LOSSES = [
    {"loss_type": "grpo", "importance_mode": "mask", "importance_cap": 1.1, "entropy_coef": 0.05},
    {"loss_type": "cispo", "clip_high": 5.0, "kl_coef": 0.2, "entropy_coef": 0.05},
    pytest.param({"loss_type": "dr_grpo", "importance_level": "sequence", "entropy_coef": 0.05}, marks=pytest.mark.slow),
    pytest.param({"loss_type": "gspo", "kl_coef": 0.2}, marks=pytest.mark.slow),
    *(pytest.param({"loss_type": name}, marks=pytest.mark.slow) for name in ("luspo", "sapo", "vespo", "gmpo")),
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_losses_of_a_step(lora_model, questions, config, settings):
    """Two updates in micro-batches, with an adapter that is not new, against each completion alone and the specification."""
    model = lora_model
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    config = dataclasses.replace(config, max_grad_norm=1e9, tokens_per_micro_batch=1, **settings)
    rollout = rollout_of(model, questions[:2], config)
    # Another policy than the sampler's, and a completion that was cut off.
    completions = [
        dataclasses.replace(one, rollout_logprobs=tuple(x - 0.2 * (i % 3 - 1) for i, x in enumerate(one.rollout_logprobs)))
        for one in rollout.completions
    ]
    completions[3] = dataclasses.replace(completions[3], truncated=True)
    config = dataclasses.replace(config, max_logprob_diff=9.0)
    rollout = dataclasses.replace(rollout, completions=completions)
    passes = passes_of(model)
    scored, _ = update(model, rollout, config, learning_rate=0.05)
    assert "kl_coef" not in settings or [gradient for gradient, _, _ in passes] == [True, False] * 2
    old = [vector.clone() for vector in scored.logprobs]
    passes.clear()
    _, metrics = update(model, scored, config)
    assert all(gradient for gradient, _, _ in passes), "the reference's log-probabilities are kept"
    got = gradients(model).clone()

    pairs = list(zip(rollout.prompts, completions, strict=True))
    logprobs = [alone(model, *pair)[0] for pair in pairs]
    with torch.no_grad(), rescale_adapter_scale(model.module, 0.0):
        ref_logprobs = torch.cat([alone(model, *pair)[0] for pair in pairs])
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    mask = torch.tensor([not one.truncated for one in completions]).repeat_interleave(lengths)
    packed = model.pack(rollout.prompts, completions)
    states = model.forward(packed)
    all_logprobs = (model.head(states) + model.suppressed_bias).log_softmax(-1)
    extra = {"constant": 16 * config.max_new_tokens} if settings["loss_type"] == "dr_grpo" else {}
    keywords = {name: value for name, value in settings.items() if value}
    expected = reference.token_policy_loss(
        torch.cat(logprobs), scored.advantages_N, entropy=-(all_logprobs.exp() * all_logprobs.clamp(min=-1e9)).sum(-1),
        advantage_level="sequence", cu_seqlens=packed.cu_seqlens, mask=mask,
        old_logprobs=torch.cat([o if len(o) == len(x) else x.detach() for o, x in zip(old, logprobs, strict=True)]),
        rollout_logprobs=torch.tensor([x for one in completions for x in one.rollout_logprobs]), ref_logprobs=ref_logprobs,
        **keywords, **extra,
    )  # fmt: skip
    model.module.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(got, gradients(model), atol=2e-6, rtol=2e-3)
    assert got.abs().max() > 1e-4
    assert ("kl" in metrics) == ("kl_coef" in settings)
    if "kl" in metrics:
        assert metrics["kl"] == pytest.approx((expected.kl.sum() / mask.sum()).item(), rel=1e-2)
        assert metrics["kl"] > 1e-4


def test_kl_reaches_groups_that_agree(lora_model, questions, config):
    """Plain GRPO where all earn the same: only KL, or entropy, has a gradient; without them nothing has."""
    config = dataclasses.replace(config, representation_weight=0.0, behaviour_weight=0.0)
    for name, parameter in lora_model.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    rollout = rollout_of(lora_model, questions[:1], config)
    rollout = dataclasses.replace(rollout, completion_rewards={name: torch.ones(8) for name in rollout.completion_rewards})
    scalings = [layer.scaling for layer in lora_model.module.modules() if hasattr(layer, "lora_A")]
    for settings, reached in (({}, False), ({"kl_coef": 0.1}, True), ({"entropy_coef": 0.1}, True)):
        scored, metrics = update(lora_model, rollout, dataclasses.replace(config, **settings))
        assert scored.trained_N.all() == scored.trained_N.any() == reached
        assert (metrics["grad_norm"] > 0) == reached
    assert scalings == [layer.scaling for layer in lora_model.module.modules() if hasattr(layer, "lora_A")]


def test_every_loss_of_the_command_line_is_a_kernels_one():
    (names,) = (typing.get_args(kind) for name, kind in typing.get_type_hints(TrainConfig).items() if name == "loss_type")
    assert set(names) == LOSS_TYPES.keys() - {"bnpo"}, "which is dapo here: both divide by the tokens of the whole batch"


def test_questions_are_packed_whole_and_longest_first(model, questions, config):
    rollout = rollout_of(model, questions, config)
    sizes = {}
    for number in range(len(questions)):
        rows = [index for index, completion in enumerate(rollout.completions) if completion.question == number]
        sizes[number] = num_row_tokens(
            dataclasses.replace(
                rollout, **{name: [getattr(rollout, name)[row] for row in rows] for name in ("prompts", "completions")}
            )
        )
    budget = 2 * max(sizes.values())
    packed = micro_batches(rollout, budget)
    assert sorted(row for rows in packed for row in rows) == list(range(len(rollout.completions)))
    asked = [list(dict.fromkeys(rollout.completions[row].question for row in rows)) for rows in packed]
    assert sorted(question for questions in asked for question in questions) == list(range(len(questions)))
    assert all(sum(sizes[question] for question in questions) <= budget for questions in asked)
    assert sizes[asked[0][0]] == max(sizes.values())
    alone = micro_batches(rollout, 1)
    lengths = [sizes[rollout.completions[rows[0]].question] for rows in alone]
    assert lengths == sorted(sizes.values(), reverse=True)


def test_the_first_of_several_updates_has_the_old_logprobs(model, questions, config):
    """Its own pass measures those of every completion; later ones only run what has an advantage."""
    rollout = rollout_of(model, questions[:4], config)
    passes = passes_of(model)
    scored, first = update(model, rollout, config, learning_rate=0.05)
    assert sum(tokens for _, tokens, _ in passes) == num_row_tokens(rollout)
    assert first["clip/high"] == first["clip/low"] == 0.0
    old = [logprobs.clone() for logprobs in scored.logprobs]
    trained = scored.trained_N.clone()
    assert 0 < trained.sum() < len(trained)
    passes.clear()
    scored.trained_N.fill_(True)
    again, second = update(model, scored, config, learning_rate=0.05)
    assert again is scored
    ((has_gradient, num_tokens, _),) = passes
    assert has_gradient
    assert num_tokens < num_row_tokens(rollout)
    assert first.keys() == second.keys()
    # Of the last update; the first one's pass also held groups whose rewards turned out to agree.
    assert scored.trained_N.any()
    assert not (scored.trained_N & ~trained).any()
    assert sorted(scored.rows_with_gradient(range(len(trained)))) == scored.trained_N.nonzero()[:, 0].tolist()
    for _ in range(4):
        _, last = update(model, scored, config, learning_rate=0.5)
    assert last["clip/high"] + last["clip/low"] > 0.0
    assert second["importance_ratio"] == pytest.approx(first["importance_ratio"], abs=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(old, scored.logprobs, strict=True))


def test_a_second_update_without_a_step_between_repeats_the_first(model, questions, config):
    """The probability ratio is 1 in both, so the gradient is the same."""
    scored, first = update(model, rollout_of(model, questions[:4], config), config)
    expected = gradients(model).clone()
    _, second = update(model, scored, config)
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)
    assert second == pytest.approx(first, abs=1e-5)


def test_an_added_reward_trains_groups_whose_other_rewards_agree(model, questions, config, tmp_path):
    """Which groups have no gradient follows from the list of rewards, not from the built-in ones."""
    (tmp_path / "mine.py").write_text("def remainder(completions):\n    return [sum(c.token_ids) % 5 for c in completions]\n")
    config = dataclasses.replace(
        config, representation_weight=0.0, behaviour_weight=0.0, max_grad_norm=1e9, reward=(f"{tmp_path}/mine.py:remainder=2",)
    )
    rollout = rollout_of(model, questions[:3], config)
    added = torch.tensor([float(sum(completion.token_ids) % 5) for completion in rollout.completions])
    # All answers earn the same, so only the added reward tells the completions of a group apart.
    same = {name: torch.ones(len(added)) for name in ("accuracy", "format")}
    rollout = dataclasses.replace(rollout, completion_rewards=rollout.completion_rewards | same)
    scored, _ = update(model, rollout, config)
    torch.testing.assert_close(scored.rewards_N, 1.5 + 2.0 * added)
    differ = [added[rollout.groups_N == group].unique().numel() > 1 for group in rollout.groups_N.tolist()]
    assert any(differ)
    assert scored.trained_N.tolist() == differ
    got = gradients(model).clone()
    expected = loss_of_each_alone(model, rollout, scored.advantages_N)
    model.module.zero_grad()
    expected.backward()
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-3)
    assert got.abs().max() > 0
    assert completion_metrics([completion_columns(scored)])["remainder/text"] > 0


def test_plain_grpo_ignores_alignment(model, questions, config):
    config = dataclasses.replace(config, representation_weight=0.0, behaviour_weight=0.0)
    rollout = rollout_of(model, questions[:4], config)
    scored, _ = update(model, rollout, config)
    torch.testing.assert_close(scored.rewards_N, base_rewards(rollout))


def test_nan_stops_training_before_the_weights_are_touched(model, questions, config):
    rollout = rollout_of(model, questions[:2], config)
    with torch.no_grad():
        model.head.weight[7] = torch.nan
    before = model.language_model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(TrainingError, match="not finite"):
        update(model, rollout, config, learning_rate=0.1)
    assert torch.equal(model.language_model.layers[0].mlp.up_proj.weight, before)


def test_metrics_by_modality(model, questions, config):
    rollout = rollout_of(model, questions[:4], config)
    scored, _ = update(model, rollout, config)
    metrics = completion_metrics([completion_columns(scored)])
    speech = [c for c in rollout.completions if c.modality is Modality.SPEECH]
    answers = [
        rollout.completion_rewards["accuracy"][i].item()
        for i, c in enumerate(rollout.completions)
        if c.modality is Modality.SPEECH
    ]
    assert metrics["accuracy/speech"] == pytest.approx(sum(answers) / len(speech))
    assert metrics["length/speech"] == pytest.approx(sum(len(c.token_ids) for c in speech) / len(speech))


def test_trained_audio_tower_gets_its_gradient(make_model, questions, config, tmp_path):
    """Against each completion alone; a question whose recording fails does not lend its sound to another."""
    model = make_model(freeze_audio=False)
    config = dataclasses.replace(config, max_grad_norm=1e9)
    broken = dataclasses.replace(questions[1], audio=tmp_path / "missing.wav")
    batch = prepare_batch(model, [questions[0], broken, *questions[2:4]])
    engine = TransformersEngine(model, config.rollout_batch_size)
    with ThreadPoolExecutor(2) as background:
        collector = RolloutCollector(model, engine, Rewards(config), config, background)
        rollout, left_out = collector.collect(batch, 0, PhaseTimer(model.device))
    assert len(left_out) == 1
    scored, _ = update(model, rollout, config)
    got = gradients(model).clone()
    model.module.zero_grad()
    heard = model.encode_prompts([questions[0], *questions[2:4]], Modality.SPEECH)
    expected = torch.zeros(())
    for prompt, completion, advantage in zip(rollout.prompts, rollout.completions, scored.advantages_N, strict=True):
        if not completion.truncated:
            own = heard[completion.question] if completion.modality is Modality.SPEECH else prompt
            expected = expected - advantage * alone(model, own, completion)[0].sum() / rollout.num_tokens
    expected.backward()
    assert model.module.model.audio_tower.conv1.weight.grad.abs().max() > 0
    torch.testing.assert_close(got, gradients(model), atol=1e-6, rtol=1e-3)


def test_a_stale_tower_hears_again_before_scoring(make_model, questions, config):
    """Old log-probabilities are those of one policy, tower included, also where the tower has been trained since sampling."""
    model = make_model(freeze_audio=False)
    rollout = dataclasses.replace(rollout_of(model, questions[:2], config), staleness=1)
    with torch.no_grad():
        for parameter in model.module.model.audio_tower.parameters():
            parameter.mul_(1.1)
    scored, _ = update(model, rollout, config)
    with torch.no_grad():
        heard = model.encode_prompts(questions[:2], Modality.SPEECH)
        for prompt, completion, logprobs in zip(rollout.prompts, rollout.completions, scored.logprobs, strict=True):
            own = heard[completion.question] if completion.modality is Modality.SPEECH else prompt
            torch.testing.assert_close(logprobs, alone(model, own, completion)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_checkpointing_changes_nothing_but_memory(make_model, questions, config, lora_rank):
    plain = make_model(lora_rank=lora_rank)
    recomputing = make_model(lora_rank=lora_rank, gradient_checkpointing=True)
    recomputing.module.load_state_dict(plain.module.state_dict())
    rollout = rollout_of(plain, questions[:4], config)
    assert rollout_of(recomputing, questions[:4], config).completions == rollout.completions
    expected, _ = update(plain, rollout, config)
    runs = []
    recomputing.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    got, _ = update(recomputing, rollout, config)
    assert len(runs) == 3, (
        "each layer runs once for what has no gradient, once for the rest and once more for its backward pass"
    )
    assert torch.equal(got.terms["representation"].nan_to_num(), expected.terms["representation"].nan_to_num())
    torch.testing.assert_close(gradients(recomputing), gradients(plain), atol=1e-7, rtol=1e-5)
    assert not any(module.training for module in recomputing.module.modules())


def test_representation_reward_without_reference_is_zero():
    pooled = torch.randn(3, 4, 8)
    modalities = [Modality.TEXT, *[Modality.SPEECH] * 3]
    completions = [Completion(0, modality, (1,), (0.0,), "", truncated=False) for modality in modalities]
    inputs = reward_inputs(completions, [Question("a", "?")], [None, 0, None, 0], pooled.unbind(1))
    rewards = reward_values(Reward("representation", Representation(Needs("all", reference=True))), inputs)
    assert rewards[0].isnan()
    assert rewards[2] == 0
    assert rewards[1] == pytest.approx(F.cosine_similarity(pooled[:, 1], pooled[:, 0], dim=-1).mean().item(), abs=1e-6)
