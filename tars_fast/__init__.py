"""Reinforcement learning that gives speech LLMs the reasoning of their text side."""

from tars_fast.support.requirements import check
from tars_fast.support.starting import interrupt_in_one_line, is_command
from tars_fast.support.threads import bound_spinning

if is_command():
    interrupt_in_one_line()
check()
# Before any module of the package loads torch.
bound_spinning()
