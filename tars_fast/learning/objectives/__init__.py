"""The terms of a step's loss, one file a term; `--objective` chooses them (docs/method.md).

`policy_gradient.py` is TARS and GRPO, `distillation.py` on-policy distillation with the anchor of written answers.
`references.py` holds the other weights that a term compares with, `watch.py` looks whether written answers stay as they were.
"""
