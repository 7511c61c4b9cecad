#!/usr/bin/env python
"""Convert the authors' checkpoint, or ImageNet weights of a plain ResNet, to a folder for `from_pretrained`.

python scripts/convert_official_checkpoint.py resnet18_nih_64_300.pth models/mlvicx-official
python scripts/convert_official_checkpoint.py resnet18-imagenet.safetensors models/resnet18-grey
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.encoders.conversion import main

if __name__ == "__main__":
    run(main)
