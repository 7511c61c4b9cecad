"""Contact sheets: rows and columns of grey images on one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

MARGIN = 4
TITLE_LINE = 12


def contact_sheet(images: Sequence[np.ndarray], columns: int, titles: Sequence[str] | None = None) -> Image.Image:
    """Lay grey images out in rows, each under its title.

    Args:
        images: uint8 images [H, W], one at least, all of the same shape.
        columns: number of images in a row.
        titles: one string for each image, drawn above it; lines are separated by "\\n".

    Returns:
        A grey (mode "L") sheet.
    """
    height, width = images[0].shape
    title_height = TITLE_LINE * max((title.count("\n") + 1 for title in titles), default=0) if titles else 0
    cell_height, cell_width = height + title_height + MARGIN, width + MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("L", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), 255)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = MARGIN + (index % columns) * cell_width
        top = MARGIN + (index // columns) * cell_height
        if titles is not None:
            draw.multiline_text((left, top - 1), titles[index], fill=0, font_size=10, spacing=1)
        sheet.paste(Image.fromarray(image), (left, top + title_height))
    return sheet
