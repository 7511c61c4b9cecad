"""Draw the nearest neighbours of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from mlvicx_hf.data.images.pictures import contact_sheet


def neighbour_sheet(features: Tensor, images: Any, picture: Path, rows: int = 6, neighbours: int = 5) -> None:
    """Draw a PNG file: rows of an image and the images nearest to it by the cosine of their features [N, C].

    The rows are evenly spread over the data, whose N rows have `image` and `patient_id`.
    """
    neighbours = min(neighbours, len(features) - 1)
    queries = np.linspace(0, len(features) - 1, min(rows, len(features))).astype(int)
    index = NearestNeighbors(n_neighbors=neighbours + 1, metric="cosine").fit(features.numpy())
    distances, nearest = index.kneighbors(features[queries].numpy())
    tiles, titles = [], []
    for query, near, far in zip(queries, nearest, distances, strict=True):
        others = [(i, d) for i, d in zip(near, far, strict=True) if i != query][:neighbours]
        for i, distance in [(query, 0.0), *others]:
            row = images[int(i)]
            same = row["patient_id"] == images[int(query)]["patient_id"]
            title = "image" if i == query else f"cos {1 - distance:.3f}" + (", same patient" if same else "")
            tiles.append(np.asarray(row["image"].resize((128, 128)), dtype=np.uint8))
            titles.append(title)
    contact_sheet(tiles, neighbours + 1, titles).save(picture)
