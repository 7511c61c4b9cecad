"""The MLVICX models, as they travel to the Hub. Importing this room registers them with transformers' Auto classes."""

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
