"""Speech LLMs as the trainer sees them: families, presets, prompts, the packed forward pass, checkpoints, memory.

Comes in: a preset or checkpoint, `Question`s. Goes out: `Prompt`s, hidden states, log-probabilities.

May import support, data.
"""
