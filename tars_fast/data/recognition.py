"""Speech recognition, which verifies synthesised recordings: a function of the user's or a transformers checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tars_fast.support.cli import first_line, load_function
from tars_fast.types import UserError

Recogniser = Callable[[np.ndarray, int], str]
"""([samples] float32 mono, sample rate in Hz) -> what was said."""


def load_recogniser(source: str) -> Recogniser:
    """Load a recogniser.

    Args:
        source: `module:function`, or a transformers checkpoint for speech recognition (hub id or folder), which runs on the
            GPU where there is one.

    Raises:
        UserError: it cannot be loaded.
    """
    if ":" in source:
        return load_function("--recogniser", source)
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        recogniser: Any = pipeline(
            "automatic-speech-recognition", model=source, device=device, chunk_length_s=30, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--recogniser {source}: cannot be loaded ({first_line(error)}); check the path, or the network"
        ) from error
    return lambda wave, rate: recogniser({"raw": wave, "sampling_rate": rate})["text"]
