"""How hard are the synthetic radiographs? AUROC of a logistic regression on thumbnails and of a small network.

The first should stay near chance: brightness and position say little. The second should not: the findings are visible.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from mlvicx_hf.data.synthetic.phantom import FINDINGS, Phantom, draw_phantom

THUMBNAIL = 16


def draw_patient(patient: int, images_per_patient: int, size: int, seed: int) -> list[Phantom]:
    """All pictures of one patient."""
    return [draw_phantom(patient, image, size=size, seed=seed) for image in range(images_per_patient)]


def draw_all(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, S, S], labels [N, 5] and patient numbers [N]."""
    draw = partial(
        draw_patient, images_per_patient=arguments.images_per_patient, size=arguments.size, seed=arguments.seed
    )
    with ProcessPoolExecutor(arguments.num_proc) as pool:
        patients = list(pool.map(draw, range(arguments.num_patients), chunksize=8))
    phantoms = [phantom for patient in patients for phantom in patient]
    labels = np.array([phantom.labels for phantom in phantoms])
    groups = np.repeat(np.arange(arguments.num_patients), arguments.images_per_patient)
    return np.stack([phantom.image for phantom in phantoms]), labels, groups


def score_thumbnails(images: np.ndarray, labels: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Test probabilities [M, 5] of one standardized logistic regression for each finding."""
    small = [Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image, dtype=np.float64).ravel() for image in small])
    scores = []
    for column in range(labels.shape[1]):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model.fit(pixels[is_train], labels[is_train, column])
        scores.append(model.predict_proba(pixels[~is_train])[:, 1])
    return np.stack(scores, axis=1)


class SmallNetwork(nn.Module):
    """Five convolutions; the largest responses are pooled beside the mean ones, since nodules are small."""

    def __init__(self, num_labels: int, widths: tuple[int, ...] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if after != widths[-1] else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2 * widths[-1], num_labels)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 1, S, S] to logits [B, num_labels]."""
        maps = self.features(pixels)
        return self.classifier(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))


def score_network(
    images: np.ndarray, labels: np.ndarray, is_train: np.ndarray, epochs: int, seed: int, batch_size: int = 32
) -> np.ndarray:
    """Test probabilities [M, 5] after training on all findings together."""
    torch.manual_seed(seed)
    pixels = torch.from_numpy(images).float().div(255).sub(0.45).div(0.3).unsqueeze(1)
    targets = torch.from_numpy(labels).float()
    train = torch.from_numpy(np.flatnonzero(is_train))
    model = SmallNetwork(labels.shape[1])
    steps = epochs * (len(train) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(batch_size)[: len(train) // batch_size]:
            loss = nn.functional.binary_cross_entropy_with_logits(model(augment(pixels[batch])), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        test = pixels[torch.from_numpy(~is_train)]
        return torch.cat([model(part).sigmoid() for part in test.split(64)]).numpy()


def augment(pixels: Tensor) -> Tensor:
    """Shift each batch by a few pixels, mirror half of its pictures."""
    reach = pixels.shape[-1] // 16
    shifts = torch.randint(-reach, reach + 1, (2,)).tolist()
    mirrored = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels).roll(shifts, dims=(2, 3))


def area_under_curves(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC of every finding and their mean."""
    areas = {name: float(roc_auc_score(labels[:, i], scores[:, i])) for i, name in enumerate(FINDINGS)}
    return {**areas, "macro": float(np.mean(list(areas.values())))}


def _parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_patients", type=int, default=800, help="a quarter of them are held out")
    parser.add_argument("--images_per_patient", type=int, default=3)
    parser.add_argument("--size", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--output", choices=("table", "json"), default="table")
    return parser.parse_args()


def main() -> None:
    """Draw, fit both, print."""
    arguments = _parse()
    images, labels, groups = draw_all(arguments)
    is_train = groups < 0.75 * arguments.num_patients
    results = {
        "prevalence": dict(zip(FINDINGS, labels.mean(axis=0).round(3).tolist(), strict=True)),
        "mean_brightness": area_under_curves(labels, np.repeat(images.mean(axis=(1, 2))[:, None], len(FINDINGS), 1)),
        "thumbnail_regression": area_under_curves(labels[~is_train], score_thumbnails(images, labels, is_train)),
        "small_network": area_under_curves(
            labels[~is_train], score_network(images, labels, is_train, arguments.epochs, arguments.seed)
        ),
    }
    if arguments.output == "json":
        print(json.dumps({"images": len(images), "train_images": int(is_train.sum()), **results}, indent=2))
        return
    print(f"{len(images)} synthetic images, {is_train.sum()} to train, AUROC on held-out patients")
    for name, row in results.items():
        print(f"{name:22s}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
