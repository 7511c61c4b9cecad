"""The only frame of a file: its values, as they are stored or decompressed."""

import math
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.pixels import get_decoder
from pydicom.uid import UID, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless

from mlvicx_hf.common.errors import MissingExtraError

from .attributes import PixelHeader, RefusedError
from .codestreams import PLUGIN


def _options(header: PixelHeader) -> dict[str, Any]:
    return {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": header.samples,
        "planar_configuration": header.planar,
        "photometric_interpretation": header.photometric,
        "bits_allocated": header.allocated,
        "bits_stored": header.stored,
        "pixel_representation": int(header.signed),
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
        "raw": True,
        "allow_excess_frames": False,
        "correct_unused_bits": False,  # `PixelHeader.stored_values` does
    }


def uncompressed(dataset: Dataset, header: PixelHeader, syntax: UID) -> tuple[np.ndarray, str]:
    """Values of an uncompressed frame, [H, W] or [H, W, 3], and their photometric interpretation.

    Raises:
        RefusedError: there are too few or too many bytes of them.
    """
    element = dataset["PixelData"]
    if element.is_undefined_length:
        raise RefusedError("compressed PixelData without a transfer syntax that says how")
    bits = header.rows * header.columns * header.samples * header.allocated
    expected = math.ceil((bits * 2 // 3 if header.photometric == "YBR_FULL_422" else bits) / 8)
    found = len(element.value)
    if not expected <= found < 2 * expected:  # real files hold some padding; twice as much is another image
        raise RefusedError(
            f"{found} bytes of PixelData found; expected {expected} for {header.columns} × {header.rows} pixels of "
            f"{header.samples} × {header.allocated} bits"
        )
    options = _options(header) | {"pixel_vr": element.VR, "view_only": True}
    pixels, properties = get_decoder(syntax).as_array(element.value, **options)
    return pixels, str(properties["photometric_interpretation"])


def joined_frame(dataset: Dataset) -> bytes:
    """Join all fragments of the only frame. Skip the first item, an offset table that one frame does not need."""
    return b"".join(list(generate_fragments(dataset["PixelData"].value))[1:])


def decompress(frame: bytes, header: PixelHeader, syntax: UID) -> tuple[np.ndarray, str]:
    """Values of a compressed frame, [H, W] or [H, W, 3], and their photometric interpretation."""
    if syntax == JPEGExtended12Bit:  # 8 bits are baseline; pydicom gives 12 bits to gdcm only under the lossless name
        syntax = JPEGBaseline8Bit if header.allocated == 8 else JPEGLossless
    decoder = get_decoder(syntax)
    if PLUGIN[syntax] not in decoder.available_plugins:
        raise MissingExtraError(f'{syntax.name} needs python-gdcm: pip install ".[dicom]" in the repository')
    pixels, properties = decoder.as_array(
        encapsulate([frame], has_bot=False),
        **_options(header),
        decoding_plugin=PLUGIN[syntax],
    )
    return pixels, str(properties["photometric_interpretation"])
