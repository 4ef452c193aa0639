"""Completions sampled from the weights that are being trained, by vLLM or by transformers.

Comes in: `Prompt`s. Goes out: completions with the log-probabilities they were sampled at.

May import support, data, models.
"""
