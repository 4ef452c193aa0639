"""Reinforcement learning that gives speech LLMs the reasoning of their text side."""

from tars_fast.requirements import check

check()
