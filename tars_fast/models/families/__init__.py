"""One architecture a file: what transformers and vLLM call its parts, how it hears, and the presets of its checkpoints."""
