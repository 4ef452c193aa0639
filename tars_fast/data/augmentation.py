"""What `prepare --augment` does to a recording: noise at a signal-to-noise ratio, and the band of a telephone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.types import UserError

_PATTERN = re.compile(r"(noise|speech-noise):(-?\d+(?:\.\d+)?)(?:\.\.(-?\d+(?:\.\d+)?))?|telephone")
_LOWEST_SNR, _HIGHEST_SNR = -40.0, 80.0
"""In dB. Beyond them a recording of 16 bits holds nothing of the speech, or nothing of the noise."""
_TELEPHONE_RATE = 8000
_TELEPHONE_BAND = (300, 3400)
"""In Hz; ITU-T G.712 has it for a line."""


@dataclass(frozen=True)
class Augmentation:
    """One value of `--augment`."""

    kind: Literal["noise", "speech-noise", "telephone"]
    lowest_snr: float = 0.0
    """In dB; each item's is drawn uniformly between the two. A telephone has none."""
    highest_snr: float = 0.0

    def apply(self, wave: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Change a recording.

        Args:
            wave: [samples] float32 at 16 kHz, not silent.

        Returns:
            ([samples] float32 in [-1, 1], what was done as `--augment` spells it: `noise:12.31`).
        """
        if self.kind == "telephone":
            return telephone(wave), self.kind
        snr = round(float(rng.uniform(self.lowest_snr, self.highest_snr)), 2)
        noise = rng.standard_normal(len(wave)) if self.kind == "noise" else speech_noise(wave, rng)
        return add_noise(wave, noise, snr), f"{self.kind}:{snr:g}"


def parse_augmentation(text: str) -> Augmentation:
    """Raises UserError where it is none."""
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise UserError(
            f"--augment {text}: is none of noise:DB, speech-noise:DB and telephone, DB being a number such as 10 or two such "
            "as 5..20"
        )
    if found[1] is None:
        return Augmentation("telephone")
    lowest, highest = float(found[2]), float(found[3] or found[2])
    if not _LOWEST_SNR <= lowest <= highest <= _HIGHEST_SNR:
        raise UserError(f"--augment {text}: give {_LOWEST_SNR:g} to {_HIGHEST_SNR:g} dB, the lower one first")
    return Augmentation("noise" if found[1] == "noise" else "speech-noise", lowest, highest)


def add_noise(wave: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Mix a recording with noise, quieter where the sum would go beyond full scale.

    Args:
        wave: [samples], of any level.
        noise: [samples] too, of any level.
        snr: ratio of their mean powers over all samples, in dB.

    Returns:
        [samples] float32.
    """
    power = np.square(wave, dtype=np.float64).mean() / np.square(noise).mean()
    mixed = wave + noise * np.sqrt(power / 10 ** (snr / 10))
    return np.asarray(mixed / max(1.0, np.abs(mixed).max()), np.float32)


def speech_noise(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Steady noise with the spectrum of the recording, as of many who talk at once: [samples].

    Its phases are random, so that nothing is to be understood.
    """
    spectrum = np.fft.rfft(wave)
    phases = rng.uniform(0, 2 * np.pi, len(spectrum))
    return np.fft.irfft(np.abs(spectrum) * np.exp(1j * phases), len(wave))


def telephone(wave: np.ndarray) -> np.ndarray:
    """Send [samples] float32 at 16 kHz through a line of 300 to 3400 Hz, sampled at 8 kHz; they come back at 16 kHz."""
    import soxr
    from scipy.signal import butter, sosfilt

    band = butter(4, _TELEPHONE_BAND, "bandpass", fs=_TELEPHONE_RATE, output="sos")
    narrow = sosfilt(band, soxr.resample(wave, SAMPLE_RATE, _TELEPHONE_RATE))
    wide = soxr.resample(narrow, _TELEPHONE_RATE, SAMPLE_RATE)[: len(wave)]
    return np.asarray(wide.clip(-1.0, 1.0), np.float32)
