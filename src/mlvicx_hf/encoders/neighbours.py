"""Draw the nearest neighbours of images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlvicx_hf.data.images.pictures import contact_sheet
from mlvicx_hf.scoring.neighbours import nearest_rows


def neighbour_sheet(features: Tensor, images: Any, picture: Path) -> None:
    """Draw a PNG file: six rows of an image and the five nearest to it by the cosine of their features [N, C].

    The six are evenly spread over the data, whose N rows have `image` and `patient_id`.
    """
    neighbours = min(5, len(features) - 1)
    queries = np.linspace(0, len(features) - 1, min(6, len(features))).astype(int)
    itself = (torch.arange(len(features)), torch.from_numpy(queries))
    cosines, nearest = nearest_rows(nn.functional.normalize(features, dim=1), features[queries], neighbours, itself)
    tiles, titles = [], []
    for query, near, cosine in zip(queries, nearest.tolist(), cosines.tolist(), strict=True):
        for i, value in [(query, 1.0), *zip(near, cosine, strict=True)]:
            row = images[int(i)]
            same = row["patient_id"] == images[int(query)]["patient_id"]
            title = "image" if i == query else f"cos {value:.3f}" + (", same patient" if same else "")
            tiles.append(np.asarray(row["image"].resize((128, 128)), dtype=np.uint8))
            titles.append(title)
    contact_sheet(tiles, neighbours + 1, titles).save(picture)
