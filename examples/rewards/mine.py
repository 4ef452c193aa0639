"""A reward of one's own: `python -m tars_fast.train --objective tars --reward ./examples/rewards/mine.py:brief=0.5`."""


def brief(completions):
    """From 1 for an empty completion to 0 for one of 40 tokens."""
    return [max(0.0, 1 - len(one.token_ids) / 40) for one in completions]


def shares_words(completions):
    """What part of the words of the question a spoken completion takes up; None for written ones."""
    return [shared(one.question.text, one.text) if one.modality == "speech" else None for one in completions]


def shared(question, text):
    words = set(question.lower().split())
    return len(words & set(text.lower().split())) / len(words)
