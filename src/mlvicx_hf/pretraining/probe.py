"""Measure the features of a frozen encoder in seconds: nearest neighbours and a linear probe.

The probes are fitted on the train split of a labelled cache and scored on its validation split. The test split is
never read. Nothing is random: the same encoder and cache give the same scores, and random generators do not move.
"""

from pathlib import Path

import numpy as np
import torch

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.splits import first_patients
from mlvicx_hf.encoders.features import encode, prepared_images
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel
from mlvicx_hf.scoring.labels import has_both_values, score_labels
from mlvicx_hf.scoring.probes import knn_scores, linear_scores

# Most images of a split. Of more, those of the patients whose hash comes first are taken.
LIMITS = {"train": 2000, "validation": 1000}


class Probe:
    """kNN and linear probe of an encoder on a labelled cache.

    Args:
        path: of the cache; the splits train and validation are used.
        processor: of the model.

    Raises:
        FileNotFoundError: no cache.
        UserError: no labels, a split that is missing, or no label that both splits know with both values.
    """

    def __init__(self, path: str | Path, processor: MLVICXImageProcessor) -> None:
        cache = load_cache(path, ["train", "validation"])
        cache.require_labels()
        self.names, self.processor = cache.label_names, processor
        known = {split: cache.datasets[split].select(cache.labelled(split)) for split in LIMITS}
        self.images = {
            split: images.select(first_patients(images["patient_id"][:], LIMITS[split], seed=0))
            for split, images in known.items()
        }
        shape = (-1, len(self.names))
        self.labels = {name: np.array(x["labels"], dtype=np.float64).reshape(shape) for name, x in self.images.items()}
        fit, scored = self.labels["train"], self.labels["validation"]
        self.usable = [
            i for i in range(len(self.names)) if has_both_values(fit[:, i]) and has_both_values(scored[:, i])
        ]
        if not self.usable:
            raise UserError(f"{path}: no label has both values in train and in validation, so nothing can be probed")
        patients = [np.array(self.images[split]["patient_id"], dtype=object) for split in ("validation", "train")]
        self.same_patient = torch.from_numpy((patients[0][:, None] == patients[1][None]).astype(bool))

    def __call__(self, encoder: MLVICXModel, device: torch.device | str = "cpu") -> dict[str, float]:
        """Score an encoder as it is now; it is left in the mode that it was in.

        Returns:
            `probe_knn_auroc` and `probe_linear_auroc`, means over the labels that both splits know with both values,
            and `probe_knn_auroc/LABEL`, `probe_linear_auroc/LABEL`. Exclusive classes count one against the rest.
        """
        prepared = (prepared_images(self.images[split], self.processor) for split in ("train", "validation"))
        known, asked = (encode(encoder, images, device=device, show=False)["features"] for images in prepared)
        names = [self.names[i] for i in self.usable]
        fit, truth = (self.labels[split][:, self.usable] for split in ("train", "validation"))
        found = {
            "knn": knn_scores(known, fit, asked, self.same_patient),
            "linear": linear_scores(known, fit, asked),
        }
        scalars: dict[str, float] = {}
        for kind, scores in found.items():
            auroc = score_labels(scores, truth, names)
            scalars[f"probe_{kind}_auroc"] = auroc["auroc_macro"]
            scalars |= {f"probe_{kind}_auroc/{name}": value for name, value in auroc["auroc"].items()}
        return scalars
