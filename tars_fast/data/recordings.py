"""What stands in a column `audio`: a path, a whole file, or samples."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from urllib.parse import unquote

AUDIO_COLUMNS = ("audio", "audio_path", "audio_filepath", "audio_id", "audios")
"""Where a row's recording is looked for, in this order, before the parts of its chat messages."""
_AUDIO_PARTS = ("audio", "input_audio", "audio_url")
"""Types of a message's parts, and the entries of a part that hold the recording."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAGIC = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"FORM", b"caff")
"""How the files begin that base64 is looked for in: wav, flac, ogg, mp3, aiff, caf. No path looks like them in base64."""

_LONGEST_PATH = 4096


def take_recording(value: object) -> bytes | str | None:
    """What a value of the column `audio` means.

    Args:
        value: a path; a file's bytes, also as base64 or as a `data:` URI; {bytes, path}, as `datasets` writes it; {data}, as
            chat messages have it; {array, sampling_rate}; or a list of one of these.

    Returns:
        The bytes of a whole file, its path, or None where there is no recording.

    Raises:
        ValueError: it is something else; the text goes on behind "'audio'".
    """
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, str):
        return _take_text(value.strip())
    if isinstance(value, dict):
        if value.get("array") is not None:
            return _encode_samples(value["array"], value.get("sampling_rate"))
        if value and not value.keys() & {"bytes", "data", "path"}:
            raise ValueError(f"has {', '.join(map(repr, value)):.80}; give {{bytes}}, {{path}} or {{array, sampling_rate}}")
        return take_recording(next((value[name] for name in ("bytes", "data", "path") if value.get(name)), None))
    if isinstance(value, list) and len(value) <= 1:
        return take_recording(value[0]) if value else None
    if isinstance(value, list):
        if isinstance(value[0], int | float):
            raise ValueError(f"is a list of {len(value)} numbers without their rate; give {{array, sampling_rate}}, or a path")
        raise ValueError(f"is a list of {len(value)}; an item has one recording")
    raise ValueError(f"is {value!r:.80} ({type(value).__name__}), not a path or a recording")


def _take_text(text: str) -> bytes | str | None:
    if text.startswith("data:"):
        try:
            return base64.b64decode("".join(text.partition(",")[2].split()), validate=True) or None
        except binascii.Error as error:
            raise ValueError(f"is a data: URI that is not base64 ({error})") from error
    if url := _URL.match(text):
        if url[1].lower() == "file":
            return unquote(text[url.end() :])
        raise ValueError(f"is a URL, which is not fetched ({text[:80]}); download it and give its path")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        content = b""
    if content.startswith(_MAGIC):
        return content
    if len(text) > _LONGEST_PATH:
        raise ValueError(f"is a text of {len(text)} characters, neither a path nor base64 of a recording ({text[:40]!r}...)")
    return text or None


def _encode_samples(array: object, rate: object) -> bytes:
    """A wav file of [samples] or [channels, samples]."""
    import numpy as np
    import soundfile

    if not isinstance(rate, int | float) or not 1 <= rate <= 1_000_000:
        raise ValueError(f"holds an array whose sampling_rate is {rate!r:.80}; give it in Hz")
    try:
        with np.errstate(over="ignore"):  # Infinity is refused when it is read.
            wave = np.asarray(array, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError("holds an array that is no list of numbers") from error
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and len(wave) > 8):
        raise ValueError(f"holds an array of shape {wave.shape}; give the samples of one channel")
    file = io.BytesIO()
    soundfile.write(file, wave.T, int(rate), format="WAV", subtype="FLOAT")
    return file.getvalue()


def message_parts(row: Mapping[str, object]) -> list[tuple[object, str, list[object]]]:
    """(role, text, recordings) of each turn of a row's column `messages`, as OpenAI, Qwen and ms-swift write them.

    Of a list in the column `audios` each turn has as many as `<audio>` stands in it, in order.

    Raises:
        ValueError: the column is no list of {role, content}.
    """
    messages = row.get("messages")
    if isinstance(messages, str):
        with suppress(ValueError, RecursionError):
            messages = json.loads(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"'messages' must list {{role, content}}, not {messages!r:.80}")
    turns: list[tuple[object, str, list[object]]] = []
    beside = row.get("audios")
    listed = iter(beside if isinstance(beside, list) else [])
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts: list[str] = []
        recordings: list[object] = []
        for part in parts:
            if not isinstance(part, dict):
                raise ValueError(f"'messages' holds a part that is {part!r:.80}; a part is {{type, ...}}")
            if part.get("type") in _AUDIO_PARTS:
                recordings.append(_of_part(part))
            elif isinstance(part.get("text"), str):
                recordings += islice(listed, part["text"].count("<audio>"))
                texts.append(part["text"].replace("<audio>", ""))
        turns.append((message.get("role"), "\n".join(texts), recordings))
    return turns


def _of_part(part: Mapping[str, object]) -> object:
    value = next((part[name] for name in (*_AUDIO_PARTS, "path", "url", "data") if part.get(name) is not None), None)
    return value["url"] if isinstance(value, dict) and "url" in value else value


def conversation(row: Mapping[str, object]) -> object:
    """What a row has as turns before its question, as its column `turns` holds them; None where there are none.

    Of chat messages those are all before the user's last one, but for a system prompt.
    """
    if row.get("turns") is not None or row.get("messages") is None:
        return row.get("turns")
    try:
        parts = [part for part in message_parts(row) if part[0] != "system"]
    except ValueError:
        # Said with the row's text.
        return None
    asked = [number for number, (role, _, _) in enumerate(parts) if role == "user"]
    earlier = parts[: asked[-1]] if len(asked) > 1 else []
    return [{"role": role, "text": text.strip(), "audio": recordings} for role, text, recordings in earlier] or None


def find_recording(row: Mapping[str, object]) -> tuple[str, object]:
    """(the column of a row that holds its recording, the value there for `take_recording`); None as the value: it has none."""
    several = row.get("messages") is not None and conversation(row) is not None
    for column in AUDIO_COLUMNS:
        if row.get(column) is not None and not (several and column == "audios"):
            return column, row[column]
    try:
        held = [recordings for role, _, recordings in message_parts(row) if role == "user"]
    except ValueError:
        # Said with the row's text.
        return "audio", None
    return "messages", [recording for recordings in held[-1:] for recording in recordings] or None
