"""`patch_grpo_trainer` on TRL's own trainer: five steps whose losses, gradients and logged metrics are those without it."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import tars_kernels
import torch
from tars_kernels.integrations.trl import patch_grpo_trainer

if find_spec("trl") is None:
    pytestmark = pytest.mark.skip(reason="needs trl, which the extra bench brings")
    TrainerCallback = object
else:
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

WORDS = [f"w{number}" for number in range(40)]


def tiny_tokenizer() -> object:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def reward(completions, **_) -> list[float]:
    """Anything that differs between completions."""
    return [float(len(set(completion.split()))) for completion in completions]


class Gradients(TrainerCallback):
    """Every parameter's gradient before each optimiser step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.steps.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def train(folder: Path, settings: dict[str, object], *, patched: bool, lora: bool, num_steps: int):
    """(logged metrics of every step, gradients of every step)"""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=42, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=not lora, **sizes
    )
    # TRL loads its reference model from where the policy came from.
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    gradients = Gradients()
    trainer = trl.GRPOTrainer(
        Qwen2ForCausalLM.from_pretrained(folder / "model"),
        reward,
        args=trl.GRPOConfig(
            output_dir=str(folder), max_steps=num_steps, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
            max_completion_length=8, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
            learning_rate=1e-3, seed=0, **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"w{number} w{number + 1}" for number in range(20)]}),
        processing_class=tiny_tokenizer(),
        callbacks=[gradients],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if lora else None,
    )  # fmt: skip
    if patched:
        patch_grpo_trainer(trainer)
    trainer.train()
    timed = ("time", "runtime", "per_second", "flos", "mfu")
    logs = [
        {key: value for key, value in log.items() if not any(part in key for part in timed)}
        for log in trainer.state.log_history
    ]
    return logs, gradients.steps


SETTINGS = {
    "default": {},
    "KL, entropy bonus, temperature, two updates": {
        "beta": 0.1, "entropy_coef": 0.01, "temperature": 0.8, "num_iterations": 2, "gradient_accumulation_steps": 2,
    },
    "high-entropy tokens, sequence ratio": {
        "top_entropy_quantile": 0.5, "importance_sampling_level": "sequence", "loss_type": "grpo",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "lora", "kernels"),
    [
        *product(SETTINGS, (True, False), [False]),
        # Interpreted kernels take a minute each.
        ("default", True, True),
        ("KL, entropy bonus, temperature, two updates", False, True),
    ],
)
def test_five_steps_are_those_of_trl(tmp_path, settings, lora, kernels):
    with tars_kernels.use_reference(not kernels):
        ours, our_gradients = train(tmp_path / "ours", SETTINGS[settings], patched=True, lora=lora, num_steps=5)
    theirs, their_gradients = train(tmp_path / "theirs", SETTINGS[settings], patched=False, lora=lora, num_steps=5)
    assert len(our_gradients) == 5
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-3, atol=1e-6)
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-3, abs=1e-6)
