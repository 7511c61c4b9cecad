"""What a classifier, a segmenter and an index say of one radiograph. The page shows it; nothing here knows the page."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import json_field, read_json
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import decode_gray, fit_square_gray
from mlvicx_hf.data.masks import foreground
from mlvicx_hf.encoders.inference import LoadedModel, infer, load
from mlvicx_hf.evaluation.explanation.explaining import grad_cam
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXForSemanticSegmentation
from mlvicx_hf.prediction.answers import Answers
from mlvicx_hf.prediction.prediction import note_on
from mlvicx_hf.prediction.search import LABEL_PREFIX, ImageIndex

MAX_UPLOAD = 100 * 2**20  # bytes
SHOWN_SIDE = 896  # pixels of the longer side of a picture on the page
EXPLANATIONS = "explanations.json"
WRITTEN_BY = "what `mlvicx explain --score` wrote"


class JudgedFinding(NamedTuple):
    """What the classifier says of one label."""

    name: str
    probability: float | None  # None if nothing calibrated it: beside calibrated ones it would mislead
    threshold: float | None  # from which on it counts as present
    band: tuple[float, float] | None  # within which the answer is "unsure"
    answer: str  # present, absent, unsure, or "" where there is no band
    pointing: str  # how often heat maps of the finding pointed at it when they were scored


class Neighbour(NamedTuple):
    """A known image."""

    row: int  # of the index
    cosine: float
    findings: str
    picture: Image.Image | None


@dataclass
class RadiographReading:
    """What is known of one radiograph."""

    gray: np.ndarray  # uint8 [H, W], as it is shown
    pixels: torch.Tensor  # [1, C, S, S], input of the classifier
    findings: list[JudgedFinding]  # the most probable first, those without a calibrated probability last
    answer: str  # of exclusive classes: the class, or "unsure"; else ""
    outlines: dict[str, np.ndarray]  # by structure, bool [H, W]: the pixels of its border
    neighbours: list[Neighbour]  # the most similar first
    note: str  # what raises doubt about the picture itself, mostly ""
    unlike: bool | None  # less similar to all known images than 95 % of the validation images; None: not known
    heat: dict[str, np.ndarray] = field(default_factory=dict)  # by finding, float [H, W] from 0 to 1


class Reader:
    """Reads radiographs with saved models.

    Args:
        model: folder or Hub name of a classifier.
        segmenter: of a segmenter, whose outlines are shown.
        index: folder that `mlvicx index` wrote with the same model.
        explanations: `explanations.json` of `mlvicx explain --score`; by default the one in the model's folder.
        device: of torch.
        top: number of similar images.

    Raises:
        MissingExtraError: without captum or matplotlib.
        UserError: models of other kinds, or files that do not fit one another.
        OSError: files that are absent or damaged.
    """

    def __init__(
        self,
        model: str,
        segmenter: str | None = None,
        index: str | Path | None = None,
        explanations: str | Path | None = None,
        device: str | torch.device = "cpu",
        top: int = 5,
    ) -> None:
        require("the page", "demo", "captum", "matplotlib")
        self.classifier = load(model, device=device, expected=MLVICXForImageClassification)
        self.classifier.model.requires_grad_(False)  # saves heat maps the gradients of the weights
        self.segmenter = None
        if segmenter is not None:
            self.segmenter = load(segmenter, device=device, expected=MLVICXForSemanticSegmentation)
        self.index = None if index is None else ImageIndex(index)
        if self.index is not None:
            self.index.check_model(self.classifier)
        config = self.classifier.model.config
        exclusive = config.problem_type == "single_label_classification"
        self.answers = Answers(self.classifier.labels, config.calibration, exclusive)
        self.pointing = _read_pointing(self.classifier, explanations)
        self.top = top
        self._lock = threading.Lock()  # heat maps hook into the model, which several people share

    def read(self, content: bytes) -> RadiographReading:
        """Read the content of an image file.

        Raises:
            UnreadableImageError: it is no image, damaged or too large; `reason` says which, without the file's name.
        """
        if len(content) > MAX_UPLOAD:
            raise UnreadableImageError("the file", f"larger than {MAX_UPLOAD // 2**20} MB")
        return self.read_image(decode_gray(content, "the file"))

    def read_image(self, image: Image.Image) -> RadiographReading:
        """Read a picture of mode "L"."""
        shown = image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        pixels = self.classifier.processor(image)["pixel_values"]
        with self._lock:
            logits, _ = infer(self.classifier, pixels, embed=False)
            outlines = self._outline(image, shown.size)
            neighbours, unlike = self._find_similar(image)
        findings, answer = self._judge(logits[0])
        note = note_on(image)
        return RadiographReading(np.asarray(shown), pixels, findings, answer, outlines, neighbours, note, unlike)

    def heat_map(self, reading: RadiographReading, finding: str) -> np.ndarray:
        """Where the classifier looks for a finding: Grad-CAM, float [H, W] from 0 to 1, 0 everywhere if nowhere."""
        if finding not in reading.heat:
            target, size = self.classifier.labels.index(finding), self.classifier.processor.image_size
            with self._lock:
                square = grad_cam(self.classifier.model, reading.pixels.to(self.classifier.model.device), target, size)
            output = SemanticSegmenterOutput(logits=square[None])
            found = self.classifier.processor.post_process_semantic_segmentation(output, [reading.gray.shape], True)
            heat = found[0]["segmentation_scores"][0].clamp(min=0).numpy()
            reading.heat[finding] = heat / max(heat.max(), np.finfo(np.float32).tiny)
        return reading.heat[finding]

    def _judge(self, logits: torch.Tensor) -> tuple[list[JudgedFinding], str]:
        """Findings of logits [L], the most probable first, and the answer if they exclude one another."""
        config, labels, answers = self.classifier.model.config, self.classifier.labels, self.answers
        probabilities = answers.probabilities(logits)
        cells = answers.cells(probabilities)
        thresholds = (config.decision_thresholds or {}).get("values", {})
        bands = {} if answers.exclusive or answers.bands is None else answers.bands
        found = []
        for number, name in enumerate(labels):
            value = None if name in answers.uncalibrated else probabilities[number]
            answer = "" if answers.exclusive else cells[number]
            pointing = self.pointing.get(name, "")
            found.append(JudgedFinding(name, value, thresholds.get(name), bands.get(name), answer, pointing))
        found.sort(key=lambda each: (each.probability is None, -(each.probability or 0)))
        return found, cells[0] if answers.exclusive else ""

    def _outline(self, image: Image.Image, shown: tuple[int, int]) -> dict[str, np.ndarray]:
        """Borders of the segmenter's structures, at the size (width, height) that is shown."""
        if self.segmenter is None:
            return {}
        from scipy.ndimage import binary_erosion

        logits, _ = infer(self.segmenter, self.segmenter.processor(image)["pixel_values"], embed=False)
        output = SemanticSegmenterOutput(logits=logits)
        classes = self.segmenter.processor.post_process_semantic_segmentation(output, [shown[::-1]])[0].cpu().numpy()
        masks = {name: classes == value for name, value in foreground(self.segmenter.labels).items()}
        return {name: mask & ~binary_erosion(mask, iterations=2) for name, mask in masks.items()}

    def _find_similar(self, image: Image.Image) -> tuple[list[Neighbour], bool | None]:
        if self.index is None:
            return [], None
        square = fit_square_gray(image, *self.index.square)  # as the indexed images are
        _, embeddings = infer(self.classifier, self.classifier.processor(square)["pixel_values"], embed=True)
        cosines, rows = (found[0].tolist() for found in self.index.nearest(embeddings, self.top))
        found = [
            Neighbour(row, cosine, self._findings_of(row), self.index.picture(row))
            for cosine, row in zip(cosines, rows, strict=True)
        ]
        threshold = self.index.unlike_threshold
        return found, None if threshold is None else max(cosines, default=-1) < threshold

    def _findings_of(self, row: int) -> str:
        """What is known of an indexed image."""
        assert self.index is not None
        labels = {name: self.index.items[LABEL_PREFIX + name].iloc[row] for name in self.index.label_names}
        if all(map(math.isnan, labels.values())):
            return "nothing known"
        return ", ".join(name for name, value in labels.items() if value == 1) or "none of its labels"


def _read_pointing(loaded: LoadedModel, explanations: str | Path | None) -> dict[str, str]:
    """Say of each label how often the maximum of its heat maps lay in the finding, if that was measured.

    Raises:
        UserError: a file about another model, or about another level than the page shows.
    """
    path = Path(loaded.source, EXPLANATIONS) if explanations is None else Path(explanations)
    if explanations is None and not path.is_file():
        return {}
    content = read_json(path)
    models = json_field(content, "models", dict, path, WRITTEN_BY)
    findings = json_field(content, "findings", dict, path, WRITTEN_BY)
    weights = {name: json_field(about, "weights_sha256", dict, path, WRITTEN_BY) for name, about in models.items()}
    names = [name for name, hashes in weights.items() if hashes == loaded.weights]
    if not names:
        raise UserError(f"{path} is about {', '.join(models)}; expected heat maps of {loaded.source}")
    level, last = json_field(models[names[0]], "level", int, path, WRITTEN_BY), len(loaded.model.mlvicx.context) - 1
    if level != last:
        raise UserError(f"{path} is about maps of level {level}; expected the last one, {last}, which the page shows")
    split = json_field(content, "data.split", str, path, WRITTEN_BY)
    tolerance = json_field(content, "settings.tolerance", (int, float), path, WRITTEN_BY)
    within = f", within {tolerance:g} pixels" if tolerance else ""
    sentences = {}
    for finding, about in findings.items():
        if isinstance(about.get("scores"), Mapping):
            share, chance = (about["scores"][names[0]]["pointing"][key] for key in ("mean", "chance"))
            label = about.get("labels", {}).get(names[0], finding)  # the cache may call it otherwise
            images = f"{about['located']} {split} images{within}"
            sentences[label] = f"points at the finding in {share:.0%} of {images} (chance {chance:.0%})"
    return sentences
