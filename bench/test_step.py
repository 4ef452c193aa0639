"""Seconds of a training step's phases on the bundled model: `pytest bench/ --benchmark-only`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tars_kernels import LayerPooler, pool_sequences

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, load_questions
from tars_fast.learning.batch import RolloutCollector, prepare_batch
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.update import Learner
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.train import update_policy
from tars_fast.types import Modality


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, device, torch.float32)
    make_trainable(model, lora_rank=0, lora_alpha=32.0, freeze_audio=True, gradient_checkpointing=False)
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return TrainConfig(objective="tars").resolve(
        PRESETS["pocket"], output_dir=tmp_path_factory.mktemp("run"), tokens_per_micro_batch=4096
    )


@pytest.fixture(scope="module")
def questions(config):
    return load_questions(TRAINING_DATA)[: config.questions_per_step]


def collect(model, config, questions):
    engine = TransformersEngine(model, config.rollout_batch_size)
    batch = prepare_batch(model, questions)
    with ThreadPoolExecutor(2) as background:
        collector = RolloutCollector(model, engine, Rewards(config), config, background)
        return collector.collect(batch, 0, PhaseTimer(model.device))[0]


@pytest.mark.benchmark(group="step")
def test_rollout_and_rewards(benchmark, model, config, questions):
    rollout = benchmark.pedantic(collect, (model, config, questions), rounds=3, warmup_rounds=1)
    assert len(rollout.completions) == config.questions_per_step * config.group_size


@pytest.mark.benchmark(group="step")
def test_forward_rewards_backward_update(benchmark, model, config, questions):
    rollout = collect(model, config, questions)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.0)
    learner = Learner(model, optimizer, config)
    metrics = benchmark.pedantic(lambda: update_policy(learner, learner.begin_rollout(rollout)), rounds=3, warmup_rounds=1)
    assert metrics["logprob_diff_max"] < 1e-3


@pytest.mark.benchmark(group="pooling")
@pytest.mark.parametrize("how", ["hooks", "hidden_states"])
@torch.inference_mode()
def test_pooling(benchmark, model, config, questions, how):
    """Pooling while the layers run, beside keeping every layer's states and pooling afterwards."""
    rollout = collect(model, config, questions[:4])
    layout = model.pack(rollout.prompts, rollout.completions)
    pooler = LayerPooler(model.language_model.layers, model.language_model.norm)

    def with_hooks() -> torch.Tensor:
        with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
            model.forward(layout)
        return pooler.pooled

    def with_hidden_states() -> torch.Tensor:
        kept: list[torch.Tensor] = []
        modules = [*model.language_model.layers[:-1], model.language_model.norm]
        hooks = [module.register_forward_hook(lambda _module, _inputs, output: kept.append(output)) for module in modules]
        model.forward(layout)
        for hook in hooks:
            hook.remove()
        return torch.stack([pool_sequences(states[0, layout.positions], layout.cu_seqlens) for states in kept])

    torch.testing.assert_close(with_hooks(), with_hidden_states())
    benchmark.pedantic(with_hooks if how == "hooks" else with_hidden_states, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="evaluation")
@pytest.mark.parametrize("modality", list(Modality))
def test_greedy_answers_to_held_out_items(benchmark, model, config, modality):
    held_out = load_questions(HELD_OUT_DATA)
    prompts = model.encode_prompts(held_out, modality)
    engine = TransformersEngine(model, config.rollout_batch_size)
    sampling = Sampling(num_completions=1, max_new_tokens=config.max_new_tokens, temperature=0.0, seed=0)
    completions = benchmark.pedantic(engine.generate, (prompts, range(len(held_out)), sampling), rounds=3)
    benchmark.extra_info["items_per_second"] = len(completions) / benchmark.stats.stats.median
    assert not any(completion.truncated for completion in completions)
