"""Check what a compressed frame declares of itself, before a decoder uses it."""

import struct
from collections.abc import Iterator
from dataclasses import replace

from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEGTransferSyntaxes,
    RLELossless,
)

from .attributes import PixelHeader, RefusedError

# pydicom's plug-in for each compressed transfer syntax. All have permissive licences. Use one plug-in only: where one
# decoder refuses a damaged file, another may fill the gap with grey. Do not give unknown files to gdcm's JPEG 2000
# decoder, which is too old.
PLUGIN = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "gdcm",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "gdcm",
    JPEGLSNearLossless: "gdcm",
    JPEG2000Lossless: "pillow",
    JPEG2000: "pillow",
    RLELossless: "pydicom",
}
J2K_START = b"\xff\x4f\xff\x51"  # markers SOC and SIZ


def check_codestream(frame: bytes, header: PixelHeader, syntax: UID) -> tuple[bytes, PixelHeader]:
    """Compare the size that a compressed frame declares with the file's, before a decoder uses it.

    Returns:
        The bytes to decode, and the header with the bits of the decoded values.

    Raises:
        RefusedError: the sizes differ, or there is no such frame.
    """
    if syntax == RLELossless:
        count, size = header.samples * header.allocated // 8, header.rows * header.columns
        found = _rle_sizes(frame, 2 * size + 2)
        if len(found) != count or not size <= min(found) <= max(found) < 2 * size + 2:  # real files hold some padding
            raise RefusedError(f"RLE segments of {found} bytes or more found; expected {count} of {size}")
        return frame, header
    if syntax in JPEG2000TransferSyntaxes:
        frame = frame[max(0, frame.find(J2K_START)) :]  # without JP2 boxes, which declare sizes too
        stream = _j2k_size(frame)
    else:
        stream = _jpeg_size(frame)
        if syntax in JPEGTransferSyntaxes and PLUGIN[syntax] == "gdcm":
            frame = _bare_jpeg(frame)
    if stream is None:
        raise RefusedError(f"no {syntax.name} codestream found in PixelData")
    rows, columns, samples, bits = stream
    if (rows, columns, samples) != (header.rows, header.columns, header.samples) or bits > header.allocated:
        raise RefusedError(
            f"codestream of {columns} × {rows} pixels of {samples} × {bits} bits found; expected {header.columns} × "
            f"{header.rows} of {header.samples} × {header.allocated} or fewer"
        )
    allocated = 8 if bits <= 8 else 16
    stored = min(header.stored, allocated) if syntax in JPEGTransferSyntaxes else bits
    return frame, replace(header, allocated=allocated, stored=stored, high=stored - 1)  # decoders align to the right


def _rle_sizes(frame: bytes, limit: int) -> list[int]:
    """Count the bytes that each segment of an RLE frame becomes, up to a limit: 2 may become 128 (PS3.5 G.3-G.5)."""
    count, *starts = struct.unpack_from("<16I", frame)
    if not 0 < count <= 15:
        raise RefusedError("no RLE Lossless codestream found in PixelData")
    sizes, ends = [], [*starts[1:count], len(frame)]
    for position, end in zip(starts[:count], ends, strict=True):
        end, size = min(end, len(frame)), 0
        while position < end and size < limit:
            run = frame[position]
            position += 1
            if run < 128:
                size += min(run + 1, end - position)  # the last run may be cut
                position += run + 1
            elif run > 128 and position < end:
                size += 257 - run
                position += 1
        sizes.append(size)
    return sizes


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes of each segment of a JPEG or JPEG-LS codestream (ITU-T T.81 B.1), the image last.

    Raises:
        RefusedError: the codestream is damaged before the image.
    """
    position = 2
    while frame[:2] == b"\xff\xd8" and len(frame) >= position + 4 and frame[position] == 0xFF:
        marker = frame[position + 1]
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xDA:
            yield marker, frame[position:]
            return
        else:
            yield marker, frame[position:end]
            position = end
    raise RefusedError("no JPEG codestream found in PixelData")


def _is_frame_header(marker: int) -> bool:
    return marker == 0xF7 or (marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC))


def _jpeg_size(frame: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, samples and bits of the frame header of a JPEG or JPEG-LS codestream (ITU-T T.81 B.2.2)."""
    headers = [segment for marker, segment in _jpeg_segments(frame) if _is_frame_header(marker)]
    if len(headers) != 1:  # of several headers, decoders use different ones
        return None
    bits, rows, columns, samples = struct.unpack_from(">BHHB", headers[0], 4)
    return rows, columns, samples, bits


def _bare_jpeg(frame: bytes) -> bytes:
    """Remove comments and application data from a JPEG codestream: damage there makes gdcm abort the process."""
    needed = (0xC4, 0xCC, 0xDA, 0xDB, 0xDD)  # tables, restart interval and the image
    segments = (part for marker, part in _jpeg_segments(frame) if marker in needed or _is_frame_header(marker))
    return b"\xff\xd8" + b"".join(segments)


def _j2k_size(frame: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, samples and bits of the SIZ marker that a JPEG 2000 codestream starts with."""
    if not frame.startswith(J2K_START) or len(frame) < 43:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    (samples,) = struct.unpack_from(">H", frame, 40)
    return bottom - top, right - left, samples, (frame[42] & 0x7F) + 1
