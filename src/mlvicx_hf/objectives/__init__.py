"""What pretraining minimises. A new method is one file beside `mlvicx.py` and one line here."""

from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

from mlvicx_hf.common.arguments import from_values, names_of
from mlvicx_hf.common.errors import UserError

from .barlow_twins import BarlowTwinsObjective
from .base import Objective
from .byol import BYOLObjective
from .caid import CAiDObjective
from .inter_moco import InterMoCoObjective
from .mlvicx import MLVICXObjective
from .moco_v2 import MoCoV2Objective
from .pcrl_v1 import PCRLv1Objective
from .pcrl_v2 import PCRLv2Objective
from .simclr import SimCLRObjective
from .simsiam import SimSiamObjective
from .vicreg import VICRegObjective

OBJECTIVES: dict[str, type[Objective]] = {  # by the name that --objective takes
    "mlvicx": MLVICXObjective,
    "vicreg": VICRegObjective,
    "barlow_twins": BarlowTwinsObjective,
    "simclr": SimCLRObjective,
    "simsiam": SimSiamObjective,
    "byol": BYOLObjective,
    "moco_v2": MoCoV2Objective,
    "inter_moco": InterMoCoObjective,
    "caid": CAiDObjective,
    "pcrl_v1": PCRLv1Objective,
    "pcrl_v2": PCRLv2Objective,
}


def find_objective(name: str) -> type[Objective]:
    """Find the class of a method.

    Raises:
        UserError: there is no such method.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective={name!r} found; expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def read_options(name: str, values: Mapping[str, Any]) -> Any:
    """Make the options of a method.

    Args:
        name: of the method.
        values: option → value, or a word of the command line, where commas separate the numbers of a list.

    Returns:
        An object of the method's `options_class`; None if it has none.

    Raises:
        UserError: an unknown method, an option that the method does not have, or a value of another type.
    """
    options_class = find_objective(name).options_class
    known = _option_names(name)
    for option in values:
        if option not in known:
            owners = [other for other in OBJECTIVES if option in _option_names(other)]
            raise UserError(
                f"objective_options: {option} found, which {name} does not have; it takes {', '.join(known) or 'none'}"
                + (f" ({option} belongs to {', '.join(owners)})" if owners else "")
            )
    if options_class is None:
        return None
    hints = get_type_hints(options_class)
    split = {
        option: value.split(",") if isinstance(value, str) and get_origin(hints[option]) is list else value
        for option, value in values.items()
    }
    (options,) = from_values([options_class], split)
    return options


def _option_names(name: str) -> list[str]:
    options_class = OBJECTIVES[name].options_class
    return [] if options_class is None else sorted(names_of([options_class]))


def make_objective(name: str, model: Any, options: Mapping[str, Any] | None = None) -> Objective:
    """Make a method around a model.

    Args:
        name: of the method.
        model: of the method's `model_class`.
        options: see `read_options`.

    Raises:
        UserError: as `read_options`.
    """
    made: Any = find_objective(name)
    read = read_options(name, options or {})
    objective: Objective = made(model) if read is None else made(model, read)
    return objective
