"""What commands that run a saved model share: options, how their process starts, and what they print of images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser


def add_inference_options(made: CommandParser, batch_size: int, workers: bool = True) -> None:
    """Add the advanced options of a forward pass, with this default size of a batch."""
    add = made.advanced.add_argument
    add("--batch_size", type=int, default=batch_size, metavar="N", help=f"images a forward pass (default {batch_size})")
    if workers:
        add("--num_workers", type=int, default=2, metavar="N", help="processes that read images (default 2)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")


def start_inference(device: str | None) -> None:
    """Hide the bars of loading files; give torch its threads if the device of this name, or the default, is a CPU."""
    import transformers

    from mlvicx_hf.common.machine import choose_device, use_cpu_threads

    transformers.utils.logging.disable_progress_bar()
    if choose_device(device).type == "cpu":
        use_cpu_threads()


def print_images(output: Path, record: Mapping[str, Any]) -> None:
    """Print how many images the table `output` has by its record, what was skipped, and how many could not be read."""
    from mlvicx_hf.data.images.pixels import describe_skipped

    total, errors, skipped = record["images"], record["errors"], describe_skipped(record["skipped"])
    print(f"{output}: {total - errors} of {total} images")
    if skipped:
        print(f"note: {skipped}")
    if noted := record.get("noted"):
        print(f"note: {noted} of them raise doubt; column note of {output} says why")
    if errors:
        text = f"warning: {errors} of {total} images could not be read; column error of {output} says why"
        print(text, file=sys.stderr)
