"""Synthetic chest radiographs, drawn while the cache is written: no data to download, every label known."""

from dataclasses import KW_ONLY, dataclass
from functools import partial

from ..options import check_choice, check_least
from ..synthetic.phantom import FINDINGS, MASKS, draw_phantom, phantom_labels
from .base import Collection, Drawing, Listing, Record

_SMALLEST = 32  # pixels; what `draw_phantom` can draw


@dataclass
class PhantomCollection(Collection):
    """Drawn radiographs of invented patients."""

    name = "phantom"
    source = "phantom (synthetic)"
    synthetic = True

    num_patients: int = 400
    images_per_patient: int = 3
    _: KW_ONLY
    size: int = 256  # side of the drawing in pixels
    seed: int = 0  # another seed gives other patients
    mask_names: str | None = None  # "lungs", "heart" or a finding, to draw its masks as well

    def __post_init__(self) -> None:
        check_least(1, num_patients=self.num_patients, images_per_patient=self.images_per_patient)
        if self.mask_names is not None:
            check_choice("mask_names", self.mask_names, MASKS)

    def read(self) -> Listing:
        """List the images. Their pixels are drawn later."""
        records = []
        for patient in range(self.num_patients):
            name, labels = f"phantom-{patient:06d}", phantom_labels(patient, seed=self.seed)
            for image in range(self.images_per_patient):
                draw = partial(draw_image, patient, image, max(_SMALLEST, self.size), self.seed, self.mask_names)
                records.append(Record(f"{name}-{image}", name, "PA", labels, draw=draw))
        return Listing(records, FINDINGS, mask_names=() if self.mask_names is None else (self.mask_names,))


def draw_image(patient: int, image: int, size: int, seed: int, mask: str | None = None) -> Drawing:
    """Draw the pixels of a phantom and one of its masks."""
    phantom = draw_phantom(patient, image, size=size, seed=seed)
    return Drawing(phantom.image, None if mask is None else phantom.masks[mask])
