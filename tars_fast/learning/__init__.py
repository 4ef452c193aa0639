"""One training step: the rollout's answers, rewards, advantages, the terms of the loss and the optimiser.

Comes in: a model, an engine, `Question`s. Goes out: changed weights, and metrics.

May import support, data, models, config, rollout.
"""
