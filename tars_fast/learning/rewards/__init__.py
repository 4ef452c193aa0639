"""What a completion earns: the reward R of docs/method.md, Rewards, one file a term, and `total.py` that adds them up.

docs/adding-a-reward.md says how one is added.
"""
