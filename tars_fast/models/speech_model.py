"""`SpeechModel`, a speech LLM of any family: prompts, audio embeddings, and the packed forward pass over completions.

The way of a training step: `encode_prompts` (or `prepare` and `encode`) makes prompts with their audio embeddings, `pack`
puts prompts and completions into one row without padding, `forward` runs it.

Shapes: N completions, R groups (a prompt with its completions), P prompt tokens, T completion tokens, S = P + T, A audio
tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tars_fast.models.adapters import add_adapter, has_adapter, load_adapter, merge_adapter
from tars_fast.models.audio_cache import AudioCache, ClipEmbeddings, fingerprint
from tars_fast.models.families.base import Features
from tars_fast.models.flash_attention import find_flash_attention
from tars_fast.models.hub import base_of, cannot_be_loaded, checkpoint_folder
from tars_fast.models.key_values import KeyValues
from tars_fast.models.modules import Decoder, PolicyModule
from tars_fast.models.packed_attention import PackedGroups, use_packed_attention
from tars_fast.models.preset import Preset
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.routing import ExpertRouting, has_experts, pack_routing
from tars_fast.models.tensor_parallel import TensorParallel
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import Completion, Modality, Prompt, Question, Recording, UserError

_AUDIO_CACHE_BYTES = 10**9
"""Audio embeddings kept between epochs: those of all bundled recordings, or of some 160 recordings of 30 s at 7B's width."""


@dataclass(frozen=True)
class LoadedAudio:
    """A recording on the host: the features that the tower needs, or the tower's embeddings from the cache."""

    recording: Recording
    key: str
    """See `AudioCache.key`."""
    num_tokens: list[int]
    """Audio tokens of each clip."""
    features: Sequence[Features] = ()
    """Of each clip; empty where `embeddings` are there."""
    embeddings: ClipEmbeddings | None = None


@dataclass(frozen=True)
class PreparedPrompt:
    """A tokenised prompt whose recordings have not gone through the audio tower yet."""

    modality: Modality
    token_ids: tuple[int, ...]
    audio: tuple[LoadedAudio, ...] = ()
    """Its recordings, in order; none for a written prompt."""


class SpeechModel:
    """A speech LLM with its processor, shared by trainer and rollout engine.

    Args:
        module: the model in eval mode, on its device; its attention is replaced by packed attention.
        prompts: of the same checkpoint.
        parallel: the processes that hold parts of the module's weights; None: this one has all of them.
    """

    def __init__(self, module: PolicyModule, prompts: PromptFormat, parallel: TensorParallel | None = None):
        self.module = module
        self.parallel = parallel
        self.prompts = prompts
        self.family = prompts.family
        use_packed_attention(self.language_model)
        self.routing = ExpertRouting(self.language_model) if any(map(has_experts, self.language_model.layers)) else None
        """None for models that are no mixture of experts."""
        self.audio_is_trained = False
        self.gradient_checkpointing = False
        self._audio_cache = AudioCache(_AUDIO_CACHE_BYTES)
        vocabulary_size = module.get_output_embeddings().weight.shape[0] if parallel is None else parallel.vocabulary_size
        self.suppressed_bias = torch.zeros(vocabulary_size, device=module.device)
        """[V] added to logits before sampling: -inf for the audio token, which no completion may hold, 0 for all others."""
        self.suppressed_bias[prompts.audio_token_id] = -torch.inf
        self.head_bias = self.suppressed_bias if parallel is None else parallel.part_of_bias(self.suppressed_bias)
        """The part of it that belongs to `head`, where the vocabulary is in parts."""

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def head(self) -> nn.Linear:
        """The language-model head: [*, D] states to [*, V] logits, or this process's part of them."""
        return self.module.get_output_embeddings()

    @property
    def head_group(self) -> ProcessGroup | None:
        """The processes that hold parts of the head's vocabulary; None: this one has all of it."""
        return None if self.parallel is None else self.parallel.group

    def together(self) -> AbstractContextManager[None]:
        """Around what processes that hold parts of the weights compute together, see `TensorParallel.together`."""
        return nullcontext() if self.parallel is None else self.parallel.together()

    @property
    def language_model(self) -> Decoder:
        """The decoder without the head."""
        return self.family.decoder_of(self.module)

    @property
    def audio_parts(self) -> list[nn.Module]:
        """Audio tower and projector."""
        return [self.module.get_submodule(part) for part in self.family.audio_parts]

    @property
    def attention(self) -> str:
        """The kind of attention in the trainer's forward pass, as messages name it."""
        attention: Any = self.language_model.layers[0].self_attn
        flash = find_flash_attention(self.device, self.module.dtype, attention.head_dim)
        return "masked attention" if flash is None else flash.name

    def set_audio_cache(self, max_bytes: int, folder: Path | None, max_folder_bytes: int) -> None:
        """Replace the cache of audio embeddings by an empty one.

        Args:
            max_bytes: of embeddings in host memory.
            folder: also keeps them on disk, for later runs; None: memory only.
            max_folder_bytes: of embeddings in `folder`.

        Raises:
            UserError: the folder cannot be made.
        """
        # Embeddings depend on the tower's weights and on how long recordings are cut.
        name = "" if folder is None else f"{fingerprint(*self.audio_parts)}-{self.prompts.long_audio}"
        self._audio_cache = AudioCache(max_bytes, folder, max_folder_bytes, name)

    def copy_sharing_weights(self) -> SpeechModel:
        """A copy with the same parameters in other modules, so that hooks and flags set on this model do not affect it."""
        weights = {id(weight): weight for weight in (*self.module.parameters(), *self.module.buffers())}
        return SpeechModel(copy.deepcopy(self.module, memo=weights), self.prompts)

    def trainable_by_name(self) -> dict[str, nn.Parameter]:
        """What the optimiser updates, see `make_trainable`, by name."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """`trainable_by_name` without names, in the same order."""
        return list(self.trainable_by_name().values())

    def same_everywhere(self) -> list[nn.Parameter]:
        """Those of them that every process holds alike."""
        return self.trainable_parameters() if self.parallel is None else self.parallel.whole_parameters(self.module)

    def trainable_for_text(self) -> dict[str, nn.Parameter]:
        """Those of them that a written prompt goes through, by name: without audio tower and projector."""
        heard = {id(parameter) for part in self.audio_parts for parameter in part.parameters()}
        return {name: own for name, own in self.trainable_by_name().items() if id(own) not in heard}

    def encode_prompts(self, questions: Sequence[Question], modality: Modality, instruction: str | None = None) -> list[Prompt]:
        """Prompts of questions, with audio embeddings where `modality` is speech.

        Args:
            instruction: see `PromptFormat.render`.

        Raises:
            UserError: see `prepare` and `encode_audio`.
        """
        return self.encode([self.prepare(question, modality, instruction) for question in questions])

    def prepare(self, question: Question, modality: Modality, instruction: str | None = None) -> PreparedPrompt:
        """The part of making a prompt that needs no weights, so that another thread may do it while the device works.

        Args:
            instruction: see `PromptFormat.render`.

        Raises:
            UserError: the question has no recording, or one that cannot be read.
        """
        if modality is Modality.TEXT:
            return PreparedPrompt(modality, self.prompts.token_ids(question, modality))
        if question.audio is None:
            raise UserError(f"item {question.id!r}: has no recording; give 'audio'")
        recordings = question.recordings if instruction is None else (question.audio,)
        audio = tuple(self.load_audio(recording) for recording in recordings)
        num_tokens = [recording.num_tokens for recording in audio]
        return PreparedPrompt(modality, self.prompts.token_ids(question, modality, num_tokens, instruction), audio)

    def encode(self, prepared: Sequence[PreparedPrompt]) -> list[Prompt]:
        """Prompts with the embeddings of their recordings.

        Raises:
            UserError: see `encode_audio`.
        """
        embeddings = iter(self.encode_audio([audio for prompt in prepared for audio in prompt.audio]))
        clips = [tuple(clip for _ in prompt.audio for clip in next(embeddings)) for prompt in prepared]
        return [Prompt(prompt.modality, prompt.token_ids, own) for prompt, own in zip(prepared, clips, strict=True)]

    def load_audio(self, recording: Recording) -> LoadedAudio:
        """The embeddings of a recording from the cache, or else its features, read from the file.

        Raises:
            UserError: the recording cannot be read.
        """
        key = self._audio_cache.key(recording)
        if not self.audio_is_trained and (held := self._audio_cache.get(key)) is not None:
            return LoadedAudio(recording, key, [len(clip) for clip in held], embeddings=held)
        waves = self.prompts.load_clips(recording)[0]
        features = [self.prompts.features(wave) for wave in waves]
        return LoadedAudio(recording, key, [clip.num_tokens for clip in features], features=features)

    def encode_audio(self, recordings: Sequence[LoadedAudio]) -> list[ClipEmbeddings]:
        """Audio embeddings of each recording, on the model's device; each different recording goes through the tower once.

        Returns:
            for each recording [A, D] of each of its clips.

        Raises:
            UserError: the tower's output for a recording is NaN or infinite.
        """
        different = {audio.recording: audio for audio in recordings}
        new = [audio for audio in different.values() if audio.embeddings is None]
        known = {
            audio.recording: tuple(clip.to(self.device) for clip in audio.embeddings)
            for audio in different.values()
            if audio.embeddings is not None
        }
        clips = iter(self.encode_clips([clip for audio in new for clip in audio.features]))
        for audio in new:
            embeddings = tuple(next(clips) for _ in audio.features)
            if not all(clip.isfinite().all() for clip in embeddings):
                raise UserError(f"{audio.recording}: the audio tower makes NaN or infinity of it; remove the item")
            known[audio.recording] = embeddings
            if not self.audio_is_trained:
                self._audio_cache.put(audio.key, embeddings)
        return [known[audio.recording] for audio in recordings]

    def encode_clips(self, clips: Sequence[Features]) -> list[Tensor]:
        """[A, D] audio embeddings of each clip, by audio tower and projector."""
        return self.family.encode_clips(self.module, clips)

    def embed_tokens(self, token_ids: Tensor, prompts: Sequence[Prompt], starts: Sequence[int]) -> Tensor:
        """Input embeddings of tokens, with audio embeddings in the place of the prompts' audio tokens.

        Args:
            token_ids: [N, S] of prompts and completions.
            prompts: those of them that have audio, or all.
            starts: where each of `prompts` begins in the flattened N * S.

        Returns:
            [N, S, D].
        """
        embeddings = self.module.get_input_embeddings()(token_ids)
        places: list[Tensor] = []
        audio: list[Tensor] = []
        for prompt, start in zip(prompts, starts, strict=True):
            if prompt.audio_clips:
                held = torch.tensor(prompt.token_ids) == self.prompts.audio_token_id
                places.append(start + held.nonzero()[:, 0])
                audio += prompt.audio_clips
        if not places:
            return embeddings
        flat = embeddings.flatten(0, 1)
        flat = flat.index_copy(0, torch.cat(places).to(flat.device), torch.cat(audio).to(flat.dtype))
        return flat.view_as(embeddings)

    def pack(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, routed: bool = False) -> PackedBatch:
        """Put prompts and completions into one row without padding: each prompt once, then all completions.

        Args:
            prompts: [N] the prompt of each completion; neighbours whose prompt is the same object share it.
            completions: [N]
            routed: whether the completions were sampled from these prompts, so that the engine's choice of experts is that of
                this row; see `ExpertRouting`.
        """
        pairs = list(zip(prompts, completions, strict=True))
        rows = [list(row) for _, row in groupby(pairs, key=lambda pair: id(pair[0]))]
        groups = PackedGroups(
            prompt_lengths=tuple(len(row[0][0].token_ids) for row in rows),
            completion_lengths=tuple(tuple(len(completion.token_ids) for _, completion in row) for row in rows),
            device=self.device,
        )
        prompt_ends = list(accumulate(groups.prompt_lengths))
        lengths = [len(completion.token_ids) for completion in completions]
        ends = torch.tensor([0, *accumulate(lengths)])
        # The last token of a prompt predicts the first of each completion; every other is predicted by the token before it.
        predictors = torch.arange(prompt_ends[-1] - 1, prompt_ends[-1] - 1 + sum(lengths))
        last_of_prompt = [end - 1 for end, row in zip(prompt_ends, rows, strict=True) for _ in row]
        predictors[ends[:-1]] = torch.tensor(last_of_prompt)
        # Positions of every completion continue from its prompt's end.
        positions = [torch.arange(length) for length in groups.prompt_lengths]
        positions += [
            torch.arange(start, start + length)
            for start, group in zip(groups.prompt_lengths, groups.completion_lengths, strict=True)
            for length in group
        ]
        token_ids = [token for row in rows for token in row[0][0].token_ids]
        token_ids += [token for completion in completions for token in completion.token_ids]
        experts = None
        if routed and self.routing is not None:
            chosen = [[completion.routed_experts for _, completion in row] for row in rows]
            experts = pack_routing(groups.prompt_lengths, chosen, groups.completion_lengths)
        batch = PackedBatch(
            prompts=[row[0][0] for row in rows],
            groups=groups,
            token_ids=torch.tensor(token_ids),
            position_ids=torch.cat(positions),
            predictors=predictors,
            cu_seqlens=ends,
            routed_experts=experts,
        )
        return batch.to(self.device)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, D] the last layer's states that predict the completions' tokens, after the final norm, for `head`."""
        starts = accumulate(batch.groups.prompt_lengths[:-1], initial=0)
        inputs = self.embed_tokens(batch.token_ids[None], batch.prompts, list(starts))
        # transformers checkpoints a layer only where the layer's own flag says training. The modules inside it stay in eval
        # mode, without dropout, and the flag is reset afterwards.
        for layer in self.language_model.layers:
            layer.training = self.gradient_checkpointing and torch.is_grad_enabled()
        states = self.run_decoder(inputs, batch.position_ids[None], groups=batch.groups, routed_experts=batch.routed_experts)
        for layer in self.language_model.layers:
            layer.training = False
        return states[0, batch.predictors]

    def run_decoder(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        *,
        groups: PackedGroups | None = None,
        key_values: KeyValues | None = None,
        routed_experts: Tensor | None = None,
    ) -> Tensor:
        """[N, S, D] states of the last layer, after the final norm, for `head`.

        Args:
            inputs: [N, S, D] input embeddings.
            position_ids: [N, S]
            groups: what attends to what in a packed row, see `packed_attention`.
            key_values: the KV cache while completions are sampled; either this or `groups` is given.
            routed_experts: [S, L, K] for N = 1, see `ExpertRouting`.
        """
        routed = {} if routed_experts is None else {"routed_experts": routed_experts}
        return self.language_model(
            inputs_embeds=inputs,
            # A mask of four dimensions keeps transformers from making one; packed attention reads none.
            attention_mask=inputs.new_zeros(1, 1, 1, 1),
            position_ids=position_ids,
            use_cache=False,
            groups=groups,
            key_values=key_values,
            **routed,
        ).last_hidden_state


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch as one row without padding: P prompt tokens, then T completion tokens."""

    prompts: list[Prompt]
    """[R]"""
    groups: PackedGroups
    """What attends to what."""
    token_ids: Tensor
    """[S] int64."""
    position_ids: Tensor
    """[S] int64; those of every completion continue from its prompt's end."""
    predictors: Tensor
    """[T] int64 places in the row of the states that predict each completion token."""
    cu_seqlens: Tensor
    """[N + 1] int64 boundaries of completions among the T tokens."""
    routed_experts: Tensor | None = None
    """[S, L, K] int16 experts that the engine chose, see `ExpertRouting`."""

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64 places in the row of completion tokens."""
        return torch.arange(self.groups.num_prompt_tokens, len(self.token_ids), device=self.token_ids.device)

    @property
    def completion_lengths(self) -> list[int]:
        """[N] tokens of each completion."""
        return [length for group in self.groups.completion_lengths for length in group]

    @property
    def targets(self) -> Tensor:
        """[T] int64 completion tokens."""
        return self.token_ids[self.groups.num_prompt_tokens :]

    def to(self, device: torch.device) -> PackedBatch:
        """A copy whose tensors are on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)


def choose_device(device: str, dtype: str, *, uses_lora: bool) -> tuple[torch.device, torch.dtype]:
    """Resolve `auto`: CUDA if there is a GPU; bfloat16 on CUDA with LoRA, else float32.

    Args:
        device: `auto`, `cuda` or `cpu`.
        dtype: `auto`, or the name of a torch dtype.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU; use --device cpu")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return chosen, torch.bfloat16 if chosen.type == "cuda" and uses_lora else torch.float32
    return chosen, getattr(torch, dtype)


def load_module(prompts: PromptFormat, source: str, device: torch.device, dtype: torch.dtype) -> PolicyModule:
    """Load a checkpoint, or an adapter on top of its base, by transformers; frozen, in eval mode.

    Args:
        prompts: of the same checkpoint.
        source: the checkpoint or adapter, see `hub.py`.

    Raises:
        UserError: it cannot be found or read, or lacks weights.
    """
    from safetensors import SafetensorError

    family, base = prompts.family, base_of(source)
    folder = checkpoint_folder(base, weights=True)
    adapted = bool(family.adapter_folder) and (folder / family.adapter_folder).is_dir()
    try:
        module, found = family.transformers_class().from_pretrained(
            folder,
            trust_remote_code=False,
            # Never a pickle.
            use_safetensors=True,
            dtype=torch.float32 if adapted else dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        if found["missing_keys"]:
            raise ValueError(f"{len(found['missing_keys'])} weights are not in it, {min(found['missing_keys'])} the first")
        if adapted:
            # The checkpoint's own speech adapter (Phi-4-multimodal): without it the base does not understand speech. It is
            # merged in float32, and also answers written prompts, so that there is one policy.
            module = merge_adapter(module, family, folder / family.adapter_folder).to(dtype)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise cannot_be_loaded(source, error) from error
    module = family.without_unused(module).requires_grad_(False).to(device).eval()
    load_adapter(module, family, source)
    return module


def load_model(preset: Preset, source: str, device: torch.device, dtype: torch.dtype) -> SpeechModel:
    """Load a checkpoint or adapter with its processor. Raises UserError where it cannot be read."""
    prompts = load_prompt_format(preset, source)
    return SpeechModel(load_module(prompts, source, device, dtype), prompts)


def make_trainable(
    model: SpeechModel,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_targets: Collection[str] | None = None,
    freeze_audio: bool,
    gradient_checkpointing: bool,
) -> None:
    """Choose the parameters that training updates: LoRA on linear layers of the language model, or all of it with its head.

    The module stays in eval mode, without dropout, also in LoRA's layers: with dropout, rollout, rewards and loss would each be
    computed with another policy.

    Args:
        lora_rank: 0 for full fine-tuning.
        lora_alpha: LoRA's product is scaled by `lora_alpha / lora_rank`.
        lora_targets: last names of the layers; None: all linear ones of the decoder.
        freeze_audio: whether audio tower and projector stay as they are.
        gradient_checkpointing: whether each layer of the language model is computed again in the backward pass.

    Raises:
        UserError: the model already has an adapter.
    """
    module = model.module
    if has_adapter(module):
        source = model.prompts.preset.source
        raise UserError(
            f"--model {source}: is an adapter; merge it into its base by python -m tars_fast.export --model {source} "
            "--output-dir MERGED, then train --model MERGED"
        )
    if lora_rank == 0:
        model.language_model.requires_grad_(True)
        model.head.requires_grad_(True)
        for part in model.audio_parts:
            # In some architectures it is a part of the decoder.
            part.requires_grad_(False)
    else:
        from peft import LoraConfig

        # By full names, because layers of the audio tower have the same last names.
        layers = f"{model.family.language_model}.layers."
        linear = [name for name, layer in module.named_modules() if name.startswith(layers) and isinstance(layer, nn.Linear)]
        targets = [name for name in linear if lora_targets is None or name.rpartition(".")[2] in lora_targets]
        base, _, revision = model.prompts.source.partition("@")
        # peft's type is int, but it computes with floats too.
        alpha: Any = lora_alpha
        config = LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
        # peft would write the folder that was loaded, which may be a folder of this machine's hub cache.
        config.base_model_name_or_path, config.revision = base, revision or None
        add_adapter(module, config)
        if model.parallel is not None:
            model.parallel.redraw_adapters(module)
    if not freeze_audio:
        model.audio_is_trained = True
        for part in model.audio_parts:
            part.requires_grad_(True)
        for constant in model.family.frozen_parts:
            module.get_submodule(constant).requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing = True
        # Layers use no random numbers, so torch's generator need not be restored; restoring it would make an engine that
        # samples meanwhile repeat its random numbers. `gradient_checkpointing_enable` is the name before transformers 5.23.
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    module.eval()
