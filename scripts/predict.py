#!/usr/bin/env python
"""Run a saved model on image files: probabilities and decisions, masks, or embeddings.

    python scripts/predict.py --model runs/frozen --input radiographs --output predictions/out.csv
    python scripts/predict.py --model runs/lungs --input radiographs --output predictions/lungs.csv --masks lung_masks
    python scripts/predict.py --model runs/first --input a.png b.png --output out.csv --embeddings out.safetensors

Beside the table a record of the same name (.json) says which model and code made it. Research use only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

from mlvicx_hf.common.errors import run
from mlvicx_hf.common.machine import choose_device, use_cpu_threads
from mlvicx_hf.prediction.prediction import predict


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of a saved model")
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="images, and folders of images")
    parser.add_argument("--output", required=True, type=Path, help="table, one row an image (.csv)")
    parser.add_argument("--embeddings", type=Path, help="embeddings of the images (.safetensors or .parquet)")
    parser.add_argument("--masks", type=Path, help="folder of a segmenter's masks, absent or empty")
    parser.add_argument("--batch_size", type=int, default=32, help="images a forward pass (default 32)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read files (default 2)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier outputs once the new are complete")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    """Predict."""
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()  # of loading a file
    if choose_device(arguments.device).type == "cpu":
        use_cpu_threads()
    record = predict(
        arguments.model,
        arguments.input,
        arguments.output,
        embeddings=arguments.embeddings,
        masks=arguments.masks,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    total, errors = record["images"], record["errors"]
    print(f"{arguments.output}: {total - errors} of {total} images")
    if errors:
        print(
            f"warning: {errors} of {total} images could not be read; column error of {arguments.output} says why",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
