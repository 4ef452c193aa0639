"""What runs beside the device, and rollouts that are sampled while an earlier batch trains."""

from __future__ import annotations

import dataclasses
import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from items import first_items
from steps import gradients, rollout_of, update
from test_step import alone

from tars_fast import train as train_command
from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import TRAINING_DATA
from tars_fast.learning import batch, loader, run
from tars_fast.learning.loader import RolloutLoader, background_threads
from tars_fast.learning.rewards.behaviour import Behaviour, HashedNgrams
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.rewards.reward import Reward, reward_values
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.selection import Selection, batch_of_step
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import ALONE
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import SETTINGS_BY_PHASE, PhaseTimer
from tars_fast.train import command
from tars_fast.types import Completion, Modality, Question, TrainingError, UserError

CPU = torch.device("cpu")


def loader_of(model: SpeechModel, questions, config: RunConfig, *, engine=None, text_similarity=None) -> RolloutLoader:
    engine = engine or TransformersEngine(model, config.rollout_batch_size, own_modules=bool(config.rollout_ahead))
    return RolloutLoader(model, engine, Rewards(config, text_similarity), Selection(questions, config), config, ALONE)


@pytest.fixture
def config(config) -> RunConfig:
    return dataclasses.replace(config, questions_per_step=2)


@pytest.fixture
def ahead(config) -> RunConfig:
    return dataclasses.replace(config, rollout_ahead=1)


def test_what_needs_no_device_runs_in_threads(model, questions, config, monkeypatch):
    """Decoding, features and tokens of the next batch while this one is sampled; reading answers while others still run."""
    events: list[tuple[str, str]] = []

    def watch(module, name: str) -> None:
        original = getattr(module, name)

        def watched(*arguments):
            events.append((name, threading.current_thread().name.partition("_")[0]))
            return original(*arguments)

        monkeypatch.setattr(module, name, watched)

    watch(loader, "prepare_batch")
    for name in ("decode_completions", "completion_rewards"):
        watch(batch, name)
    watch(Behaviour, "__call__")
    first_read, sampled_on = threading.Event(), []

    class SlowEngine(TransformersEngine):
        """Goes on only once the first prompt's completions have been read and the next batch is under way."""

        def sample(self, prompts, sampling, on_sampled):
            def forward(number, sampled):
                on_sampled(number, sampled)
                sampled_on.append(number)
                if number == sampled_on[0]:
                    assert first_read.wait(20), "nothing is read while others still run"

            super().sample(prompts, sampling, forward)

    def read(completions, asked, original=batch.completion_rewards):
        first_read.set()
        return original(completions, asked)

    monkeypatch.setattr(batch, "completion_rewards", read)
    with loader_of(model, questions, config, engine=SlowEngine(model, 4)) as rollouts:
        loaded = rollouts.next_batch(0, PhaseTimer(CPU))
        loaded.rollout.late["behaviour"].of(range(4))
    assert {thread for _, thread in events} == {"background"}
    assert [name for name, _ in events].count("prepare_batch") == 2, "this step's batch and the next one's"
    assert [name for name, _ in events].count("decode_completions") == len(sampled_on) == 4
    assert [name for name, _ in events].count("__call__") == 1


def test_threads_beside_the_trainer_take_one_core_each():
    """Teams of OpenMP threads that spin while they wait made a step on two cores take 2.4 s instead of 1.4."""
    cores = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with background_threads(2) as threads:
            both = threading.Barrier(2)

            def count() -> int:
                both.wait(20)
                torch.ones(2**20).exp()
                return torch.get_num_threads()

            assert [future.result() for future in [threads.submit(count) for _ in range(2)]] == [1, 1]
            assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as others:
            assert others.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(cores)


def test_features_are_ready_before_their_step(model, questions, config, monkeypatch):
    """The second step decodes nothing: only the tower runs."""
    model.set_audio_cache(0, None, 0)
    with loader_of(model, questions, config) as rollouts:
        rollouts.next_batch(0, PhaseTimer(CPU))
        rollouts._prepared[1].result()
        loaded = []
        monkeypatch.setattr(type(model.prompts), "load_clips", lambda *_: loaded.append(1))
        monkeypatch.setattr(rollouts, "_config", dataclasses.replace(config, num_steps=2))
        assert rollouts.next_batch(1, PhaseTimer(CPU)).rollout is not None
    assert not loaded


def test_each_distinct_completion_is_embedded_once():
    embedded = []
    similarity = HashedNgrams()
    transform = similarity._vectorizer.transform
    similarity._vectorizer.transform = lambda texts: embedded.append(list(texts)) or transform(texts)
    texts = ["one", "two", "one", "one", "two", "three"]
    completions = [Completion(0, Modality.SPEECH, (1,), (0.0,), text, truncated=False) for text in texts]
    inputs = reward_inputs(completions, [Question("a", "?")], [4, 4, 4, None, None, 3])
    rewards = reward_values(Reward("behaviour", Behaviour(similarity)), inputs)
    assert [sorted(batch) for batch in embedded] == [["one", "three", "two"]]
    assert rewards[1] == pytest.approx(1.0)


def test_a_rollout_ahead_comes_from_the_weights_before_the_update(model, make_model, questions, ahead):
    """The second batch is sampled from the first one's weights, whatever training does to them afterwards."""
    original = make_model()
    with loader_of(model, questions, ahead) as rollouts:
        first = rollouts.next_batch(0, PhaseTimer(CPU)).rollout
        rollouts.finish_sampling()
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        second = rollouts.next_batch(1, PhaseTimer(CPU)).rollout
    assert (first.staleness, second.staleness) == (0, 1)
    numbers = batch_of_step(len(questions), ahead.questions_per_step, 1, ahead.seed)
    expected = rollout_of(original, [questions[number] for number in numbers], ahead, step=1)
    assert second.completions == expected.completions
    assert rollout_of(model, [questions[number] for number in numbers], ahead, step=1).completions != expected.completions


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sampling_ahead_disturbs_neither_sampling_nor_training(make_model, questions, ahead, lora_rank):
    """At the same time on the same weights: the same completions, rewards and gradients as one after the other."""
    plain, shared = (make_model(lora_rank=lora_rank, gradient_checkpointing=True) for _ in range(2))
    shared.module.load_state_dict(plain.module.state_dict())
    expected = rollout_of(plain, questions[:2], ahead)
    scored, metrics = update(plain, expected, ahead)
    with loader_of(shared, questions, ahead) as rollouts:
        rollouts.next_batch(0, PhaseTimer(CPU))
        for _ in range(5):
            got, got_metrics = update(shared, expected, ahead)
            assert torch.equal(got.rewards_N, scored.rewards_N)
            assert got_metrics == metrics
        second = rollouts.next_batch(1, PhaseTimer(CPU)).rollout
    assert torch.equal(gradients(shared), gradients(plain))
    numbers = batch_of_step(len(questions), ahead.questions_per_step, 1, ahead.seed)
    alone_now = rollout_of(plain, [questions[number] for number in numbers], ahead, step=1)
    assert second.completions == alone_now.completions


def test_a_twin_shares_every_weight_and_no_hook(lora_model):
    twin = lora_model.copy_sharing_weights()
    own = dict(lora_model.module.named_parameters()) | dict(lora_model.module.named_buffers())
    theirs = dict(twin.module.named_parameters()) | dict(twin.module.named_buffers())
    assert own.keys() == theirs.keys()
    assert all(theirs[name] is weight for name, weight in own.items())
    lora_model.language_model.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the other"))
    lora_model.language_model.layers[0].training = True
    assert not twin.language_model.layers[0].training
    twin.language_model(inputs_embeds=torch.zeros(1, 3, 128))


def test_the_optimiser_waits_for_sampling_to_end(model, questions, ahead, monkeypatch):
    order = []

    class SlowEngine(TransformersEngine):
        def sample(self, *arguments):
            super().sample(*arguments)
            order.append("sampled")

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (order.append("stepped"), step(self))[1])
    engine = SlowEngine(model, 8, own_modules=True)
    learner = Learner(model, torch.optim.AdamW(model.trainable_parameters(), lr=0.0), ahead)
    with loader_of(model, questions, ahead, engine=engine) as rollouts:
        for number in range(3):
            loaded = rollouts.next_batch(number, PhaseTimer(CPU))
            train_command.update_policy(learner, learner.begin_rollout(loaded.rollout), rollouts.finish_sampling)
    # Step n moves the weights only once rollout n + 1 is there.
    assert order == ["sampled", "sampled", "stepped", "sampled", "stepped", "sampled", "stepped"]


def test_stale_completions_are_weighted_by_importance(model, questions, ahead):
    """Against `min(p_now / p_sampled, cap)` from each completion alone; a difference of policies then stops nothing."""
    ahead = dataclasses.replace(ahead, max_grad_norm=1e9, importance_cap=1.1)
    rollout = dataclasses.replace(rollout_of(model, questions[:2], ahead), staleness=1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    scored, metrics = update(model, rollout, ahead)
    assert metrics["logprob_diff_mean"] > 0.01
    assert metrics["importance_ratio"] != pytest.approx(1.0, abs=1e-3)
    got = gradients(model).clone()
    expected, capped = torch.zeros(()), 0
    for prompt, completion, advantage in zip(rollout.prompts, rollout.completions, scored.advantages_N, strict=True):
        if not completion.truncated:
            logprobs = alone(model, prompt, completion)[0]
            ratio = (logprobs.detach() - torch.tensor(completion.rollout_logprobs)).exp()
            capped += (ratio > 1.1).sum().item()
            expected = expected - advantage * (ratio.clamp(max=1.1) * logprobs).sum() / rollout.num_tokens
    assert capped > 0
    model.module.zero_grad()
    expected.backward()
    torch.testing.assert_close(got, gradients(model), atol=1e-5, rtol=1e-3)
    with pytest.raises(TrainingError, match="differ by"):
        update(model, dataclasses.replace(rollout, staleness=0), ahead)


def test_what_goes_wrong_beside_the_step_stops_the_run(model, questions, ahead):
    class Broken(TransformersEngine):
        calls = 0

        def sample(self, *arguments):
            self.calls += 1
            if self.calls == 2:
                raise TrainingError("the sampler broke")
            super().sample(*arguments)

    with ExitStack() as stack:
        rollouts = stack.enter_context(loader_of(model, questions, ahead, engine=Broken(model, 8, own_modules=True)))
        rollouts.next_batch(0, PhaseTimer(CPU))
        rollouts.finish_sampling()
        with pytest.raises(TrainingError, match="the sampler broke"):
            rollouts.next_batch(1, PhaseTimer(CPU))


def metrics_of(run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def settings(tmp_path, ahead) -> TrainConfig:
    data = str(first_items(TRAINING_DATA, 16, tmp_path / "training"))
    common = {
        "objective": "tars",
        "questions_per_step": 4,
        "eval_items": 8,
        "eval_samples": 0,
        "device": "cpu",
        "learning_rate": 1e-3,
    }
    return TrainConfig(output_dir=tmp_path / "run", data=data, eval_data="pocket", num_steps=4, rollout_ahead=1, **common)


@pytest.mark.slow
def test_a_run_ahead_from_end_to_end(settings, tmp_path):
    """The first batch is fresh, all others one update old; the same seed gives the same run; it can be continued."""
    assert command(settings) == 0
    metrics = metrics_of(tmp_path / "run")
    assert [step["staleness"] for step in metrics] == [0, 1, 1, 1]
    assert metrics[0]["logprob_diff_max"] < 1e-4 < metrics[1]["logprob_diff_max"]
    assert metrics[1]["beside/rollout"] > 0
    assert "beside/rollout" not in metrics[0]
    assert command(dataclasses.replace(settings, output_dir=tmp_path / "again")) == 0

    def without_clock(run):
        return [{k: v for k, v in step.items() if not k.startswith(("seconds/", "beside/"))} for step in metrics_of(run)]

    assert without_clock(tmp_path / "again") == without_clock(tmp_path / "run")
    longer = dataclasses.replace(settings, output_dir=tmp_path / "stopped", save_every=2)
    assert command(longer) == 0
    (tmp_path / "stopped" / "checkpoint-4").rename(tmp_path / "gone")
    assert command(dataclasses.replace(longer, resume=True)) == 0
    resumed = metrics_of(tmp_path / "stopped")
    assert [step["staleness"] for step in resumed] == [0, 1, 0, 1], "what was sampled ahead is not in a checkpoint"


def test_every_phase_is_timed_and_profiled(settings, tmp_path):
    settings = dataclasses.replace(settings, rollout_ahead=0, profile=True, num_steps=5)
    assert command(settings) == 0
    phases = {"encode", "hand-over", "rollout", "reward", "forward", "backward", "optimiser"}
    for step in metrics_of(tmp_path / "run"):
        seconds = {name.removeprefix("seconds/"): value for name, value in step.items() if name.startswith("seconds/")}
        assert seconds.keys() == phases | {"step"}
        assert sum(seconds[phase] for phase in phases) <= seconds["step"]
        assert sum(seconds[phase] for phase in phases) > 0.8 * seconds["step"], "nothing of weight is outside the phases"
    assert phases <= SETTINGS_BY_PHASE.keys()
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    counted = {phase: sum(event.get("name") == phase for event in events) for phase in phases}
    assert counted["backward"] == counted["optimiser"] == 3, "steps 3 to 5"
    assert all(counted.values())
    assert len({event["tid"] for event in events if event.get("cat") == "cpu_op"}) > 1, "threads are seen as well"


def test_sampling_ahead_where_memory_does_not_allow(settings, monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda _device: 100 * 10**6)
    with pytest.raises(
        UserError,
        match=r"--rollout-ahead 1: sampling and training at the same time do not fit into 100\.00 MB; --dtype bfloat16",
    ):
        command(settings)


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("vllm", {"objective": "opd"}, "--objective opd: .* use --rollout-ahead 0$"),
        ("vllm", {"objective": "opd", "teacher": "ema"}, "--objective opd: .* use --rollout-ahead 0$"),
        ("transformers", {"objective": "opd", "lora_rank": 4}, "--objective opd: .* use --engine vllm or --rollout-ahead 0"),
        ("vllm", {"objective": "opd", "lora_rank": 4}, None),
        ("vllm", {"objective": "opd", "teacher": "moving"}, "--objective opd: .* use --rollout-ahead 0$"),
        ("vllm", {"objective": "opd", "teacher": "moving", "text_anchor": "none"}, None),
    ],
)
def test_sampling_ahead_of_weights_that_a_teacher_takes_the_place_of(settings, monkeypatch, engine, changes, message):
    monkeypatch.setattr(run, "choose_engine", lambda *_: engine)
    # What comes next.
    monkeypatch.setattr(run, "keep_usable", lambda *_: (_ for _ in ()).throw(UserError("accepted")))
    with pytest.raises(UserError, match=message or "^accepted$"):
        command(dataclasses.replace(settings, **changes))


def test_a_run_with_several_updates_a_rollout(settings, tmp_path, monkeypatch):
    """As many optimiser steps a rollout as asked for, and as many of staleness ahead."""
    stepped = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (stepped.append(1), step(self))[1])
    assert command(dataclasses.replace(settings, updates_per_rollout=2, num_steps=3)) == 0
    assert len(stepped) == 6
    assert [one["staleness"] for one in metrics_of(tmp_path / "run")] == [0, 2, 2]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_memory_is_taken_before_and_given_back_after_sampling(model, questions, config, ahead, is_ahead):
    order = []

    class Watched(TransformersEngine):
        def wake_up(self):
            order.append("awake")
            super().wake_up()

        def sample(self, *arguments):
            super().sample(*arguments)
            order.append("sampled")

        def release_memory(self):
            order.append("released")

    chosen = ahead if is_ahead else config
    rollout_of(model, questions[:2], chosen, engine=Watched(model, 8))
    assert order == ["awake", "sampled"] if is_ahead else ["awake", "sampled", "released"]


def test_leaving_does_not_wait_for_a_whole_rollout(model, questions, ahead):
    """A second Ctrl-C, or an error of the trainer, ends sampling at its next token."""
    tokens, going = [], threading.Event()

    class Endless(TransformersEngine):
        """Every token of the second rollout takes its time."""

        def check_stopped(self):
            if len(started) > 1:
                tokens.append(1)
                going.set()
                time.sleep(0.5)
            super().check_stopped()

        def sample(self, *arguments):
            started.append(1)
            super().sample(*arguments)

    started: list[int] = []
    with loader_of(model, questions, ahead, engine=Endless(model, 8, own_modules=True)) as rollouts:
        rollouts.next_batch(0, PhaseTimer(CPU))
        assert going.wait(120)
    assert len(tokens) <= 3


@pytest.mark.slow
def test_a_resumed_run_keeps_its_micro_batches(settings, tmp_path, monkeypatch):
    """Free memory is another one at every start; what a run computes is not."""
    settings = dataclasses.replace(settings, rollout_ahead=0, save_every=2)
    monkeypatch.setattr(run, "available_bytes", lambda _device: 160 * 10**6)
    assert command(settings) == 0
    chosen = json.loads((tmp_path / "run" / "config.json").read_text())["tokens_per_micro_batch"]
    assert 1024 <= chosen < 4096
    unbroken = metrics_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "gone")
    monkeypatch.setattr(run, "available_bytes", lambda _device: 10**12)
    assert command(dataclasses.replace(settings, resume=True)) == 0
    resumed = metrics_of(tmp_path / "run")
    assert [one["loss"] for one in resumed] == [one["loss"] for one in unbroken]
