"""VICReg (Bardes et al., ICLR 2022): MLVICX's global loss on a plain backbone."""

from typing import Any

from .base import OF_LEVELS
from .mlvicx import MLVICXObjective


class VICRegObjective(MLVICXObjective):
    """α·invariance + β·variance + γ·covariance of one expander's embeddings.

    The weights and the expander are those of the model's configuration (`invariance_weight`, `variance_weight`,
    `covariance_weight`, `expander_dims`), as for MLVICX.
    """

    unused = OF_LEVELS

    @classmethod
    def configure(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Leave the multi-level loss out."""
        return values | {"multi_level_weight": 0.0}
