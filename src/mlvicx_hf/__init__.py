"""MLVICX self-supervised representation learning for chest X-rays (arXiv 2403.11504) in the Hugging Face ecosystem.

Importing the package registers its classes, so that `AutoModel.from_pretrained("org/mlvicx-resnet18")` finds them.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from .configuration_mlvicx import MLVICXConfig
from .image_processing_mlvicx import MLVICXImageProcessor
from .modeling_mlvicx import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXModel,
    MLVICXPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register("mlvicx", MLVICXConfig)
AutoModel.register(MLVICXConfig, MLVICXModel)
AutoModelForPreTraining.register(MLVICXConfig, MLVICXForPreTraining)
AutoModelForImageClassification.register(MLVICXConfig, MLVICXForImageClassification)
AutoModelForSemanticSegmentation.register(MLVICXConfig, MLVICXForSemanticSegmentation)
AutoBackbone.register(MLVICXConfig, MLVICXBackbone)
AutoImageProcessor.register(MLVICXConfig, image_processor_classes={"torchvision": MLVICXImageProcessor})

__all__ = [
    "MLVICXBackbone",
    "MLVICXConfig",
    "MLVICXForImageClassification",
    "MLVICXForPreTraining",
    "MLVICXForSemanticSegmentation",
    "MLVICXImageProcessor",
    "MLVICXModel",
    "MLVICXPreTrainedModel",
]
