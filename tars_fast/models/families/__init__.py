"""Families of models, one file each: what transformers and vLLM call a model's parts, how audio is encoded, and its presets.

To add a model that transformers has:
1. Write `families/<model_type>.py` with a `FAMILY`, see `base.Family` for its fields, and `PRESETS`.
2. Add both to the tables in `models/registry.py`.
3. For vLLM give `engine_names`: what vLLM calls each prefix of transformers' module names, and which modules it fuses.
   A model that vLLM cannot run has `engine_refusal` instead.
4. Where vLLM's own class lacks LoRA or takes no audio embeddings, register one in `rollout/vllm_models.py`.
5. Add a function that writes a tiny random checkpoint to `MAKERS` in tests/checkpoints.py; tests of all families then run it.

No other module depends on a model, but for the command `pocket`, which makes a small Qwen2-Audio.
"""
