"""What a recording's container promises against what is there: of a file that was cut off, decoders give what is left."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_UNKNOWN_SIZE = 0x7FFF0000
"""Who writes into a pipe cannot say how much will come: ffmpeg promises 2^32 - 1 bytes, sox 0x7FFFF000."""
_SIZES = re.compile(r"\s*(?:data|SSND|BODY|Data Size|riff|Riff size|Data length)\s*:? (\d+) \(?should be (\d+)")
"""libsndfile on rifx, aiff, svx, au, w64, rf64 and wve. The size of RIFF is not among them: all data may be there where it is
wrong."""
_NO_END = re.compile(r"\*\*\* (Warning : f|F)ile seems to be truncated|Seems to be a truncated file")
"""libsndfile on mat4, paf and voc."""

_TAGS = (b"Xing", b"Info", b"VBRI")
_MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""By version (3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5), in Hz."""
_MPEG_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Of layer III, which is mp3; 0 is any other rate."""
_DECODER_SAMPLES = 4 * 1152
"""Of silence at both ends, which an encoder adds and a decoder leaves out."""


class IncompleteError(ValueError):
    """A recording is longer or shorter than its container says; the text says by what."""


def check_header(file: int) -> int:
    """Compare what a wav, ogg or mp3 file says that it holds with what is there.

    Args:
        file: a descriptor, whose position stays.

    Returns:
        The number of samples of each channel that decoding has to give at least; 0 where the header does not say it.

    Raises:
        IncompleteError: a part is missing, or one is there of which the header does not know.
    """
    length = os.fstat(file).st_size
    start = os.pread(file, 1024, 0)
    if start.startswith(b"RIFF") and start[8:12] == b"WAVE":
        _check_wav(file, length)
    elif start.startswith(b"OggS"):
        _check_ogg(os.pread(file, length, 0))
    elif start.startswith(b"NIST_1A") and (count := re.search(rb"sample_count -i (\d+)", start)):
        return int(count[1])
    elif start.startswith((b"ID3", b"\xff")):
        frames = find_mpeg_frames(os.pread(file, length, 0))
        return 0 if frames is None else frames.check()
    return 0


def _check_wav(file: int, length: int) -> None:
    # libsndfile says it too, in notes that end after two thousand characters, which titles and comments may fill.
    offset = 12
    while len(header := os.pread(file, 8, offset)) == 8:
        size, begin = int.from_bytes(header[4:], "little"), offset + 8
        if header.startswith(b"data"):
            _compare(size, length - begin)
            rest = length - begin - size
            marker = os.pread(file, 4, begin + size + size % 2)
            if rest > size and not (marker.isascii() and marker.decode().isprintable()):
                raise IncompleteError(f"its header says {size} bytes of sound and leaves {rest} out")
            return
        offset = begin + size + size % 2


def _check_ogg(content: bytes) -> None:
    # libsndfile notes a last page that is not the last of its stream, but not where the next one begins and is cut off.
    offset, ended = 0, False
    while (offset := content.find(b"OggS", offset)) >= 0:
        body = offset + 27 + content[offset + 26] if len(content) > offset + 26 else len(content) + 1
        end = body + sum(content[offset + 27 : body])
        if end > len(content):
            raise IncompleteError("it ends within a page")
        ended = bool(content[offset + 5] & 4)
        offset = end
    if not ended:
        raise IncompleteError("its last page does not end its stream")


def _compare(promised: int, there: int) -> None:
    # Chunks are padded to even lengths, and not everyone counts that byte.
    if promised < _UNKNOWN_SIZE and promised - there > 1:
        raise IncompleteError(f"its header says {promised} bytes of sound, of which {there} are there")


def check_notes(notes: str) -> None:
    """Raise IncompleteError where libsndfile's notes on a file (`extra_info` of soundfile) say that a part is missing."""
    for line in notes.splitlines():
        if sizes := _SIZES.match(line):
            _compare(*map(int, sizes.groups()))
        elif _NO_END.match(line):
            raise IncompleteError("its end is missing")


@dataclass(frozen=True)
class MpegFrames:
    """What an mp3 file holds."""

    found: int
    """Whole frames of sound."""
    promised: int | None
    """Those that a first frame without sound (Xing, Info, VBRI) promises; None where there is none."""
    samples: int
    """Of each frame."""
    cut: bool
    """The file ends within a frame."""

    def check(self) -> int:
        """As `check_header`."""
        if self.promised is not None and abs(self.found - self.promised) > 1:
            raise IncompleteError(f"its header says {self.promised} frames of sound, of which {self.found} are there")
        if self.promised is None and self.cut:
            raise IncompleteError("it ends within a frame")
        # Without such a header libsndfile guesses the length from the first frame, and reads no further.
        return 0 if self.promised is not None else self.found * self.samples - _DECODER_SAMPLES


def find_mpeg_frames(content: bytes) -> MpegFrames | None:
    """The frames of an mp3 file; None where the file is another one, or its frames are of a free bit rate."""
    start = 0
    while content.startswith(b"ID3", start) and len(content) >= start + 10:
        # Seven bits a byte.
        start += 10 + sum(byte << shift for byte, shift in zip(content[start + 6 : start + 10], (21, 14, 7, 0), strict=True))
    first = _Frame.at(content, start)
    if first is None:
        return None
    # Behind four bytes of header and as many of side information as version and channels ask for.
    head = content[start : start + min(first.size, 60)]
    tag = next((head.index(name) for name in _TAGS if name in head), None)
    promised = None
    if tag is not None:
        at = tag + (14 if head.startswith(b"VBRI", tag) else 8)
        has_number = head.startswith(b"VBRI", tag) or int.from_bytes(head[tag + 4 : tag + 8]) & 1
        promised = int.from_bytes(head[at : at + 4]) if has_number else None
        start += first.size
    found, cut = 0, False
    while start >= 0 and not cut:
        frame = _Frame.at(content, start)
        if frame is None or frame.kind != first.kind:
            start = _next_frame(content, start, first.kind)
        elif start + frame.size > len(content):
            cut = True
        else:
            found += 1
            start += frame.size
    return MpegFrames(found, promised, first.samples, cut)


@dataclass(frozen=True)
class _Frame:
    kind: tuple[int, int]
    """The bits of its header that are the same in all frames of a file: version, layer, sample rate."""
    size: int
    """In bytes."""
    samples: int

    @classmethod
    def at(cls, content: bytes, offset: int) -> _Frame | None:
        """The frame whose header begins at `offset`; None where none does."""
        header = content[offset : offset + 4]
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
            return None
        version, kbits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
        if version == 1 or kbits in (0, 15) or rate == 3:
            return None
        samples = 1152 if version == 3 else 576
        bits = _MPEG_KBITS[3 if version == 3 else 2][kbits] * 1000
        size = samples // 8 * bits // _MPEG_RATES[version][rate] + (header[2] >> 1 & 1)
        return cls((header[1] & 0xFE, header[2] & 0x0C), size, samples)


def _next_frame(content: bytes, start: int, kind: tuple[int, int]) -> int:
    """Where, behind bytes that are none, the next two frames begin; -1 where none do."""
    while (start := content.find(b"\xff", start + 1)) >= 0:
        frame = _Frame.at(content, start)
        behind = None if frame is None else _Frame.at(content, start + frame.size)
        if frame is not None and behind is not None and frame.kind == behind.kind == kind:
            break
    return start
