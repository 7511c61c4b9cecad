"""Pictures and tables that show what a run did: loss curve, views, nearest neighbours, the quick start's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .augmentation import TwoViewAugmentation, view_draws
from .data.pictures import contact_sheet
from .image_processing_mlvicx import MLVICXImageProcessor
from .progress import progress_bar


def plot_loss_curve(metrics: Path, picture: Path, title: str = "") -> None:
    """Draw the losses of a run and the effective rank of its embeddings.

    Args:
        metrics: `metrics.jsonl` of the run.
        picture: PNG file to write.
        title: above the picture.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "mlvicx-hf[report]"') from error
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, ranks = figure.subplots(1, 2)
    for key, label in (("global_loss", "global, $L_G$"), ("multi_level_loss", "multi-level, $L_L$")):
        kept = [row for row in rows if key in row]
        losses.plot([row["step"] for row in kept], [row[key] for row in kept], label=label)
        rank = key.replace("loss", "embeddings_rankme")
        ranks.plot([row["step"] for row in kept], [row[rank] for row in kept], label=label)
    for axes, name in ((losses, "loss"), (ranks, "RankMe of a batch's embeddings")):
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def view_sheet(images: list[Image.Image], augment: TwoViewAugmentation, picture: Path, seed: int = 0) -> None:
    """Rows of three: an image and its two views.

    Args:
        images: grey squares of one size.
        augment: makes the views.
        picture: PNG file to write.
        seed: of the views.
    """
    batch = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in images]))[:, None]
    views = augment(batch, view_draws(seed, 0, range(len(images))))
    size = (augment.image_size, augment.image_size)
    columns = [np.stack([np.asarray(image.resize(size)) for image in images])]
    for view in views:
        gray = ((view[:, 0] * augment.std + augment.mean).clamp(0, 1) * 255).round()
        columns.append(gray.to(torch.uint8).numpy())
    tiles = [column[i] for i in range(len(images)) for column in columns]
    contact_sheet(tiles, 6, ["image", "view 1", "view 2"] * len(images)).save(picture)


@torch.no_grad()
def encode_images(model: nn.Module, processor: MLVICXImageProcessor, images: Any, batch_size: int = 64) -> Tensor:
    """Pooled features [N, C] of a column of images, in order, without random transforms."""
    model.eval()
    features = []
    loader = DataLoader(images, batch_size, collate_fn=list)
    with progress_bar(len(images), "encoding", "img") as bar:
        for batch in loader:
            pixels = processor([row["image"] for row in batch])["pixel_values"]
            features.append(model(pixels).pooler_output)
            bar.update(len(batch))
    return torch.cat(features)


def neighbour_sheet(features: Tensor, images: Any, picture: Path, rows: int = 6, neighbours: int = 5) -> None:
    """Rows of an image and the images nearest to it by cosine of their features.

    Args:
        features: [N, C].
        images: the N rows, with `image` and `patient_id`.
        picture: PNG file to write.
        rows: how many images are asked for, evenly spread over the data.
        neighbours: how many are shown for each.
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
