"""A user's rewards, tried before training on completions of a few items that nobody has sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.rewards.reward import Reward, RewardError, reward_values
from tars_fast.learning.rewards.total import OwnRewards
from tars_fast.models.architecture import check_layers, find_layers
from tars_fast.models.prompts import PromptFormat
from tars_fast.types import Completion, Modality, Question, UserError

NUM_ITEMS = 2
RIGHT = "<think>So it is.</think> <answer>The answer is {}.</answer>"
TEXTS = (RIGHT, "I do not know.", "", "<think>So it is not")
"""Of each item and modality: right, without an answer, empty, cut off."""


def try_rewards(own: OwnRewards, held_out: Sequence[Question], training: Sequence[Question], prompts: PromptFormat) -> bool:
    """Call each reward once, with a right, a wrong, an empty and a cut-off completion of each of a few items: the first
    evaluation items, and a training item, with an answer where one has any.

    Returns:
        Whether a reward that has a weight applies to any completion of the training item.

    Raises:
        UserError: it fails, or takes too long.
    """
    if not own.rewards:
        return False
    answered = next((question for question in training if question.has_answer), training[0])
    chosen = [*held_out[:NUM_ITEMS], answered]
    completions = [
        _completion(number, question, modality, text, prompts)
        for number, question in enumerate(chosen)
        for modality in Modality
        for text in TEXTS
    ]
    # The reference of a spoken completion is the right written one of its question.
    references = [
        completion.question * 2 * len(TEXTS) + len(TEXTS) if completion.modality is Modality.SPEECH else None
        for completion in completions
    ]
    applies = False
    for reward in own.rewards:
        try:
            states = _states(reward, prompts, len(completions)) if reward.needs.layers else ()
            inputs = reward_inputs(completions, chosen, references, states)
            if reward.is_async:
                values_N = own.calls.begin(reward, inputs).of(range(len(inputs)))
            else:
                # In the kind of thread that it will be called in.
                with ThreadPoolExecutor(1) as executor:
                    values_N = executor.submit(reward_values, reward, inputs).result()
        except RewardError as error:
            raise UserError(f"{error}; it was tried on a few items before training") from error
        # The training item's are the last ones.
        applies |= bool(reward.weight) and not values_N[-len(Modality) * len(TEXTS) :].isnan().all()
    return applies


def _completion(number: int, question: Question, modality: Modality, text: str, prompts: PromptFormat) -> Completion:
    said = text.format(question.reference) if text is RIGHT else text
    tokens = tuple(prompts.tokenizer.encode(said, add_special_tokens=False)) or (prompts.pad_token_id,)
    return Completion(number, modality, tokens, (-1.0,) * len(tokens), said, truncated=text is TEXTS[-1])


def _states(reward: Reward, prompts: PromptFormat, num_completions: int) -> list[Tensor]:
    """[N] of [L, D], random: of zeros a cosine is no number."""
    architecture = prompts.family.architecture(prompts.config)
    try:
        check_layers(reward.needs.layers)
        chosen = find_layers(reward.needs.layers, architecture.num_layers) or range(architecture.num_layers)
    except UserError as error:
        raise UserError(
            f"--reward: reward {reward.name!r} asks for layers {reward.needs.layers}: {str(error).partition(': ')[2]}"
        ) from error
    shape = (num_completions, len(chosen), architecture.hidden_size)
    return list(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
