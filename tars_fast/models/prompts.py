"""How questions become tokens for one checkpoint: its tokenizer, chat template, feature extractor and limits, no weights."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain
from typing import Any

import numpy as np

from tars_fast.data.audio import LongRecordingError, load_clips
from tars_fast.data.items import shown_options
from tars_fast.models.families.base import Family, Features
from tars_fast.models.hub import base_of, cannot_be_loaded, checkpoint_folder, model_type
from tars_fast.models.modules import Tokenizer
from tars_fast.models.preset import PLAIN_PROMPT, Preset
from tars_fast.models.registry import find_family
from tars_fast.models.templates import TemplateError, render_template, start_rendering
from tars_fast.types import LongAudio, Modality, Question, Recording, UserError

_QUESTION = "\ue000"
"""Stands for the question while a prompt template is rendered: a character that Unicode leaves to private use."""


class PromptTemplateError(UserError):
    """The user's prompt template fails on an item."""


class _Conversation:
    """The messages of a prompt; what one role says in a row is one message, since templates want roles to alternate."""

    def __init__(self, family: Family):
        self._family = family
        self._turns: list[tuple[str, list[tuple[int, str]]]] = []

    def add(self, role: str, num_clips: int, text: str, joined: str = "\n") -> None:
        """Add clips with a text behind them; `joined` stands between what the role said before and a text without clips."""
        if self._turns and self._turns[-1][0] == role:
            pieces = self._turns[-1][1]
            pieces.append((num_clips, text if num_clips else joined + text))
        else:
            self._turns.append((role, [(num_clips, text)]))

    def messages(self) -> list[dict[str, object]]:
        return [{"role": role, "content": self._content(pieces)} for role, pieces in self._turns]

    def _content(self, pieces: Sequence[tuple[int, str]]) -> object:
        if not any(num_clips for num_clips, _ in pieces):
            return "".join(text for _, text in pieces)
        contents: list[Any] = [self._family.user_turn(num_clips, text) for num_clips, text in pieces]
        return reduce(operator.add, contents)


@dataclass(frozen=True)
class PromptFormat:
    """All that turns a question into a prompt's tokens and audio features, without the checkpoint's weights."""

    family: Family
    config: Any
    """Transformers' configuration of `family.model_class`."""
    generation_config: Any
    tokenizer: Tokenizer
    feature_extractor: Any
    """Used through `family` only, because its arguments and attributes differ between families."""
    chat_template: str
    preset: Preset
    source: str
    """Where tokenizer and configuration come from: the checkpoint, or the base that an adapter names."""
    long_audio: LongAudio = "refuse"
    """What to do with recordings longer than `max_audio_seconds`, see `tars_fast.data.audio.load_clips`."""

    @property
    def audio_token(self) -> str:
        """The placeholder that a prompt holds once for each audio token."""
        return getattr(self.tokenizer, "audio_token", None) or self.family.audio_token

    @property
    def audio_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.audio_token)

    @property
    def max_audio_seconds(self) -> float:
        """Longest clip, in seconds, that the audio tower takes."""
        return self.family.max_audio_seconds or self.feature_extractor.chunk_length

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self.family.max_tokens(self.config)

    @property
    def stop_token_ids(self) -> list[int]:
        """Every token that ends a completion: those of the checkpoint and of its family, in rising order."""
        configured = self.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        vocabulary = self.tokenizer.get_vocab()
        known = {vocabulary.get(token) for token in self.family.stop_tokens}
        return sorted(token for token in {*listed, *known, self.tokenizer.eos_token_id} if token is not None)

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's, or a stop token where it has none."""
        pad = self.tokenizer.pad_token_id
        return self.stop_token_ids[0] if pad is None else pad

    @cached_property
    def control_tokens(self) -> list[str]:
        """The tokenizer's added tokens, none of which a question's text may contain."""
        return list(self.tokenizer.get_added_vocab())

    def load_clips(self, recording: Recording) -> tuple[list[np.ndarray], float]:
        """(clips of [samples] at 16 kHz, seconds of the whole recording), see `tars_fast.data.audio.load_clips`."""
        return load_clips(recording, self.max_audio_seconds, self.long_audio)

    def features(self, clip: np.ndarray) -> Features:
        """The audio tower's input for a clip of [samples] at 16 kHz."""
        return self.family.features(self.feature_extractor, clip)

    @property
    def system_prompt(self) -> str:
        """The preset's, with what it says of the answer format."""
        return self.preset.system_prompt.replace("{answer_format}", self.preset.answers.instruction)

    def ask(self, questions: Sequence[Question]) -> list[Question]:
        """The questions with the answer format that their prompts ask for."""
        return [dataclasses.replace(question, answer_format=self.preset.answers) for question in questions]

    def render(
        self,
        question: Question,
        modality: Modality,
        num_clips: Sequence[int] | None = None,
        instruction: str | None = None,
    ) -> str:
        """The prompt as text, by the checkpoint's chat template, with one audio placeholder for each clip.

        Args:
            num_clips: of each recording of a spoken prompt, in order; None: one each.
            instruction: what to do with the question's recording instead of answering the question in it, such as transcribing
                it; it replaces the preset's system prompt by `PLAIN_PROMPT`, and nothing comes before the recording.

        Raises:
            PromptTemplateError: the user's prompt template fails on the question.
            UserError: the checkpoint's chat template fails, or takes too long or too much memory.
        """
        clips = iter([1] * (1 + len(question.recordings)) if num_clips is None else num_clips)
        conversation = _Conversation(self.family)
        if instruction is not None:
            conversation.add("user", next(clips), instruction)
        else:
            for turn in question.turns:
                spoken = turn.recordings if modality is Modality.SPEECH else ()
                for _ in spoken:
                    conversation.add(turn.role, next(clips), "")
                if not spoken:
                    conversation.add(turn.role, 0, turn.text)
            self._add_question(conversation, question, modality, next(clips) if modality is Modality.SPEECH else 0)
        system = self.system_prompt if instruction is None else PLAIN_PROMPT
        messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
        try:
            return render_template(self.chat_template, messages + conversation.messages(), self.tokenizer.special_tokens_map)
        except TemplateError as error:
            raise self._template_error(str(error)) from error

    def _add_question(self, conversation: _Conversation, question: Question, modality: Modality, num_clips: int) -> None:
        """The question's own turn, as the user's prompt template has it."""
        before, after = "", ""
        if self.preset.question_template:
            before, after = self._around(question, modality)
        if modality is Modality.TEXT:
            said = [question.transcript] if question.about_audio and question.transcript else []
            conversation.add("user", 0, before + "\n".join([*said, question.text]) + after)
            return
        if before:
            conversation.add("user", 0, before)
        asked = question.text if question.about_audio else ""
        conversation.add("user", num_clips, asked + after, joined="")

    def _around(self, question: Question, modality: Modality) -> tuple[str, str]:
        """What the user's prompt template has before and behind the question."""
        options = shown_options(question)[1] or list(question.choices)
        variables: dict[str, object] = {
            "question": _QUESTION,
            "options": options,
            "modality": modality.value,
            "category": question.category,
            "id": question.id,
            "answer_format": self.preset.answers.instruction,
        }
        try:
            before, *after = render_template(self.preset.question_template, [], variables).split(_QUESTION)
        except TemplateError as error:
            raise PromptTemplateError(f"--prompt-template: fails on item {question.id!r:.80} ({error}); correct it") from error
        if len(after) != 1:
            raise PromptTemplateError(
                f"--prompt-template: holds the question of item {question.id!r:.80} {len(after)} times in the "
                f"{'spoken' if modality is Modality.SPEECH else 'written'} prompt; write {{{{ question }}}} once"
            )
        return before, after[0]

    def _template_error(self, reason: str) -> UserError:
        return UserError(
            f"--model {self.source}: its chat template cannot be used ({reason}); put its chat_template.jinja right"
        )

    def check(self) -> None:
        """Raises UserError where every prompt would lack its end, its question or its recording, as with a damaged file."""
        vocabulary = self.tokenizer.get_vocab()
        if self.audio_token not in vocabulary or not self.stop_token_ids:
            lacking = "no token that ends a completion" if self.audio_token in vocabulary else f"no {self.audio_token}"
            raise UserError(f"--model {self.source}: its tokenizer has {lacking}; copy the checkpoint again, whole")
        probe = Question("an example", "What is asked?", "A", ("A",))
        if probe.text not in self.render(probe, Modality.TEXT):
            raise self._template_error("it leaves the question out")
        if (number := self.render(probe, Modality.SPEECH).count(self.audio_token)) != 1:
            raise self._template_error(f"it holds a recording {number} times")

    def token_ids(
        self,
        question: Question,
        modality: Modality,
        audio_tokens: Sequence[Sequence[int]] = (),
        instruction: str | None = None,
    ) -> tuple[int, ...]:
        """The tokens of the rendered prompt, each audio placeholder repeated as often as its clip has audio tokens.

        Args:
            audio_tokens: number of audio tokens of each clip of each recording of a spoken prompt, in order.
            instruction: see `render`.
        """
        token_ids: list[int] = []
        remaining = chain.from_iterable(audio_tokens)
        rendered = self.render(question, modality, [len(clips) for clips in audio_tokens], instruction)
        for token_id in self.tokenizer.encode(rendered, add_special_tokens=False):
            token_ids.extend([token_id] * (next(remaining) if token_id == self.audio_token_id else 1))
        return tuple(token_ids)

    def num_audio_tokens(self, wave: np.ndarray) -> int:
        """Audio tokens of a clip of [samples] at 16 kHz."""
        return self.family.num_audio_tokens(self.feature_extractor, len(wave))

    def prompt_size(self, question: Question, max_new_tokens: int) -> PromptSize:
        """Length of an item's prompts in tokens, and of its recording in seconds.

        Raises:
            LongRecordingError: the recording is longer than `max_audio_seconds`, and `long_audio` is "refuse".
            UserError: the model cannot take the item for another reason: its recording is missing or cannot be read, the prompt
                leaves no room for a completion of `max_new_tokens`, or its text holds a control token.
        """
        if question.audio is None:
            raise UserError("has no recording; give 'audio'")
        loaded = [self.load_clips(recording) for recording in question.recordings]
        texts = [question.text, *(turn.text for turn in question.turns)]
        control = [token for token in self.control_tokens if any(token in text for text in texts)]
        if control:
            what = (
                f"the audio placeholder {self.audio_token}"
                if self.audio_token in control
                else f"the control token {control[0]}"
            )
            raise UserError(f"its text holds {what}; remove it")
        written = self.token_ids(question, Modality.TEXT)
        num_tokens = [[self.num_audio_tokens(clip) for clip in clips] for clips, _ in loaded]
        spoken = self.token_ids(question, Modality.SPEECH, num_tokens)
        longest = max(len(written), len(spoken))
        if longest + max_new_tokens > self.max_tokens:
            raise UserError(
                f"its prompt has {longest} tokens, which with {max_new_tokens} new ones is more than the model's "
                f"{self.max_tokens}; shorten the item or lower --max-new-tokens"
            )
        return PromptSize(longest, max(seconds for _, seconds in loaded))

    def check_questions(self, questions: Sequence[Question], max_new_tokens: int) -> list[PromptSize]:
        """`prompt_size` of each item, where the model can take all of them.

        Raises:
            UserError: see `raise_refusals`.
        """
        return self.raise_refusals(questions, self.prompt_sizes(questions, max_new_tokens))

    def raise_refusals(self, questions: Sequence[Question], sizes: Sequence[PromptSize | UserError]) -> list[PromptSize]:
        """Return the sizes that `prompt_sizes` found, if there is no error among them.

        Raises:
            UserError: of the first item that the model cannot take, with its id; if its recording is too long, also with the
                number of recordings that are.
        """
        long = [size for size in sizes if isinstance(size, LongRecordingError)]
        for question, size in zip(questions, sizes, strict=True):
            if isinstance(size, UserError):
                more = f" ({len(long)} of {len(questions)} recordings are longer)" if size in long and len(long) > 1 else ""
                raise UserError(f"item {question.id!r}: {size}{more}")
        return [size for size in sizes if isinstance(size, PromptSize)]

    def long_audio_notice(self, sizes: Sequence[PromptSize]) -> str | None:
        """A line that says how recordings longer than `max_audio_seconds` are used; None where there are none."""
        long = [size.seconds for size in sizes if size.seconds > self.max_audio_seconds]
        if not long:
            return None
        use = "each is encoded as several clips" if self.long_audio == "chunk" else "only the beginning of each is encoded"
        return (
            f"{len(long)} of {len(sizes)} recordings are longer than the {self.max_audio_seconds:g} s that the model encodes "
            f"at once (the longest {max(long):.0f} s): {use} (--long-audio {self.long_audio})"
        )

    def prompt_sizes(self, questions: Sequence[Question], max_new_tokens: int) -> list[PromptSize | UserError]:
        """`prompt_size` of each item, in order, or the error that it raised; in several threads.

        Raises:
            PromptTemplateError: the user's prompt template fails on an item.
        """

        def size_or_error(question: Question) -> PromptSize | UserError:
            try:
                return self.prompt_size(question, max_new_tokens)
            except PromptTemplateError:
                # The user's own, and at fault for one item it may be for all.
                raise
            except UserError as error:
                return error

        with ThreadPoolExecutor() as pool:
            return list(pool.map(size_or_error, questions))


@dataclass(frozen=True)
class PromptSize:
    """How long an item is."""

    num_tokens: int
    """Of the longer one of its prompts, without a completion."""
    seconds: float
    """Of its longest recording, as a whole."""


def load_prompt_format(preset: Preset, source: str, long_audio: LongAudio = "refuse") -> PromptFormat:
    """Read configuration, tokenizer, feature extractor and chat template of a checkpoint, or of an adapter's base.

    `AutoProcessor` is not used, because processors of models with a vision tower need torchvision.

    Args:
        source: the checkpoint or adapter, see `hub.py`.
        long_audio: see `PromptFormat.long_audio`.

    Raises:
        UserError: the checkpoint cannot be found or read, has no chat template, or belongs to no family.
    """
    start_rendering()
    from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, GenerationConfig, ProcessorMixin
    from transformers.utils import logging

    # transformers warns of weights that are missing, which `load_module` refuses, and of others, which are not needed.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    base = base_of(source)
    family = find_family(source, model_type(base))
    folder = checkpoint_folder(base, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **family.tokenizer_settings)
        feature_extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        described, _ = ProcessorMixin.get_processor_dict(folder)
        if (folder / "generation_config.json").is_file():
            generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            generation_config = GenerationConfig.from_model_config(config)
    except Exception as error:  # A damaged file makes the libraries raise anything.
        raise cannot_be_loaded(source, error) from error
    chat_template = described.get("chat_template", tokenizer.chat_template)
    if chat_template is None:
        chat_template = family.default_template()
    if isinstance(chat_template, dict):
        # Several by name.
        chat_template = chat_template.get("default")
    if not isinstance(chat_template, str):
        raise UserError(f"--model {source}: brings no chat template; add the chat_template.jinja of its instruct version")
    prompts = PromptFormat(
        family,
        family.config_of(config),
        generation_config,
        tokenizer,
        feature_extractor,
        chat_template,
        preset,
        base,
        long_audio,
    )
    prompts.check()
    return prompts
