#!/usr/bin/env python
"""Try one network of each family of timm as a backbone, without values, and write the table of the documentation.

python tools/backbone_families.py docs/reference/backbones.md
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import timm
import torch

from mlvicx_hf.common.text import markdown_table
from mlvicx_hf.models.backbones_mlvicx import create_backbone, find_taps, is_plain
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig, create_features

TEXT = """# Backbones

One network of every family of [timm](https://github.com/huggingface/pytorch-image-models) {version}, tried without
values by `tools/backbone_families.py` at timm's size of that network, with one channel. Of {offered} families that
offer the maps of several levels (`features_only`), {works} work.

Context bottlenecks stand **between** the layers, as in the paper, where a level is the output of a layer; the layers
behind it then see the refined map. Where a level is made of several outputs, or where the order of its tokens is not
known, only the **taps** are refined: the layers behind see the plain map, and the aggregation, the pooled features and
the decoder see the refined ones. The configuration says which (`context_placement`). Plain transformers give four
levels, at even depths.

{table}

Families without `features_only`, which cannot be backbones: {without}.
"""


def main() -> None:
    """Try them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    warnings.simplefilter("ignore")
    rows, without = [], []
    for family in timm.list_modules():
        row = try_family(family)
        if row is None:
            without.append(family)
        else:
            rows.append([family, *row])
            print(*rows[-1], flush=True)
    works = sum(row[2] != "refused" for row in rows)
    text = TEXT.format(
        version=timm.__version__,
        offered=len(rows),
        works=works,
        table=markdown_table(["family", "network tried", "context", "levels, or the reason"], rows),
        without=", ".join(without) or "none",
    )
    page.write_text(text, encoding="utf-8")


def try_family(family: str) -> list[str] | None:
    """Network, placement and levels, or the reason why it is refused; None where no network has features."""
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                create_features(name, in_chans=1)
        except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError, NotImplementedError):
            continue
        default = timm.get_pretrained_cfg(name)
        size = 224 if default is None else default.input_size[-1]
        try:
            with torch.device("meta"):
                backbone = create_backbone(MLVICXConfig(backbone=name, image_size=size))
            between = is_plain(backbone) or find_taps(name, 1, size) is not None
        except ValueError as error:
            return [name, "refused", str(error)]
        info = backbone.feature_info
        levels = ", ".join(f"{c} at 1/{r}" for c, r in zip(info.channels(), info.reduction(), strict=True))
        return [name, "between" if between else "taps", levels]
    return None


if __name__ == "__main__":
    main()
