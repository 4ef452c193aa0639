"""Every setting of a training run, flat; the command line is generated from it. What differs between models is a preset.

Loads neither torch nor transformers, so that `--help` is there at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import tyro

from tars_fast.models.architecture import Architecture, check_layers
from tars_fast.models.memory import Workload, assumed_longest_prompt
from tars_fast.models.publish import check_repository
from tars_fast.support.cli import as_paths, check_choices, check_conditions, check_file_names, check_numbers
from tars_fast.support.text import GB
from tars_fast.types import LongAudio, UserError

if TYPE_CHECKING:
    # It brings torch, which nobody who asks for --help should wait for.
    from tars_fast.models.preset import Preset

BestMetric = Literal[
    "speech_accuracy",
    "text_accuracy",
    "speech_accuracy_sampled",
    "text_accuracy_sampled",
    "mrr_same_model",
    "behaviour_similarity",
    "speech_exact",
    "text_exact",
    "speech_numeric",
    "text_numeric",
    "speech_judge",
    "text_judge",
]
"""Figures of an evaluation by which a checkpoint can be the best; larger is better."""
_EMBEDDER_BYTES = int(1.2e9)
"""Qwen3-Embedding-0.6B in bfloat16, planned with for any text embedder that is a model."""


@dataclass(frozen=True)
class Objective:
    """What the loss of a step consists of; `parse_objective` reads it from `--objective`."""

    uses_rewards: bool = False
    """A policy gradient on R_base (accuracy and format)."""
    uses_alignment: bool = False
    """R_rep and R_beh are part of that reward."""
    uses_agreement: bool = False
    """A policy gradient on agreement with the written answers, which needs no labels."""
    distils: bool = False
    """Distillation from the written to the spoken prompt, token by token."""
    weighs_tokens: bool = False
    """With CORD's weights of tokens."""

    @property
    def has_policy_gradient(self) -> bool:
        return self.uses_rewards or self.uses_agreement


OBJECTIVES = {
    "tars": Objective(uses_rewards=True, uses_alignment=True),
    "grpo": Objective(uses_rewards=True),
    "opd": Objective(distils=True),
    "cord": Objective(uses_agreement=True, distils=True, weighs_tokens=True),
}
"""The parts that `--objective` adds up, by name."""


def parse_objective(text: str) -> Objective:
    """The objective that `tars+opd` and the like name.

    Raises:
        UserError: an unknown part, one that is there twice, or two of which one contains the other.
    """
    names = text.split("+")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--objective {text}: {name!r} is none of {', '.join(OBJECTIVES)}; join them by +, as in tars+opd")
    for name, other in (*((name, name) for name in names), ("tars", "grpo"), ("cord", "opd")):
        if names.count(name) > 1 or (name != other and name in names and other in names):
            raise UserError(f"--objective {text}: {other} is in it already; leave one of them out")
    parts = [dataclasses.asdict(OBJECTIVES[name]) for name in names]
    return Objective(**{field: any(part[field] for part in parts) for field in parts[0]})


BUILT_IN_REWARDS = ("judge", "exact", "numeric", "overlong", "pattern")
"""What `--reward` may name beside functions."""


@dataclass(frozen=True)
class RewardName:
    """A value of `--reward`."""

    source: str
    """`module:function`, `FILE.py:function`, or one of `BUILT_IN_REWARDS`."""
    weight: float

    @property
    def name(self) -> str:
        """What messages and metrics call it: the function's name."""
        return self.source.rpartition(":")[2]


JUDGE_SETTINGS = ("judge_model", "judge_template", "judge_scale")
"""What `--judge-url` may have beside it."""


def check_judge_url(url: str | None) -> None:
    """Raises UserError where it is no address of a server; None passes."""
    if url is None:
        return
    try:
        parts = urlsplit(url)
        # The port is read only when it is asked for.
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"--judge-url {url}: is no address; give one like http://localhost:8000/v1")


def parse_reward(text: str) -> RewardName:
    """The reward that `module:function=0.5` and the like name.

    Raises:
        UserError: it names neither a function nor a built-in reward, or has a weight that is no finite number.
    """
    source, _, weight = text.rpartition("=")
    if not source or ":" in weight:
        source, weight = text, "1"
    module, _, function = source.rpartition(":")
    if source not in BUILT_IN_REWARDS and not (module and function.isidentifier()):
        raise UserError(
            f"--reward {text}: names no reward; give module:function, FILE.py:function or one of "
            f"{', '.join(BUILT_IN_REWARDS)}, with =WEIGHT behind it where that is not 1"
        )
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--reward {text}: {weight!r} is no weight; give a finite number, 0 to log the reward only")
    return RewardName(source, number)


@dataclass(frozen=True)
class TrainConfig:
    """Close the gap between what a speech LLM can reason about in writing and in speech (TARS, arXiv 2601.05543)."""

    model: str = "pocket"
    """A preset (pocket, pocket-hard, qwen2-audio-7b, qwen2.5-omni-7b, qwen2.5-omni-3b, qwen3-omni-30b, qwen3-omni-30b-thinking,
    phi-4-multimodal, voxtral-mini-3b, voxtral-small-24b, audio-flamingo-3), or a folder or a name on the hub (owner/name,
    owner/name@revision) with a checkpoint of one of these architectures."""
    data: str | None = None
    """Training items: a jsonl file or folder with recordings, parquet, a saved dataset, or one on the hub
    (owner/name[:configuration][@split]). pocket, pocket-hard: bundled spoken arithmetic. None: that of the model's own task."""
    eval_data: str | None = None
    """Evaluation items, from the same kinds of places; bundled data give their held-out items, pocket@validation others. None:
    the held-out items of bundled --data, or with --data of one's own a tenth of its items, chosen by id hash."""
    disjoint_from: tuple[str, ...] = ()
    """Data that must not be trained on, from the same kinds of places or mmsu, obqa: items of --data with the id of one of
    theirs, or that ask what one of them asks, are left out, and their number is said."""
    skip_unusable: bool = False
    """Leave out items that the model cannot take, with their number and the first reason, instead of stopping."""
    long_audio: LongAudio = "refuse"
    """Recordings longer than the model encodes at once: refuse says how many and stops; chunk puts several clips into one
    prompt; truncate keeps the beginning."""
    system_prompt: str | None = None
    """What prompts begin with; {answer_format} in it stands for what the format says of itself. None: the checkpoint's own."""
    prompt_template: Path | None = None
    """A jinja2 file of the user's turn, from question (the text, and in a spoken prompt the recording), options, modality,
    category, id and answer_format. None: the checkpoint's own, by default the question alone."""
    answer_format: str | None = None
    """How completions write their answer: think, in tags behind the reasoning; plain, without; or a file that says how it is
    asked for and read. None: the checkpoint's own."""
    output_dir: Path | None = None
    """Where metrics, checkpoints, predictions, evaluation.json and report.html go. None: a new folder
    runs/<model>-<date>-<time>."""
    num_steps: int | None = None
    """Rollout batches to train on. None: the preset's (pocket 160, pocket-hard 120, others 1000)."""
    questions_per_step: int | None = None
    """Questions in a rollout batch. None: the preset's (pocket and pocket-hard 32, others 8)."""
    select: Literal["all", "gap", "disagreement", "kl"] = "all"
    """Which questions a step takes. all: shuffled epochs. The others draw more often, by what earlier rollouts showed, those
    whose accuracy from speech and text differs (gap), whose spoken completions are neither all right nor all wrong
    (disagreement), or whose distillation has the largest divergence (kl)."""
    select_floor: float = 0.25
    """Share of a step's questions that come from the shuffled epochs all the same, with --select other than all."""
    max_redraws: int = 0
    """Rounds in which questions whose completions are all right or all wrong, spoken and written, are replaced by others
    before training (DAPO's dynamic sampling); what is left after the last one stays. Other rewards are not looked at. 0: none
    are replaced."""
    group_size: int = 8
    """Completions of a question, half from the spoken and half from the written prompt; opd alone samples the spoken half, of
    which one is enough (--group-size 2)."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW. None: the preset's (pocket 8e-4, pocket-hard 4e-4, others 2e-5)."""
    warmup_fraction: float = 0.01
    """Part of the steps over which the learning rate rises linearly; afterwards it falls linearly to 0."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this 2-norm."""
    temperature: float = 1.0
    """Sampling temperature of rollouts; log-probabilities are taken at the same temperature."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens; longer ones are cut off and left out of the loss. None: the preset's (40 / 1024)."""
    objective: str = "opd"
    """What the loss consists of, joined by +: opd, for spoken completions distillation from the model that is given the written
    prompt, which needs no answers; tars, the paper's policy gradient; grpo, the same without R_rep and R_beh; cord, opd with
    CORD's weights of tokens beside a policy gradient on agreement with written answers. docs/method.md has their formulas."""
    teacher: Literal["frozen", "moving", "ema"] = "frozen"
    """Whose distributions opd and cord take as targets: frozen, the model before training (with LoRA the adapter switched off,
    else a second copy of what is trained); moving, the weights in training, which hold each other by nothing and can collapse;
    ema, their average."""
    teacher_decay: float = 0.99
    """What the average of --teacher ema keeps of itself at each step."""
    distil_weight: float = 1.0
    """Weight of distillation in the loss."""
    distil_schedule: Literal["constant", "linear"] = "constant"
    """linear: that weight falls to 0 over the run."""
    distil_as: Literal["loss", "advantage", "sequence"] = "loss"
    """loss: the divergence of each token's whole distributions. advantage: a policy gradient with log q - log p of each sampled
    token, which needs log-probabilities alone (X-OPD); sequence: with their mean over a completion, centred in its group."""
    distil_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """With --distil-as loss: KL(spoken || written), KL(written || spoken), or their Jensen-Shannon divergence."""
    distil_beta: float = 0.5
    """Of jsd: the part of the teacher in the mixture."""
    distil_truncated: bool = False
    """Distil on completions that were cut off too."""
    text_anchor: Literal["auto", "none", "kl", "rollouts"] = "auto"
    """What holds written answers where opd distils: kl, the KL to the model before training of the same completions behind the
    written prompt; rollouts, written completions with a policy gradient on R_base, as in grpo; none. auto: kl, but none where
    tars or grpo stand beside them, which train on written completions."""
    text_anchor_weight: float = 1.0
    """Weight of --text-anchor kl in the loss."""
    watch_every: int = 5
    """Where the objective distils, steps between two looks at how far written answers have moved: the KL from the model before
    training on completions that it wrote, in nats a token. 0: never."""
    max_written_kl: float = 0.2
    """Training stops where that KL is larger."""
    accuracy_weight: float = 1.0
    """Weight of R_acc, whether the answer is right."""
    format_weight: float = 0.5
    """Weight of R_fmt, whether the completion is written as asked."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A reward of one's own beside these, module:function or ./FILE.py:function, with its weight behind it where that is not 1,
    as in ./mine.py:brief=0.5; 0 logs it only. Or a built-in one: judge, exact, numeric, overlong, pattern. May be given several
    times."""
    reward_concurrency: int = 16
    """Calls of async rewards, and requests to the judge of an evaluation, that are under way at the same time."""
    reward_timeout: float = 60.0
    """Seconds that a call of an async reward, or a request to the judge, may take."""
    judge_url: str | None = None
    """Where a model grades answers to open questions in each evaluation, and with --reward judge in training, any
    OpenAI-compatible address, as http://localhost:8000/v1."""
    judge_model: str | None = None
    """That model's name there. None: the first that is listed, which the run keeps."""
    judge_template: Path | None = None
    """A jinja2 file of what it is told, from question, answer and scale. None: a plain request for a mark."""
    judge_scale: float = 10.0
    """The best mark it may give, 0 being the worst; the reward is from 0 to 1."""
    numeric_tolerance: float = 1e-6
    """Of --reward numeric: how far a number may be from the right one, as a part of it (0.01: a hundredth)."""
    overlong_tokens: int | None = None
    """Of --reward overlong: the last tokens before --max-new-tokens, over which the reward falls from 0 to -1 (DAPO). None: a
    fifth of it."""
    reward_pattern: str | None = None
    """Of --reward pattern: a regular expression that earns 1 where it is found."""
    representation_weight: float = 1.0
    """Weight of R_rep, agreement of hidden states (the paper's alpha). 0 together with the next is plain GRPO."""
    representation_layers: str = "all"
    """Layers that R_rep is averaged over: all; one or a range of them, counted from 1 (11-20); or the paper's parts (Fig. 3):
    last are the last two, shallow, middle and deep the thirds of those before."""
    representation_centre: bool = False
    """R_rep compares states less the running mean of their modality. Not in the paper."""
    behaviour_weight: float = 1.0
    """Weight of R_beh, agreement of answers (the paper's beta)."""
    behaviour_model: str = "auto"
    """Text embedder of R_beh: hashed-ngrams, or a sentence-transformers model. auto: hashed-ngrams for pocket and
    pocket-hard, else Qwen/Qwen3-Embedding-0.6B."""
    reward_scaling: Literal["none", "z-score", "rank"] = "none"
    """What becomes of each term of the reward within its group before they are added up: z-score, over its deviation; rank, its
    rank from 0 to 1. Then a term counts by its weight, however little it spreads. none: the paper's."""
    advantage: Literal["centred", "standardised", "leave-one-out", "rank"] = "centred"
    """What an advantage is: centred, the reward less its group's mean (the paper's, Dr. GRPO); standardised, that over the
    group's deviation (GRPO); leave-one-out, less the mean of the others (RLOO); rank, the rank within the group, from -1/2 to
    1/2."""
    centre_within: Literal["question-and-modality", "question"] = "question-and-modality"
    """Which completions are such a group: those of a question from the same kind of prompt (the paper's), or all of a question,
    spoken and written together."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "luspo", "gspo", "cispo", "sapo", "vespo", "gmpo"] = "dapo"
    """Policy loss and what it is divided by, by its name in the literature; dapo is the paper's. docs/policy-losses.md has all
    of them. dr_grpo divides by completions x --max-new-tokens."""
    clip_low: float = 0.2
    """How far a token's probability ratio may fall below 1 before its gradient is held back; with gspo and luspo the
    sequence's ratio."""
    clip_high: float = 0.28
    """How far it may rise above 1; with cispo the largest ratio itself, for example 5."""
    importance_cap: float = 2.0
    """Largest weight that corrects for the rollout engine's probabilities differing from the trainer's."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: a weight above --importance-cap becomes the cap. mask: it becomes 0, the token has no gradient."""
    importance_level: Literal["token", "sequence"] = "token"
    """sequence: a completion has one weight, the product of its tokens' ones."""
    kl_coef: float = 0.0
    """Weight of KL to the model before training, which is this one with its adapter off: no second model. Needs LoRA. Each
    completion that was not cut off then has a gradient, at the cost of one more forward pass a rollout."""
    entropy_coef: float = 0.0
    """The loss falls by this times the mean entropy of a token, whose gradient then keeps the policy from narrowing."""
    updates_per_rollout: int = 1
    """Optimiser steps on each rollout batch; the clip matters from 2 on."""
    lora_rank: int | None = None
    """Rank of the LoRA adapters, 0 for full fine-tuning. None: the preset's (pocket and pocket-hard 0, others 8)."""
    lora_alpha: float = 32.0
    """LoRA updates are scaled by this over the rank."""
    lora_targets: str | None = None
    """Linear layers of the decoder that get LoRA: attention, all-linear, or names of them with commas between (q_proj,v_proj).
    None: all, of a mixture of experts attention's."""
    freeze_audio: bool = True
    """Keep audio tower and projector as they are; the paper trains the language model only."""
    tokens_per_micro_batch: int | None = None
    """Tokens in one forward and backward pass, each prompt counted once; questions stay whole, so one may be larger. Changes
    memory and speed, never the result. None: what free memory holds, at most 16,384 (on a CPU 4,096)."""
    gradient_checkpointing: bool | None = None
    """Compute each layer again for the backward pass instead of keeping its activations. None: the preset's (off / on)."""
    rollout_batch_size: int | None = None
    """Completions in flight; changing it changes the samples. None: the preset's (256 / 64)."""
    rollout_ahead: Literal[0, 1] = 0
    """1: the next batch is sampled while this one trains, from weights that are then --updates-per-rollout steps old;
    importance weights, held below --importance-cap, correct for it in a policy loss, a divergence has none. Needs memory for
    both at once; a resumed run begins with a fresh batch. 0: one after the other."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples rollouts, on the weights being trained. auto: on CUDA vLLM where it is installed, else transformers."""
    tensor_parallel: int = 1
    """Processes, all that torchrun starts, of which each has a part of every layer's weights, and all train one batch together:
    for models that one card cannot hold; rollouts are vLLM's. 1: every process has whole weights, and questions of its own."""
    kv_cache_gb: float | None = None
    """vLLM's KV cache in GB (1e9 bytes), there during rollouts only. None: what the completions in flight need, at most what
    is free; another size may draw other completions."""
    cuda_graphs: bool = True
    """On CUDA vLLM replays every decoding step as one captured graph; off: it launches each kernel by itself."""
    router_replay: bool = False
    """Of a mixture of experts: the trainer sends each token through the experts that vLLM chose when it sampled, where rounding
    would send some through others. Weights and gradients of the router stay the trainer's own."""
    collective_timeout: float = 600.0
    """Of several processes: seconds that one waits for another. Then all that wait end with status 1 and say which one has not
    come, and in which phase it is."""
    max_logprob_diff: float | None = None
    """Mean |trainer - rollout| log-probability, in nats a token, beyond which training stops; not checked for batches that
    --rollout-ahead sampled with older weights. None: 0.01, in bfloat16 0.1."""
    audio_cache_gb: float = 1.0
    """Audio embeddings kept in host memory for later epochs, in GB (1e9 bytes)."""
    audio_cache_dir: Path | None = None
    """Folder where audio embeddings outlive the run, by content of recording and tower. None: memory only."""
    audio_cache_dir_gb: float = 100.0
    """Bound of that folder, in GB; the embeddings longest unused go first."""
    eval_items: int | None = None
    """Evaluate on at most so many of the evaluation items, chosen by id hash. None: all."""
    eval_samples: int = 2
    """Completions an item, at --temperature, behind the sampled accuracies of the evaluation; 0 leaves them out."""
    eval_every: int = 0
    """Steps between evaluations on the validation items, of which there is one before the first step and one at the end too:
    curves with intervals in metrics.jsonl and report.html. 0: none. The held-out items are never among them."""
    validation_data: str | None = None
    """Items of these evaluations, from the same kinds of places; at most --eval-items of them. None: of bundled data their
    validation part, else a tenth of --data, chosen by id hash, which is not trained on then."""
    keep_best: BestMetric | None = None
    """Also keep the checkpoint of the evaluation at which this figure of the validation items was largest."""
    early_stop: int = 0
    """Stop after so many evaluations in a row in which the figure of --keep-best did not grow. 0: never."""
    sample_every: int = 0
    """Steps between looks at what the policy writes: a few completions of the step, spoken beside written, with their rewards,
    go to samples.jsonl and report.html. 0: never."""
    save_every: int = 25
    """Steps between checkpoints."""
    save_minutes: float = 0.0
    """Also write one after the step by which so many minutes have passed since the last. 0: by steps alone."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest ones; with --keep-best that of the best step besides."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, with completions and recordings of --sample-every: tensorboard, a folder of the
    run; wandb and trackio, which are packages of their own. One that fails is left out with a warning."""
    push_to_hub: str | None = None
    """Upload every checkpoint, with a model card, to this repository on the hub (OWNER/NAME), which is made, private, where
    there is none. Training waits meanwhile. None: nothing is uploaded."""
    seed: int = 0
    """Seeds everything that is drawn at random. Same seed, machine and settings: same metrics, bit for bit on a CPU."""
    resume: bool = False
    """Continue from the newest checkpoint in --output-dir."""
    resume_if_exists: bool = False
    """Continue from the newest whole checkpoint in --output-dir where there is one, begin where there is none: one command for
    torchrun's --max-restarts and for clusters that start a job again. The number of processes may change."""
    profile: bool = False
    """Write a Chrome trace of three steps, the third to the fifth of this start (or the last ones, where fewer are left), to
    trace.json.gz in --output-dir."""
    dry_run: bool = False
    """Print what memory each phase needs and stop; loads nothing."""
    kernels: Literal["auto", "reference"] = "auto"
    """reference: plain PyTorch in the place of fused kernels, on CUDA too. auto: kernels on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights. auto: bfloat16 for LoRA on CUDA, else float32. In bfloat16 full fine-tuning rounds stochastically."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "audio_cache_dir", "judge_template", "prompt_template")
        check_file_names(self, "model")
        check_repository(self.push_to_hub)
        check_choices(self)
        positive = ["kv_cache_gb", "max_logprob_diff", "audio_cache_dir_gb", "eval_items"]
        positive += ("num_steps", "questions_per_step", "learning_rate", "max_new_tokens", "temperature", "updates_per_rollout")
        positive += ("distil_weight", "text_anchor_weight", "max_written_kl", "keep_checkpoints")
        positive += ("max_grad_norm", "tokens_per_micro_batch", "rollout_batch_size", "save_every", "importance_cap")
        positive += ("reward_concurrency", "reward_timeout", "collective_timeout", "judge_scale", "overlong_tokens")
        positive += ("tensor_parallel",)
        check_numbers(self, positive=(*positive, "lora_alpha"))
        not_negative = ["representation_weight", "behaviour_weight", "weight_decay", "clip_high", "lora_rank", "eval_samples"]
        not_negative += ("accuracy_weight", "format_weight", "numeric_tolerance")
        not_negative += ("watch_every", "audio_cache_gb", "kl_coef", "entropy_coef", "max_redraws")
        not_negative += ("eval_every", "early_stop", "sample_every", "save_minutes")
        check_numbers(self, not_negative=(*not_negative, "seed"))
        for flag, is_given in (("--resume", self.resume), ("--resume-if-exists", self.resume_if_exists)):
            if is_given and self.output_dir is None:
                raise UserError(f"{flag}: needs the --output-dir of the run to continue")
        if self.resume and self.resume_if_exists:
            raise UserError("--resume: --resume-if-exists continues too, or begins; leave one of them out")
        if self.group_size < (4 if self.compares_completions else 2) or self.group_size % 2:
            raise UserError(
                f"--group-size {self.group_size}: must be even and at least 4, two completions of each modality; 2 is for "
                "objectives that compare none, as opd"
            )
        check_layers(self.representation_layers)
        if not 0 < self.select_floor <= 1:
            raise UserError(
                f"--select-floor {self.select_floor}: must be above 0, so that each item comes again, and at most 1"
            )
        if not 0 <= self.clip_low < 1:
            raise UserError(f"--clip-low {self.clip_low}: must be at least 0 and below 1; the ratio is held above 1 - clip_low")
        if self.loss_type == "cispo" and self.clip_high < 1:
            raise UserError(
                f"--clip-high {self.clip_high}: with --loss-type cispo it is the largest ratio itself; give 1 or more, e.g. 5"
            )
        if self.loss_type in ("vespo", "gmpo") and self.importance_level == "sequence":
            raise UserError(
                f"--importance-level sequence: --loss-type {self.loss_type} takes the weights of tokens into its sequence's; "
                "leave it out"
            )
        self._check_objective()
        check_conditions(self, self._conditions())
        self._check_rewards()
        self._check_tensor_parallel()
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"--warmup-fraction {self.warmup_fraction}: must lie between 0 and 1")

    def _check_objective(self) -> None:
        objective = parse_objective(self.objective)
        for flag, value in (("--teacher-decay", self.teacher_decay), ("--distil-beta", self.distil_beta)):
            if not 0 < value < 1:
                raise UserError(f"{flag} {value}: must lie between 0 and 1, both excluded")
        if self.text_anchor in ("kl", "rollouts") and not objective.distils:
            raise UserError(
                f"--text-anchor {self.text_anchor}: --objective {self.objective} trains written completions itself; it is for "
                "opd and cord"
            )
        if self.text_anchor == "rollouts" and objective.has_policy_gradient:
            raise UserError(
                f"--text-anchor rollouts: --objective {self.objective} samples written completions already; leave it out"
            )
        if self.distil_as == "advantage" and self.loss_type in ("gspo", "luspo", "gmpo"):
            raise UserError(
                f"--loss-type {self.loss_type}: has one ratio for all tokens of a completion, and --distil-as advantage one "
                "advantage for each; take another loss, or --distil-as sequence"
            )
        if objective.weighs_tokens and self.distil_as != "loss":
            raise UserError(
                f"--distil-as {self.distil_as}: --objective {self.objective} weighs tokens by the divergence of whole "
                "distributions; take opd, or --distil-as loss"
            )

    def _check_tensor_parallel(self) -> None:
        beside = {
            # Sampling and training would call the other processes in an order of their own each.
            "--rollout-ahead 1": self.rollout_ahead,
            # Each process would ask for itself, and might hear something else.
            "--reward": bool(self.reward),
            "--judge-url": self.judge_url is not None,
            # A checkpoint holds the first process's part of it alone.
            "--teacher ema": self.keeps_average,
            "--engine transformers": self.engine == "transformers",
        }
        for flag, is_given in beside.items():
            if self.tensor_parallel > 1 and is_given:
                raise UserError(f"--tensor-parallel {self.tensor_parallel}: not beside {flag}; leave one of them out")

    def _check_rewards(self) -> None:
        own = self.own_rewards
        if own and not self.samples_text:
            raise UserError(f"--reward {self.reward[0]}: --objective {self.objective} trains on no reward; add tars or grpo")
        sources = [one.source for one in own]
        if "judge" in sources and self.judge_url is None:
            raise UserError("--reward judge: needs --judge-url, the address of the model that grades")
        check_judge_url(self.judge_url)
        if "pattern" in sources:
            if self.reward_pattern is None:
                raise UserError("--reward pattern: needs --reward-pattern, a regular expression")
            try:
                re.compile(self.reward_pattern)
            except re.error as error:
                raise UserError(f"--reward-pattern {self.reward_pattern}: is no regular expression ({error})") from error
        base = self.accuracy_weight or self.format_weight
        alignment = self.parts.uses_alignment and (self.representation_weight or self.behaviour_weight)
        if self.trains_on_base and not (base or alignment or any(one.weight for one in own) or self.parts.uses_agreement):
            raise UserError(
                f"--accuracy-weight {self.accuracy_weight}: no reward with a weight is left; give one of them a weight, or add "
                "--reward"
            )

    def _conditions(self) -> list[tuple[tuple[str, ...], bool, str]]:
        """(settings, whether they take effect, what they need)."""
        parts = self.parts
        sources = [one.source for one in self.own_rewards]
        distilling = ("teacher", "distil_weight", "distil_schedule", "distil_as", "watch_every", "max_written_kl")
        clipped = ("loss_type", "clip_low", "clip_high", "importance_cap", "importance_mode", "importance_level")
        policy = (*clipped, "kl_coef", "entropy_coef")
        return [
            (distilling, parts.distils, "opd or cord in --objective"),
            (("max_written_kl",), self.steps_between_looks > 0, "--watch-every 1 or more"),
            (("teacher_decay",), self.keeps_average, "--teacher ema"),
            (("distil_divergence", "distil_truncated"), self.has_divergence_loss, "--distil-as loss of opd or cord"),
            (("distil_beta",), self.has_divergence_loss and self.distil_divergence == "jsd", "--distil-divergence jsd"),
            (("text_anchor_weight",), self.anchors_by_kl, "--text-anchor kl"),
            (("representation_weight", "behaviour_weight"), parts.uses_alignment, "tars in --objective"),
            (("representation_layers", "representation_centre"), self.samples_text, "written completions, as of tars or grpo"),
            (("reward_scaling",), self.samples_text, "a reward, as of tars, grpo or cord"),
            (policy, self.has_policy_loss, "a policy loss, as of tars, grpo or --distil-as advantage"),
            (("accuracy_weight", "format_weight"), self.trains_on_base, "a reward for answers, as of tars or grpo"),
            (("advantage", "centre_within"), self.samples_text, "a reward, as of tars, grpo or cord"),
            (JUDGE_SETTINGS, self.judge_url is not None, "--judge-url"),
            (("numeric_tolerance",), "numeric" in sources, "--reward numeric"),
            (("overlong_tokens",), "overlong" in sources, "--reward overlong"),
            (("reward_pattern",), "pattern" in sources, "--reward pattern"),
            (("reward_concurrency", "reward_timeout"), bool(sources or self.judge_url), "--reward or --judge-url"),
            (("select_floor",), self.select != "all", "--select gap, disagreement or kl"),
            (("validation_data", "keep_best"), self.eval_every > 0, "--eval-every"),
            (("keep_best",), self.eval_samples > 0 or "sampled" not in str(self.keep_best), "--eval-samples 1 or more"),
            (("keep_best",), self.judge_url is not None or "judge" not in str(self.keep_best), "--judge-url"),
            (("early_stop",), self.keep_best is not None, "--keep-best"),
        ]

    @property
    def parts(self) -> Objective:
        """What `--objective` names."""
        return parse_objective(self.objective)

    @property
    def own_rewards(self) -> list[RewardName]:
        """What `--reward` names. Raises UserError."""
        return [parse_reward(text) for text in self.reward]

    @property
    def samples_text(self) -> bool:
        """Whether half of the completions are sampled from written prompts."""
        return self.parts.has_policy_gradient or self.text_anchor == "rollouts"

    @property
    def compares_completions(self) -> bool:
        """Whether a completion counts by how it differs from others of its question."""
        return self.samples_text or self.select == "disagreement" or self.max_redraws > 0

    @property
    def anchors_by_kl(self) -> bool:
        """Whether written distributions are held to those of the model before training."""
        # cord samples written completions to ask them, and trains on none.
        is_alone = self.parts.distils and not self.parts.uses_rewards
        return self.text_anchor == "kl" or (self.text_anchor == "auto" and is_alone)

    @property
    def has_divergence_loss(self) -> bool:
        """Whether a teacher's distributions are compared whole."""
        return self.parts.distils and self.distil_as == "loss"

    @property
    def has_policy_loss(self) -> bool:
        """Whether tokens have advantages, of rewards or of a teacher's feedback."""
        return self.samples_text or (self.parts.distils and self.distil_as != "loss")

    @property
    def trains_on_base(self) -> bool:
        """Whether R_base is trained on."""
        return self.parts.uses_rewards or self.text_anchor == "rollouts"

    @property
    def needs_answers(self) -> bool:
        """Whether items need an answer that a rule can grade, because no other reward is there for them."""
        return self.trains_on_base and not any(one.weight for one in self.own_rewards)

    @property
    def steps_between_looks(self) -> int:
        """See `watch_every`; 0: never."""
        return self.watch_every if self.parts.distils else 0

    @property
    def needs_start(self) -> bool:
        """Whether a step looks at the distributions of the model before training."""
        return self.parts.distils and (self.teacher == "frozen" or self.anchors_by_kl)

    @property
    def exchanges_weights(self) -> bool:
        """Whether the module computes with other weights than those in training for a part of a step."""
        return self.needs_start or self.keeps_average

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the weights is the teacher."""
        return self.parts.distils and self.teacher == "ema"

    def as_preset(self, preset: Preset) -> Preset:
        """`preset` with this run's settings in the place of its own, for the run and for the checkpoints that come of it.

        Raises:
            UserError: settings that contradict each other.
        """
        preset = preset.with_settings(self)
        if preset.lora_rank and not self.freeze_audio:
            raise UserError("--no-freeze-audio: a LoRA checkpoint holds adapters only; add --lora-rank 0")
        if self.lora_targets is not None and not preset.lora_rank:
            raise UserError(
                f"--lora-targets {self.lora_targets}: has no effect without LoRA; leave it out, or add --lora-rank 8"
            )
        if self.kl_coef and not preset.lora_rank:
            raise UserError(
                f"--kl-coef {self.kl_coef}: its reference is the model with the adapter off, and full fine-tuning has none; "
                "add --lora-rank 8"
            )
        if self.audio_cache_dir is not None and not self.freeze_audio:
            raise UserError(
                f"--audio-cache-dir {self.audio_cache_dir}: a tower in training encodes again each step; leave it out"
            )
        return preset

    def resolve(self, preset: Preset, *, output_dir: Path, tokens_per_micro_batch: int) -> RunConfig:
        """The settings of the run, in which every `None` that means "the preset's" is filled in.

        Raises:
            UserError: see `as_preset`.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        values |= self.as_preset(preset).settings_of(self)
        return RunConfig(**values | {"output_dir": output_dir, "tokens_per_micro_batch": tokens_per_micro_batch})

    def workload(
        self,
        preset: Preset,
        architecture: Architecture,
        engine: str,
        dtype_bytes: int,
        longest_prompt: int | None = None,
        *,
        on_gpu: bool = True,
    ) -> Workload:
        """What memory depends on.

        Args:
            preset: see `as_preset`.
            longest_prompt: tokens, from the data where that is at hand.

        Raises:
            UserError: prompt and completion are longer than the model takes, or it has no such layers for LoRA.
        """
        longest_prompt = longest_prompt or assumed_longest_prompt(architecture)
        if longest_prompt + preset.max_new_tokens > architecture.max_tokens:
            raise UserError(
                f"--max-new-tokens {preset.max_new_tokens}: with a prompt of {longest_prompt} tokens more than the model's "
                f"{architecture.max_tokens}; lower it"
            )
        return Workload(
            architecture=architecture,
            engine=engine,
            dtype_bytes=dtype_bytes,
            lora_rank=preset.lora_rank,
            lora_targets=architecture.find_lora_targets(self.lora_targets),
            group_size=self.group_size,
            max_new_tokens=preset.max_new_tokens,
            longest_prompt=longest_prompt,
            rollout_batch_size=preset.rollout_batch_size,
            given_micro_batch=self.tokens_per_micro_batch,
            rollout_ahead=bool(self.rollout_ahead),
            gradient_checkpointing=preset.gradient_checkpointing,
            reference_bytes=self._reference_bytes(preset, dtype_bytes),
            distils=self.parts.distils,
            trains_audio=not self.freeze_audio,
            embedder_bytes=0 if preset.behaviour_model == "hashed-ngrams" else _EMBEDDER_BYTES,
            on_gpu=on_gpu,
            given_kv_cache=None if self.kv_cache_gb is None else int(self.kv_cache_gb * GB),
            tensor_parallel=self.tensor_parallel,
        )

    def _reference_bytes(self, preset: Preset, dtype_bytes: int) -> int:
        """Of each trained weight; with LoRA, whose own are in float32, the model before training takes no copy."""
        # An average is in float32, and computes rounded to the weights' dtype.
        rounded = dtype_bytes if dtype_bytes < 4 and not preset.lora_rank else 0
        return dtype_bytes * (self.needs_start and not preset.lora_rank) + (4 + rounded) * self.keeps_average


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Settings of a run: those of `TrainConfig`, none of which the run needs is left open. `TrainConfig.resolve` makes them."""

    # Without `field()` they would inherit the default `None`.
    output_dir: Path = dataclasses.field()
    num_steps: int = dataclasses.field()
    questions_per_step: int = dataclasses.field()
    learning_rate: float = dataclasses.field()
    max_new_tokens: int = dataclasses.field()
    lora_rank: int = dataclasses.field()
    tokens_per_micro_batch: int = dataclasses.field()
    gradient_checkpointing: bool = dataclasses.field()
    rollout_batch_size: int = dataclasses.field()
