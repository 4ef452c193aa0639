"""What happens inside a model between speech and text: drift, alignment of layers, probes.

Comes in: a model, an engine, `Question`s. Goes out: figures by layer.

May import support, data, models, rollout, learning, evaluation.
"""
