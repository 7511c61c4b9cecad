"""What a run is pretrained on: images of a cache or a stream, and the views that are drawn of them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from accelerate import Accelerator

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.options import check_choice
from mlvicx_hf.data.reading.sampling import EpochBatches, PatientPartners, PretrainingImages, choose_views
from mlvicx_hf.data.reading.streaming import Stream, StreamBatches, open_stream
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor

from .arguments import DataArguments, PretrainingArguments
from .batches import PlannedBatch, Planner, StreamLoader, cache_loader
from .views import TwoViewAugmentation


class PretrainingData(NamedTuple):
    """Images to pretrain on; `side` in pixels."""

    batches: EpochBatches | StreamBatches
    loader: Iterable[PlannedBatch]
    manifest: dict[str, Any]
    side: int
    pair_share: float | None = None


def load_data(
    data: DataArguments, arguments: PretrainingArguments, accelerator: Accelerator, planner: Planner
) -> PretrainingData:
    """Open a cache or a stream, and say what of it is left out.

    Raises:
        UserError: arguments that do not fit the data or one another.
    """
    pin_memory = accelerator.device.type == "cuda"
    place = (arguments.seed, accelerator.process_index, accelerator.num_processes)
    if data.streaming:
        stream = _load_stream(data)
        left_out = stream.left_out
        options = {"num_workers": data.num_workers, "shuffle_buffer": data.shuffle_buffer}
        reader = StreamBatches(stream, arguments.batch_size, *place, **options)
        found = PretrainingData(reader, StreamLoader(reader, planner, pin_memory), stream.manifest, stream.size)
        if accelerator.is_main_process:
            print(
                f"a stream leaves out up to {reader.most_unreadable} unreadable images a process; more end the run",
                flush=True,
            )
            if stream.shards.lengths is None:
                print("rows of each file not known: in an epoch some images come twice, and others wait", flush=True)
    else:
        images, manifest, left_out = _load_images(data)
        patients = images["patient_id"][:] if data.patient_balanced else None
        batches = EpochBatches(len(images), arguments.batch_size, *place, patients)
        rows = PretrainingImages(images.select_columns("image"))
        partners = None if data.positives == "same_image" else _partners(data, images, arguments.seed)
        loader = cache_loader(rows, batches, planner, data.num_workers, pin_memory, partners)
        share = None if partners is None else partners.share
        found = PretrainingData(batches, loader, manifest, manifest["size"], share)
        if share is not None and accelerator.is_main_process:
            print(f"positives={data.positives}: {share:.1%} of the images have another one", flush=True)
        if data.views == "frontal" and accelerator.is_main_process:
            _count_unknown_views(images)
    if left_out != 0 and accelerator.is_main_process:
        number = "lateral images are" if left_out is None else f"{left_out} lateral images are"
        print(f"{number} left out (--views all takes them)", flush=True)
    return found


def _count_unknown_views(images: Any) -> None:
    """Say that images of unknown view count as frontal, and how many there are."""
    unknown = sum(view == "UNKNOWN" for view in images["view"][:])
    if unknown:
        print(f"{unknown} images of unknown view count as frontal (the column view tells them apart)", flush=True)


def _load_images(data: DataArguments) -> tuple[Any, dict[str, Any], int]:
    """Rows of a cache, its manifest, and how many lateral images are left out."""
    for name in ("num_images", "image_column"):
        if getattr(data, name) is not None:
            raise UserError(f"{name}={getattr(data, name)} found without streaming; expected --streaming as well")
    cache = load_cache(data.dataset)
    check_choice("split", data.split, cache.datasets)
    images, left_out = choose_views(cache.datasets[data.split], data.views)
    limit = data.max_train_samples
    if limit is not None:
        images = images.select(range(min(limit, len(images))))
    return images, cache.manifest, left_out


def _partners(data: DataArguments, images: Any, seed: int) -> PatientPartners:
    views = images["view"][:] if data.positives == "same_patient_same_view" else None
    partners = PatientPartners(images["patient_id"][:], views, seed)
    if not partners.share:
        raise UserError(f"positives={data.positives} found; no patient of {data.dataset} has two such images")
    return partners


def _load_stream(data: DataArguments) -> Stream:
    if data.patient_balanced:
        raise UserError(
            "patient_balanced found with streaming, which reads in order; expected --patient_balanced false"
        )
    if data.positives != "same_image":
        raise UserError(f"positives={data.positives} found with streaming, which reads in order; expected same_image")
    if data.max_train_samples is not None:
        raise UserError(f"max_train_samples={data.max_train_samples} found with streaming; expected --num_images")
    return open_stream(
        data.dataset,
        data.split,
        views=data.views,
        num_images=data.num_images,
        size=data.cache_size,
        image_column=data.image_column,
    )


def create_augmentation(data: DataArguments, processor: MLVICXImageProcessor) -> TwoViewAugmentation:
    """The random views that the arguments describe, as input for models of this processor."""
    return TwoViewAugmentation(
        image_size=processor.image_size,
        crop_area=(data.crop_area[0], data.crop_area[1]),
        flip=data.flip,
        flip_together=data.positives != "same_image",
        rotation=data.rotation,
        jitter=data.jitter,
        brightness=data.brightness,
        contrast=data.contrast,
        blur=(data.blur[0], data.blur[1]),
        solarize=(data.solarize[0], data.solarize[1]),
        mean=processor.image_mean,
        std=processor.image_std,
        num_channels=processor.num_channels,
    )
