"""Families of models, one file each: what transformers and vLLM call a model's parts, how audio is encoded, and its presets.

docs/adding-a-model.md says how one is added. Outside this folder only these name models: `models/registry.py` (the tables, and
a hint for `phi4mm`), `rollout/vllm_models.py`, the presets listed in `config.py`, and `pocket`, which makes a Qwen2-Audio.
"""
