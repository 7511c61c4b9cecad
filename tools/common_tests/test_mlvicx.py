"""What transformers' common tests ask of a model, for ours. `__main__.py` puts this file beside them and runs it."""

# ruff: noqa: D101, D102 - unittest's own way, as transformers has it
from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.test_backbone_common import BackboneTesterMixin  # type: ignore[import-not-found]  # of transformers
from tests.test_configuration_common import ConfigTester  # type: ignore[import-not-found]
from tests.test_image_processing_common import (  # type: ignore[import-not-found]
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXConfig,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
    MLVICXModel,
)

SIZE, LABELS = 64, 3


class Tester:
    """Tiny models and their inputs."""

    def __init__(self, parent: Any, batch_size: int = 4, is_training: bool = True) -> None:
        self.parent, self.batch_size, self.is_training = parent, batch_size, is_training
        self.num_hidden_layers = 2  # the smallest backbone has four stages, but is small
        self.num_labels = LABELS

    def get_config(self) -> MLVICXConfig:
        return MLVICXConfig(
            backbone="test_resnet",
            image_size=SIZE,
            expander_dims=[32, 32],
            aggregation_channels=16,
            aggregation_size=2,
            id2label={i: f"LABEL_{i}" for i in range(LABELS)},
            decoder_hidden_sizes=[32, 16, 8, 8, 8],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MLVICXConfig, dict[str, Any]]:
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 1, SIZE, SIZE)}


class Models(ModelTesterMixin):
    all_model_classes: Any = ()
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(
            self,
            MLVICXConfig,
            has_text_modality=False,
            common_properties=["num_channels", "hidden_sizes", "hidden_size"],
        )

    @unittest.skip("images have no embeddings, as in transformers' own ResNet")
    def test_model_get_set_embeddings(self) -> None:
        pass

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_hidden_states_output(self) -> None:
        """As in transformers' own ResNet: maps have no sequence."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            views = 2 if model_class is MLVICXForPreTraining else 1
            for output in (
                model_class(config).eval()(**self._prepare_for_class(inputs, model_class), output_hidden_states=True),
                model_class(type(config)(**config.to_dict() | {"output_hidden_states": True})).eval()(
                    **self._prepare_for_class(inputs, model_class)
                ),
            ):
                assert len(output.hidden_states) == 5 * views
                assert output.hidden_states[0].shape[-2:] == (SIZE // 2, SIZE // 2)

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        pixels = inputs["pixel_values"]
        if model_class is MLVICXForPreTraining and "view_1" not in inputs:
            return {"view_1": pixels.clone(), "view_2": pixels.flip(-1)}
        made = dict(inputs)
        if return_labels and model_class is MLVICXForImageClassification:
            made["labels"] = torch.zeros(len(pixels), LABELS)
        if return_labels and model_class is MLVICXForSemanticSegmentation:
            made["labels"] = torch.zeros(len(pixels), SIZE, SIZE, dtype=torch.long)
        return made


class EncoderTest(Models, unittest.TestCase):
    all_model_classes = (MLVICXModel,)

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.is_training = False  # it has no loss


class ClassifierTest(Models, unittest.TestCase):
    all_model_classes = (MLVICXForImageClassification,)


class SegmenterTest(Models, unittest.TestCase):
    all_model_classes = (MLVICXForSemanticSegmentation,)


class PretrainingTest(Models, unittest.TestCase):
    all_model_classes = (MLVICXForPreTraining,)


class BackboneModelTest(Models, unittest.TestCase):
    all_model_classes = (MLVICXBackbone,)

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.is_training = False  # it has no loss

    @unittest.skip("the first output of a backbone is a tuple")
    def test_retain_grad_hidden_states_attentions(self) -> None:
        pass


class BackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (MLVICXBackbone,)
    has_attentions = False
    config_class = MLVICXConfig

    def setUp(self) -> None:
        self.model_tester = Tester(self)


class ImageTester(ImageProcessingTester):
    def __init__(self, parent: Any, **kwargs: Any) -> None:
        self.size, self.do_resize, self.do_normalize = {"height": 20, "width": 20}, True, True
        self.image_mean, self.image_std, self.num_labels = [0.5], [0.25], LABELS
        super().__init__(parent, num_channels=3, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, Any]:
        return {"torchvision": MLVICXImageProcessor}

    def expected_output_image_shape(self, images: Any) -> tuple[int, ...]:
        return self.num_channels_of_the_result, 20, 20

    num_channels_of_the_result = 1

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        kept = super().prepare_image_processor_dict()
        return kept | {"num_channels": self.num_channels_of_the_result}


class ImageTest(ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester
    test_cast_dtype = True
