"""Colours to luminance."""

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from .attributes import COLOURS, PixelHeader, RefusedError
from .lookup_tables import apply_lut, lut_entries


def luminance(pixels: np.ndarray, photometric: str, bits: int) -> np.ndarray:
    """Colours [H, W, 3] of `bits` bits to luminance [H, W]."""
    if bits != 8:
        pixels = (pixels * np.float32(255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
    if photometric.startswith("YBR"):
        return np.ascontiguousarray(pixels[..., 0])
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))


def palette_luminance(dataset: Dataset, header: PixelHeader) -> np.ndarray:
    """Luminance of each stored value of a palette image: [2**container]."""
    if "RedPaletteColorLookupTableData" not in dataset:
        raise RefusedError("no palette found; segmented ones are not supported")
    values, channels = header.stored_values(), []
    for colour in COLOURS:
        keyword = f"{colour}PaletteColorLookupTable"
        channels.append(apply_lut(values, *lut_entries(dataset, f"{keyword}Descriptor", f"{keyword}Data", dataset)))
    colours = np.stack(channels, axis=-1)[None]
    if colours.max() > 255:
        return luminance(colours, "RGB", 16)[0]
    return luminance(colours.astype(np.uint8), "RGB", 8)[0]
