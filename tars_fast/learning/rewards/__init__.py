"""What a completion earns: the reward R of docs/method.md, Rewards, one file a term, and `total.py` that adds them up.

To add a reward that follows from what a completion says, write a function from `(completion, question)` to a number in a file
of its own here, and name it with its weight in `COMPLETION_REWARDS` of `total.py`. From there on it is part of R, of the
advantages and of metrics.jsonl (`<name>/speech`, `<name>/text`). docs/adding-a-reward.md says more.
"""
