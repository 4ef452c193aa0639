"""Real vLLM on the weights that are being trained: one copy, the same policy to the fifth decimal, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import MAKERS, VARIANTS
from items import first_items
from safetensors.torch import load_file
from steps import gradients, rollout_of, update

from tars_fast.config import TrainConfig
from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions
from tars_fast.models.adapters import load_adapter
from tars_fast.models.checkpoint import save_model
from tars_fast.models.hub import copy_processor
from tars_fast.models.memory import Workload
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS, architecture_of
from tars_fast.models.speech_model import SpeechModel, load_module, make_trainable
from tars_fast.models.weights import SharingError
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.rollout.vllm_engine import VllmEngine
from tars_fast.rollout.vllm_experts import check_experts
from tars_fast.rollout.vllm_internals import VllmSettings
from tars_fast.types import Modality, Prompt, TrainingError, UserError

pytestmark = pytest.mark.vllm

GREEDY = Sampling(num_completions=1, max_new_tokens=40, temperature=0.0, seed=0)
SAMPLED = Sampling(num_completions=4, max_new_tokens=40, temperature=1.0, seed=5)
POCKET = PRESETS["pocket"].source


_alive: list[VllmEngine] = []
"""vLLM's engines share process-wide state, which the first one to go would take from the others."""


def start(
    source: str = POCKET,
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    lora_targets: tuple[str, ...] | None = None,
    *,
    adapted: bool = False,
    **changes,
) -> VllmEngine:
    """An engine on the CPU, its model made trainable as the loop does it, or as the adapter that `source` is leaves it."""
    settings = VllmSettings(
        max_sequences=64,
        max_tokens=128,
        kv_cache_bytes=2**24,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        cuda_graphs=False,
    )
    prompts = load_prompt_format(PRESETS["pocket"], source)
    engine = VllmEngine(prompts, source, torch.device("cpu"), dtype, dataclasses.replace(settings, **changes))
    if adapted:
        load_adapter(engine.model.module, prompts.family, source)
    else:
        make_trainable(
            engine.model,
            lora_rank=lora_rank,
            lora_alpha=32.0,
            lora_targets=lora_targets,
            freeze_audio=True,
            gradient_checkpointing=False,
        )
    _alive.append(engine)
    return engine


@pytest.fixture(scope="module")
def started() -> Callable[[int], VllmEngine]:
    """The engine for a rank of adapters, started when it is first asked for."""
    return cache(lambda lora_rank: start(lora_rank=lora_rank))


@pytest.fixture(params=[pytest.param(0, id="full"), pytest.param(4, id="lora", marks=pytest.mark.slow)])
def engine(started, request) -> Iterator[VllmEngine]:
    """The engine of either way to train, its weights as they were at the start of each test."""
    chosen = started(request.param)
    before = {name: value.clone() for name, value in chosen.model.module.state_dict().items()}
    yield chosen
    with torch.no_grad():
        for name, value in chosen.model.module.state_dict().items():
            value.copy_(before[name])


@pytest.fixture
def full_engine(started) -> VllmEngine:
    return started(0)


@pytest.fixture(scope="module")
def questions():
    return load_questions(HELD_OUT_DATA)[:6]


def prompts_of(engine: VllmEngine, questions) -> list[Prompt]:
    with torch.no_grad():
        return [prompt for modality in Modality for prompt in engine.model.encode_prompts(questions, modality)]


@torch.no_grad()
def trainer_logprobs(engine: VllmEngine, prompts, completions, temperature: float = 1.0) -> torch.Tensor:
    """[T] what the trainer's own forward pass says of the completions' tokens."""
    model = engine.model
    per_prompt = len(completions) // len(prompts)
    layout = model.pack([prompt for prompt in prompts for _ in range(per_prompt)], completions)
    logits = (model.head(model.forward(layout)).float() + model.suppressed_bias) / temperature
    return logits.log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]


def assert_same_policy(engine: VllmEngine, questions, tolerance: float) -> None:
    """Greedy tokens equal transformers' own, and log-probabilities of greedy and sampled tokens equal the trainer's."""
    prompts, numbers = prompts_of(engine, questions), range(2 * len(questions))
    greedy = engine.generate(prompts, numbers, GREEDY)
    reference = TransformersEngine(engine.model, 64).generate(prompts, numbers, GREEDY)
    assert [completion.token_ids for completion in greedy] == [completion.token_ids for completion in reference]
    assert [completion.text for completion in greedy] == [completion.text for completion in reference]
    for completions in (greedy, engine.generate(prompts, numbers, SAMPLED)):
        rollout = torch.tensor([logprob for completion in completions for logprob in completion.rollout_logprobs])
        assert (trainer_logprobs(engine, prompts, completions) - rollout).abs().max() <= tolerance


def train_a_little(engine: VllmEngine, questions, num_steps: int = 2, learning_rate: float = 1e-2) -> None:
    """Real optimiser steps that change what the model says."""
    model = engine.model
    prompts = prompts_of(engine, questions)
    completions = engine.generate(prompts, range(len(prompts)), GREEDY)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=learning_rate)
    for _ in range(num_steps):
        layout = model.pack(prompts, completions)
        logprobs = model.head(model.forward(layout)).log_softmax(-1).gather(-1, layout.targets[:, None])
        logprobs.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_same_policy_before_and_after_training_and_kv_release(engine, questions):
    assert_same_policy(engine, questions, tolerance=1e-4)
    before = engine.generate(prompts_of(engine, questions), range(12), GREEDY)
    train_a_little(engine, questions)
    assert_same_policy(engine, questions, tolerance=1e-4)
    after = engine.generate(prompts_of(engine, questions), range(12), GREEDY)
    assert before != after, "training must have changed what the model says, or nothing was tested"
    engine.release_memory()
    train_a_little(engine, questions)
    engine.release_memory()
    assert_same_policy(engine, questions, tolerance=1e-4)


def test_same_policy_where_every_token_is_about_as_likely(engine, questions):
    """A near-uniform model amplifies nothing: what differs is the arithmetic alone."""
    with torch.no_grad():
        engine.model.head.weight.mul_(0.02)
    assert_same_policy(engine, questions, tolerance=1e-5)


def test_logprobs_are_those_of_the_sampling_distribution(engine, questions):
    prompts = prompts_of(engine, questions)
    sampling = dataclasses.replace(SAMPLED, temperature=0.7)
    completions = engine.generate(prompts, range(12), sampling)
    rollout = torch.tensor([logprob for completion in completions for logprob in completion.rollout_logprobs])
    assert (trainer_logprobs(engine, prompts, completions, 0.7) - rollout).abs().max() <= 1e-4
    assert (trainer_logprobs(engine, prompts, completions, 1.0) - rollout).abs().max() > 1e-2


def test_same_seed_same_draws(engine, questions):
    prompts = prompts_of(engine, questions)
    first = engine.generate(prompts, range(12), SAMPLED)
    assert engine.generate(prompts, range(12), SAMPLED) == first
    assert engine.generate(prompts, range(12), dataclasses.replace(SAMPLED, seed=6)) != first
    assert len({completion.token_ids for completion in first[:4]}) > 1, "completions of one prompt are draws of their own"


def test_completions_carry_question_modality_and_truncation(engine, questions):
    prompts = prompts_of(engine, questions)
    completions = engine.generate(prompts, [7] * 6 + [8] * 6, dataclasses.replace(SAMPLED, max_new_tokens=5))
    assert [completion.question for completion in completions] == [7] * 24 + [8] * 24
    assert [completion.modality for completion in completions] == [prompt.modality for prompt in prompts for _ in range(4)]
    assert all(completion.truncated and len(completion.token_ids) == 5 for completion in completions)
    finished = engine.generate(prompts, range(12), GREEDY)
    stops = engine.model.prompts.stop_token_ids
    assert all(not completion.truncated and completion.token_ids[-1] in stops for completion in finished)
    assert all(completion.text.endswith("</answer>") for completion in finished)


def test_every_stop_token_ends_a_completion(full_engine, questions):
    bias = full_engine.model.suppressed_bias
    before = bias.clone()
    prompts = prompts_of(full_engine, questions[:1])
    try:
        for stop in full_engine.model.prompts.stop_token_ids:
            bias.fill_(-1e4)
            bias[stop] = 0.0
            for completion in full_engine.generate(prompts, range(2), SAMPLED):
                assert completion.token_ids == (stop,)
                assert not completion.truncated
                assert completion.text == ""
    finally:
        bias.copy_(before)


def test_the_policy_cannot_say_the_audio_token(full_engine, questions):
    model = full_engine.model
    audio_token = model.prompts.audio_token_id
    weight = model.head.weight
    before = weight[audio_token].detach().clone()
    with torch.no_grad():
        # Would be nearly every token's likeliest successor.
        weight[audio_token] = 50 * weight.mean(0) + 50 * weight[model.prompts.stop_token_ids[-1]]
    try:
        completions = full_engine.generate(prompts_of(full_engine, questions), range(12), SAMPLED)
        assert all(audio_token not in completion.token_ids for completion in completions)
    finally:
        with torch.no_grad():
            weight[audio_token] = before


def test_a_group_shares_its_prompts_cache_and_an_update_never_meets_an_old_one(full_engine, questions, monkeypatch):
    cached: list[int] = []
    generate = full_engine._internals.generate

    def spy(requests, params, seed, on_finished, *others, **settings):
        found = {}

        def look(number, output):
            found[number] = output.num_cached_tokens
            on_finished(number, output)

        generate(requests, params, seed, look, *others, **settings)
        cached.append([found[number] for number in range(len(requests))])

    monkeypatch.setattr(full_engine._internals, "generate", spy)
    prompts = prompts_of(full_engine, questions[:1])
    full_engine.generate(prompts, range(2), SAMPLED)
    full_engine.generate(prompts, range(2), GREEDY)
    for prompt, of_group, alone in zip(prompts, *cached, strict=True):
        assert of_group == (len(prompt.token_ids) - 1) // 32 * 32, "whole blocks of the prompt, from its first completion"
        assert alone == 0, "a new call may follow an update"


def test_a_draw_needs_a_hand_over_of_its_own(full_engine, questions):
    prompts = prompts_of(full_engine, questions[:1])
    full_engine.wake_up()
    full_engine.sample(prompts, GREEDY, lambda *_: None)
    with pytest.raises(RuntimeError, match="the weights may have changed"):
        full_engine.sample(prompts, GREEDY, lambda *_: None)


def test_completions_are_handed_over_as_soon_as_a_prompt_has_all_of_its_own(full_engine, questions):
    """Short answers are handed over while longer ones still run."""
    prompts = prompts_of(full_engine, questions)
    unfinished = []
    full_engine.wake_up()
    engine = full_engine._internals.llm.llm_engine
    full_engine.sample(prompts, SAMPLED, lambda _number, _sampled: unfinished.append(engine.get_num_unfinished_requests()))
    assert len(unfinished) == 12
    assert unfinished[0] > 0 == unfinished[-1]


def test_sampling_beside_training_changes_neither(engine, questions, config):
    """In a thread of its own, on the weights that are being trained: completions, rewards and gradients stay the same."""
    config = dataclasses.replace(config, max_grad_norm=1e9, tokens_per_micro_batch=700)
    rollout = rollout_of(engine.model, questions, config, engine=engine)
    scored, metrics = update(engine.model, rollout, config)
    expected = gradients(engine.model).clone()
    prompts = prompts_of(engine, questions)
    completions = engine.generate(prompts, range(12), SAMPLED)
    with ThreadPoolExecutor(1) as sampler:
        beside = sampler.submit(engine.generate, prompts, range(12), SAMPLED)
        for _ in range(3):
            again, metrics_again = update(engine.model, rollout, config)
            assert torch.equal(again.rewards_N, scored.rewards_N)
            assert metrics_again == metrics
            assert torch.equal(gradients(engine.model), expected)
        assert beside.result() == completions


def test_stopping_ends_a_draw_at_its_next_token(engine, questions):
    prompts = prompts_of(engine, questions)
    expected = engine.generate(prompts, range(12), GREEDY)
    engine.wake_up()
    engine.stop()
    with pytest.raises(TrainingError, match="sampling was stopped"):
        engine.sample(prompts, SAMPLED, lambda *_: pytest.fail("a whole answer"))
    engine._stopped = False
    assert engine.generate(prompts, range(12), GREEDY) == expected


def test_audio_goes_through_the_tower_once_and_never_in_the_engine(full_engine, questions):
    calls = []
    towers = {
        id(tower): tower for tower in (full_engine.model.module.model.audio_tower, full_engine._internals.module.audio_tower)
    }
    # Not the tower itself: Qwen2-Audio's family calls its layers, in a forward of its own.
    handles = [tower.conv1.register_forward_hook(lambda _, inputs, __: calls.extend(inputs[0])) for tower in towers.values()]
    full_engine.model.set_audio_cache(2**20, None, 0)
    try:
        prompts = prompts_of(full_engine, questions)
        assert len(calls) == len(questions), "every recording once"
        full_engine.generate(prompts, range(12), SAMPLED)
        prompts_of(full_engine, questions)
        assert len(calls) == len(questions)
    finally:
        for handle in handles:
            handle.remove()


def test_every_parameter_is_the_engines_own_memory(engine):
    own = {name: value for name, value in engine.model.module.named_parameters() if ".lora_" not in name}
    held = {value.untyped_storage().data_ptr() for value in engine._internals.module.parameters()}
    assert {value.untyped_storage().data_ptr() for value in own.values()} == held, "no storage beside the engine's"
    assert len(own) > len(held), "fused parameters share a storage"
    assert not any(value.is_meta for value in engine.model.module.state_dict().values())


def _replace(layer: torch.nn.Module) -> None:
    """A copy of the weight in its place, equal to the last bit."""
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


BREAKAGES = {
    # The first parameter of the module, which all of `.to` has moved.
    "model.audio_tower.conv1.weight": lambda engine: engine.model.module.to(torch.float64).to(torch.float32),
    "lm_head.weight": lambda engine: _replace(engine.model.head),
    # Query rows come first in the fused weight, so theirs is the first view to differ.
    "model.language_model.layers.2.self_attn.q_proj.weight": lambda engine: _replace(
        engine._internals.module.language_model.model.layers[2].self_attn.qkv_proj
    ),
    "language_model.lm_head": lambda engine: setattr(
        engine._internals.module.language_model.lm_head, "cpu_linear", lambda x, weight, bias: x
    ),
}


@pytest.mark.parametrize(
    "named", [pytest.param(name, marks=pytest.mark.slow if place else ()) for place, name in enumerate(BREAKAGES)]
)
def test_whatever_breaks_sharing_is_named_before_the_next_rollout(named, questions):
    engine = start()
    engine.assert_shared()
    prompts = prompts_of(engine, questions[:1])
    BREAKAGES[named](engine)
    with pytest.raises(SharingError, match=rf"^{re.escape(named)}: .*(no longer share|packed copy)"):
        engine.generate(prompts, range(2), GREEDY)


@pytest.mark.slow
def test_adapters_of_some_layers_reach_those_and_no_other(questions):
    """vLLM has buffers of what it fuses with one of them too, which stay zeros; the plan counts all."""
    targets = ("q_proj", "down_proj")
    engine = start(lora_rank=4, lora_targets=targets)
    assert_same_policy(engine, questions, tolerance=1e-4)
    before = engine.generate(prompts_of(engine, questions), range(12), GREEDY)
    train_a_little(engine, questions)
    assert_same_policy(engine, questions, tolerance=1e-4)
    assert before != engine.generate(prompts_of(engine, questions), range(12), GREEDY)
    written, num_bytes = set(), 0
    layers = engine._internals.module.named_modules()
    for name, layer in ((name, layer) for name, layer in layers if hasattr(layer, "lora_a_stacked")):
        for number, (a, b) in enumerate(zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)):
            num_bytes += a.nbytes + b.nbytes
            if a.any() or b.any():
                written.add((name.rpartition(".")[2], number))
    assert written == {("qkv_proj", 0), ("down_proj", 0)}
    config = TrainConfig(lora_rank=4, lora_targets=",".join(targets))
    workload = config.workload(config.as_preset(PRESETS["pocket"]), architecture_of(PRESETS["pocket"]), "vllm", 4)
    assert workload.adapters == num_bytes + sum(parameter.nbytes for parameter in engine.model.trainable_parameters())


@pytest.mark.slow
def test_bfloat16_agrees_in_the_mean(questions):
    for lora_rank in (0, 4):
        engine = start(dtype=torch.bfloat16, lora_rank=lora_rank)
        prompts = prompts_of(engine, questions)
        completions = engine.generate(prompts, range(12), SAMPLED)
        rollout = torch.tensor([logprob for completion in completions for logprob in completion.rollout_logprobs])
        difference = (trainer_logprobs(engine, prompts, completions) - rollout).abs()
        assert difference.mean() < 0.02


def test_kv_cache_is_gone_while_training(engine, questions):
    prompts = prompts_of(engine, questions)
    first = engine.generate(prompts, range(12), SAMPLED)
    caches = engine._internals._runner.kv_caches
    assert sum(cache.untyped_storage().nbytes() for cache in caches) > 0.9 * 2**24
    engine.release_memory()
    engine.release_memory()
    core = engine._internals.llm.llm_engine.engine_core.engine_core
    assert not core.scheduler.has_requests(), "what vLLM's own release of the cache would be refused for"
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
    # Memory that comes back is not empty: NaN left there must not reach attention.
    poison = [torch.full((2**20,), torch.nan) for _ in range(8)]
    del poison
    assert engine.generate(prompts, range(12), SAMPLED) == first


def test_under_graphs_the_kv_cache_alone_loses_its_memory(full_engine, monkeypatch):
    # vLLM's allocator of sleep mode needs CUDA; what it is asked for does not.
    from vllm.device_allocator import cumem

    pieces = {
        name: SimpleNamespace(tag=tag, handle=name) for name, tag in {"w": "weights", "k": "kv_cache", "v": "kv_cache"}.items()
    }
    mapped = set(pieces)
    monkeypatch.setattr(cumem.CuMemAllocator, "get_instance", lambda: SimpleNamespace(pointer_to_data=pieces))
    monkeypatch.setattr(cumem, "unmap_and_release", mapped.remove)
    monkeypatch.setattr(cumem, "create_and_map", mapped.add)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    internals = full_engine._internals
    monkeypatch.setattr(internals, "_keeps_addresses", True)
    cache = internals._runner.kv_caches[0]
    address = cache.data_ptr()
    internals.release_kv_cache()
    internals.release_kv_cache()
    assert mapped == {"w"}
    cache.fill_(torch.nan)
    internals.restore_kv_cache()
    assert mapped == set(pieces)
    assert cache.data_ptr() == address
    assert not cache.isnan().any()


def bad_prompts(good: Prompt) -> dict[str, Prompt]:
    (audio,) = good.audio_clips
    return {
        "outside the vocabulary": dataclasses.replace(good, token_ids=(*good.token_ids, 10**6)),
        "empty": Prompt(Modality.TEXT, ()),
        "more than the engine's": Prompt(Modality.TEXT, (5,) * 120),
        "do not match": dataclasses.replace(good, audio_clips=(audio[:-1],)),
        "not match its audio": dataclasses.replace(good, audio_clips=()),
        "not finite": dataclasses.replace(good, audio_clips=(audio * torch.nan,)),
    }


def test_a_bad_prompt_never_reaches_the_engine(full_engine, questions, monkeypatch):
    prompts = prompts_of(full_engine, questions)
    expected = full_engine.generate(prompts, range(12), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(full_engine._internals, "generate", lambda *_, **__: pytest.fail("reached the engine"))
        for message, prompt in bad_prompts(prompts[0]).items():
            with pytest.raises(ValueError, match=f"prompt 1: .*{message}|prompt 1: {message}"):
                full_engine.generate([prompts[0], prompt], range(2), GREEDY)
    assert full_engine.generate(prompts, range(12), GREEDY) == expected


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_generation_leaves_no_request_behind(engine, questions, monkeypatch, exception):
    prompts = prompts_of(engine, questions)
    expected = engine.generate(prompts, range(12), SAMPLED)
    llm = engine._internals.llm.llm_engine
    step, calls = llm.step, []

    def failing_step():
        calls.append(1)
        if len(calls) == 4:
            raise exception
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", failing_step)
        with pytest.raises(exception):
            engine.generate(prompts, range(12), SAMPLED)
    assert llm.get_num_unfinished_requests() == 0
    assert engine.generate(prompts, range(12), SAMPLED) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_non_finite_logits_are_caught(engine, questions, sampling):
    prompts = prompts_of(engine, questions)
    norm = engine.model.language_model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm[0] = torch.nan
    try:
        with pytest.raises(TrainingError, match="not finite"):
            engine.generate(prompts, range(12), sampling)
    finally:
        with torch.no_grad():
            norm.copy_(before)
    engine.generate(prompts, range(12), sampling)


def test_threads_and_torch_are_left_as_they_were(full_engine):
    assert torch.get_num_threads() == 1
    assert torch.set_num_threads.__module__ in ("torch", None, "torch._C")


LOADING = """
import json, sys
import torch
sys.path[:0] = ["tests/rollout", "tests"]
from anonymous_memory import peak_of
from test_vllm_engine import start

def load(folder, copies):
    engine = start(folder)
    if copies == 2:
        from transformers import Qwen2AudioForConditionalGeneration
        second = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
        second = second.to(torch.float64).to(torch.float32)
    return engine

start()  # imports, allocator and a first engine are not what is measured
engine, peak = peak_of(lambda: load(sys.argv[1], int(sys.argv[2])))
storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.model.module.parameters()}
print(json.dumps({"peak": peak, "weights": sum(storages.values())}))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory) -> Path:
    """100 M parameters, 0.4 GB: large beside the activations of vLLM 0.26, which runs the model once while it starts."""
    from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.from_pretrained(POCKET)
    for name, value in {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12}.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * 12
    Qwen2AudioForConditionalGeneration._from_config(config).save_pretrained(folder)
    copy_processor(POCKET, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_loading_never_holds_a_second_copy(large_checkpoint):
    """Peak of anonymous memory while loading, beside a control that does load a second copy."""
    results = []
    for copies in (1, 2):
        command = [sys.executable, "-c", LOADING, str(large_checkpoint), str(copies)]
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root)
        results.append(json.loads(output.stdout.strip().splitlines()[-1]))
    one, two = results
    assert one["weights"] > 3e8
    assert one["peak"] < 1.5 * one["weights"]
    assert two["peak"] > 1.8 * one["weights"], "the measure would not have seen a second copy"


@pytest.mark.slow
def test_one_sequence_is_enough_of_a_cache(questions):
    """The smallest cache that `plan` allows holds one completion of full length."""
    workload = Workload(
        architecture_of(PRESETS["pocket"]), "vllm", 4, 0,
        group_size=8, max_new_tokens=40, longest_prompt=88, rollout_batch_size=64,
    )  # fmt: skip
    engine = start(kv_cache_bytes=workload.sequence_bytes)
    full = Prompt(Modality.TEXT, (40,) * 88)
    engine.model.suppressed_bias[engine.model.prompts.stop_token_ids] = -100.0
    (completion,) = engine.generate([full], range(1), GREEDY)
    assert completion.truncated
    assert len(completion.token_ids) == 40


def test_a_checkpoint_vllm_cannot_read_is_the_users_to_put_right(tmp_path):
    for path in Path(POCKET).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"--model .*: cannot be loaded"):
        start(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_resumed_policy_is_the_checkpoints(lora_rank, tmp_path, questions):
    """What the trainer saves, vLLM reads: a full checkpoint as weights, an adapter on top of its base."""
    from steps import save_checkpoint

    from tars_fast.rollout.policy import load_model_and_engine

    engine = start(lora_rank=lora_rank)
    train_a_little(engine, questions)
    expected = engine.generate(prompts_of(engine, questions), range(12), GREEDY)
    optimizer = torch.optim.AdamW(engine.model.trainable_parameters())
    folder = save_checkpoint(tmp_path, 1, engine.model, optimizer)
    prompts = load_prompt_format(PRESETS["pocket"], str(folder))
    workload = Workload(
        architecture=architecture_of(PRESETS["pocket"]),
        engine="vllm",
        dtype_bytes=4,
        lora_rank=lora_rank,
        group_size=8,
        max_new_tokens=40,
        longest_prompt=88,
        rollout_batch_size=64,
        trains=False,
        given_kv_cache=20_000_000,
    )
    loaded = {}
    for name in ("vllm", "transformers"):
        given = dataclasses.replace(workload, engine=name)
        model, other = load_model_and_engine(prompts, str(folder), torch.device("cpu"), torch.float32, given)
        _alive.append(other)
        with torch.no_grad():
            encoded = [prompt for modality in Modality for prompt in model.encode_prompts(questions, modality)]
        loaded[name] = [completion.token_ids for completion in other.generate(encoded, range(12), GREEDY)]
    assert loaded["vllm"] == [completion.token_ids for completion in expected]
    assert loaded["transformers"] == loaded["vllm"]


def run_training(output_dir: Path, *flags: object) -> list[dict[str, float]]:
    """A run in a process of its own, as a user starts it, evaluated on eight items."""
    items = output_dir.parent / "items"
    if not items.exists():
        first_items(VALIDATION_DATA, 8, items)
    command = [sys.executable, "-m", "tars_fast.train", "--output-dir", output_dir, "--eval-data", items, "--eval-samples", 0]
    subprocess.run([str(part) for part in (*command, *flags)], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_adapter_of_peft_on_decoder_and_tower_is_the_same_policy(tmp_path, questions):
    """rsLoRA of several ranks; the tower's part stays with the trainer, which encodes audio for the engine too."""
    import peft

    plain = load_module(load_prompt_format(PRESETS["pocket"], POCKET), POCKET, torch.device("cpu"), torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj", "fc1"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        base_model_name_or_path=POCKET,
    )
    adapted = peft.get_peft_model(plain, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    adapted.save_pretrained(tmp_path)
    engine = start(str(tmp_path), lora_rank=4, adapted=True)
    assert any(".lora_A." in name and "audio_tower" in name for name, _ in engine.model.module.named_parameters())
    assert_same_policy(engine, questions, 1e-4)
    theirs = SpeechModel(adapted.base_model.model, engine.model.prompts)
    with torch.no_grad():
        clips = [theirs.prompts.features(wave) for wave in theirs.prompts.load_clips(questions[0].audio)[0]]
        torch.testing.assert_close(engine.model.encode_clips(clips), theirs.encode_clips(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_resumed_run_equals_unbroken_one_and_one_of_another_seed_does_not(tmp_path):
    """Same steps, bit for bit, with the engine started anew in the middle; adapters start from `--seed`, not from vLLM's.

    Full fine-tuning is resumed with vLLM by the two processes of tests/learning/test_workers.py.
    """
    common = ["--engine", "vllm", "--questions-per-step", 4, "--save-every", 1, "--lora-rank", 4, "--learning-rate", "2e-3"]
    unbroken = run_training(tmp_path / "unbroken", *common, "--num-steps", 2)
    for line in unbroken:
        assert line["logprob_diff_max"] < 1e-4
        assert line["importance_ratio"] == pytest.approx(1, abs=1e-5)
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-1", tmp_path / "broken" / "checkpoint-1")
    for name in ("config.json", "predictions_before.jsonl", "metrics.jsonl"):
        (tmp_path / "broken" / name).write_text((tmp_path / "unbroken" / name).read_text())
    resumed = run_training(tmp_path / "broken", *common, "--num-steps", 2, "--resume")
    timeless = [[{k: v for k, v in line.items() if "seconds" not in k} for line in lines] for lines in (unbroken, resumed)]
    assert timeless[0] == timeless[1]
    run_training(tmp_path / "other", *common, "--num-steps", 1, "--seed", 1)
    one, other = (load_file(tmp_path / run / "checkpoint-1" / "adapter_model.safetensors") for run in ("unbroken", "other"))
    # One step of Adam moves a weight by the learning rate; those drawn apart lie some 0.05 apart.
    assert all((value - other[name]).abs().mean() > 0.01 for name, value in one.items() if "lora_A" in name)


@pytest.mark.slow
def test_learns_like_transformers(tmp_path):
    """Same seed, same steps: reward curves of the two engines within the noise of their sampling."""
    curves = {}
    for engine in ("vllm", "transformers"):
        # At the preset's rate two runs come apart within these steps, whatever the engine.
        settings = ("--objective", "tars", "--learning-rate", "2e-4", "--num-steps", 6)
        metrics = run_training(tmp_path / engine, "--engine", engine, *settings)
        curves[engine] = torch.tensor([[line["reward/speech"], line["reward/text"]] for line in metrics])
        assert all(line["logprob_diff_mean"] < 1e-6 for line in metrics)
    # 128 completions a step and modality with rewards of deviation up to about 0.9: 0.08 a step, 0.03 for a mean of six.
    difference = (curves["vllm"] - curves["transformers"]).mean(0).abs()
    assert difference.max() < 4 * 2**0.5 * 0.03


def test_training_items_fit_what_the_loop_asks_for():
    """The data's longest prompt decides the engine's longest sequence; nothing longer may come later."""
    prompts = load_prompt_format(PRESETS["pocket"], POCKET)
    sizes = prompts.check_questions(load_questions(TRAINING_DATA), 40)
    assert max(size.num_tokens for size in sizes) + 40 <= 128


@torch.no_grad()
def assert_loaded_as_by_transformers(engine: VllmEngine, source: str, questions) -> None:
    """Against a model that never saw vLLM: what both share could be wrong in both."""
    prompts = engine.model.prompts
    own = SpeechModel(load_module(prompts, source, torch.device("cpu"), torch.float32), prompts)
    shared = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in engine.model.module.named_parameters(remove_duplicate=False)
    }
    for name, parameter in own.module.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, shared[name]), name
    encoded = [prompt for modality in Modality for prompt in own.encode_prompts(questions, modality)]
    theirs = TransformersEngine(own, 64).generate(encoded, range(len(encoded)), GREEDY)
    ours = engine.generate(prompts_of(engine, questions), range(len(encoded)), GREEDY)
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]


@pytest.mark.slow
def test_what_transformers_keeps_in_float32_stays_so(tmp_path):
    """Voxtral's positions, whose rounding would reach every audio embedding."""
    source = str(MAKERS["voxtral"](tmp_path))
    engine = start(source, torch.bfloat16, max_tokens=2048, kv_cache_bytes=2**26)
    own = load_module(engine.model.prompts, source, torch.device("cpu"), torch.bfloat16)
    shared = dict(engine.model.module.named_parameters())
    assert {name for name, value in own.named_parameters() if value.dtype == torch.float32}
    for name, value in own.named_parameters():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=0, msg=name)


PLAIN = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts, stops, suppressed = json.loads(sys.argv[1])
llm = LLM(folder, dtype="float32", max_model_len=600, max_num_seqs=4, enforce_eager=True, kv_cache_memory_bytes=2**26,
          gpu_memory_utilization=0.01, skip_mm_profiling=True, generation_config="vllm", seed=0)
bias = {suppressed: -100.0}
settings = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=stops, logit_bias=bias, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
print("TOKENS" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def plain_vllm(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens by vLLM as anybody starts it, without a line of this project."""
    format = load_prompt_format(PRESETS["pocket"], str(folder))
    given = json.dumps([str(folder), prompts, format.stop_token_ids, format.audio_token_id])
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_COMPILE_DISABLE": "1",
    }
    done = subprocess.run([sys.executable, "-c", PLAIN, given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOKENS")).removeprefix("TOKENS"))


@pytest.mark.slow
def test_a_head_is_tied_only_where_the_checkpoint_says_so(tmp_path):
    """Configurations that say nothing: vLLM's default for the part is not what transformers reads of the whole."""
    source = MAKERS["qwen2.5-omni"](tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["thinker_config"]["text_config"].pop("tie_word_embeddings")
    config["thinker_config"].pop("tie_word_embeddings", None)
    (source / "config.json").write_text(json.dumps(config))
    engine = start(str(source), max_tokens=2048, max_sequences=16, kv_cache_bytes=2**26)
    assert_loaded_as_by_transformers(engine, str(source), load_questions(HELD_OUT_DATA)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize(
    "name", ["qwen2-audio", "qwen2-audio-llama", "qwen2.5-omni", "qwen3-omni", "voxtral", "audio-flamingo-3"]
)
def test_families_share_weights_and_speak_alike(name, lora_rank, tmp_path):
    """Before and after training, for one clip and several, and from the checkpoint that training leaves."""
    source = str((MAKERS | VARIANTS)[name](tmp_path / name))
    engine = start(source, lora_rank=lora_rank, max_tokens=2048, max_sequences=16, kv_cache_bytes=2**26)
    questions = load_questions(HELD_OUT_DATA)[:3]
    assert_same_policy(engine, questions, tolerance=1e-4)
    assert not engine._internals.llm.model_config.uses_mrope, "vLLM compiles Qwen3's mixture for one number"
    assert_loaded_as_by_transformers(engine, source, questions)
    before = engine.generate(prompts_of(engine, questions), range(6), GREEDY)
    train_a_little(engine, questions)
    assert_same_policy(engine, questions, tolerance=1e-4)
    trained = engine.generate(prompts_of(engine, questions), range(6), GREEDY)
    assert trained != before, "training had no effect"

    model = engine.model
    whole = model.prompts
    window = dataclasses.replace(whole.family, max_audio_seconds=1.0)
    model.prompts = dataclasses.replace(whole, long_audio="chunk", family=window)
    model.set_audio_cache(0, None, 0)
    assert len(prompts_of(engine, questions)[0].audio_clips) > 1
    assert_same_policy(engine, questions, tolerance=1e-4)
    model.prompts = whole
    model.set_audio_cache(0, None, 0)

    saved = tmp_path / "saved"
    saved.mkdir()
    save_model(model, saved)
    if not lora_rank:
        assert_loaded_as_by_transformers(engine, str(saved), questions)
        published, own = (set(load_file(Path(folder) / "model.safetensors")) for folder in (source, saved))
        # Of Qwen2.5-Omni the talker is left out, which was made for the thinker as it was.
        left_out = ("talker.",) if name == "qwen2.5-omni" else ()
        assert own == {held for held in published if not held.startswith(left_out)}
        if name == "qwen2-audio":
            texts = [list(prompt.token_ids) for prompt in prompts_of(engine, questions)[3:]]
            assert plain_vllm(saved, texts) == [list(completion.token_ids) for completion in trained[3:]]
    again = start(str(saved), lora_rank=lora_rank, max_tokens=2048, max_sequences=16, kv_cache_bytes=2**26, adapted=True)
    assert again.generate(prompts_of(again, questions), range(6), GREEDY) == trained


def logprob_difference(engine: VllmEngine, prompts: list[Prompt], *, replays: bool) -> tuple[float, list[tuple[int, int]]]:
    """Largest difference of trainer's and engine's log-probabilities, and `take_counts`."""
    completions = engine.generate(prompts, range(len(prompts)), dataclasses.replace(SAMPLED, num_completions=4))
    model = engine.model
    model.routing.set_replay(replays=replays)
    repeated = [prompt for prompt in prompts for _ in range(4)]
    packed = model.pack(repeated, completions, routed=True)
    assert (packed.routed_experts[:, :, 0] >= 0).all(-1).sum() == len(packed.token_ids) - len(completions)
    with torch.no_grad():
        logprobs = (model.head(model.forward(packed)) + model.suppressed_bias).log_softmax(-1, dtype=torch.float32)
    own = logprobs.gather(-1, packed.targets[:, None])[:, 0]
    sampled = torch.tensor([value for completion in completions for value in completion.rollout_logprobs])
    return (own - sampled).abs().max().item(), model.routing.take_counts()


@pytest.mark.slow
def test_experts_are_those_of_the_engine(tmp_path):
    """In float32 both choose alike; in bfloat16 rounding sends tokens through others, and replay brings them back."""
    source = str(MAKERS["qwen3-omni"](tmp_path / "model"))
    questions = load_questions(HELD_OUT_DATA)[:3]
    settings = {"lora_rank": 4, "max_tokens": 600, "max_sequences": 16, "kv_cache_bytes": 2**26}
    exact = start(source, **settings)
    difference, counts = logprob_difference(exact, prompts_of(exact, questions), replays=False)
    assert difference < 1e-4
    assert [differ for differ, _ in counts] == [0, 0, 0]
    assert all(known > 0 for _, known in counts)
    assert logprob_difference(exact, prompts_of(exact, questions), replays=True)[0] < 1e-4
    with pytest.raises(SharingError, match=r"experts: vLLM computes experts by GroupedExperts, .*use --engine transformers"):
        check_experts(exact._internals.module, on_cpu=False)
    block = exact.model.language_model.layers[1].mlp
    for layer, leaf in ((block.experts, "gate_up_proj"), (block.experts, "down_proj"), (block.gate, "weight")):
        shared = getattr(layer, leaf)
        setattr(layer, leaf, torch.nn.Parameter(shared.detach().clone(), requires_grad=False))
        with pytest.raises(SharingError, match=rf"layers\.1\.mlp\..*{leaf}: trainer and rollout engine no longer share"):
            exact.assert_shared()
        setattr(layer, leaf, shared)
    exact.assert_shared()
    exact.close()
    rounded = start(source, dtype=torch.bfloat16, **settings)
    prompts = prompts_of(rounded, questions)
    apart, counts = logprob_difference(rounded, prompts, replays=False)
    assert sum(differ for differ, _ in counts) > 0
    replayed, _ = logprob_difference(rounded, prompts, replays=True)
    assert replayed < 0.5 < apart


@pytest.mark.slow
def test_a_mixture_of_experts_trains_with_replay(tmp_path):
    source = MAKERS["qwen3-omni"](tmp_path / "model")
    common = ("--model", source, "--data", "pocket", "--lora-rank", 4, "--learning-rate", "1e-2", "--objective", "opd")
    common += ("--engine", "vllm", "--behaviour-model", "hashed-ngrams", "--eval-items", 2, "--questions-per-step", 2)
    common += ("--max-new-tokens", 150, "--num-steps", 2)
    replayed, plain = (run_training(tmp_path / str(len(more)), *common, *more) for more in (("--router-replay",), ()))
    for metrics in (*replayed, *plain):
        assert metrics["truncated/speech"] < 1, "where all are cut off there is nothing to compare"
        assert metrics["other_experts"] == 0
        assert metrics["logprob_diff_max"] < 1e-4
        assert [name for name in metrics if name.startswith("other_experts/")] == [f"other_experts/layer_{n}" for n in range(3)]
    assert replayed[0]["grad_norm"] > 0
