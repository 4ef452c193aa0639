"""Accuracy from speech and from text, and whether one run is better than another.

Comes in: a model, an engine, `Question`s; later result files. Goes out: results an item, figures with intervals.

May import support, data, models, rollout, learning.
"""
