"""One vocabulary: find the labels of different collections that mean the same finding, and say where they differ.

Labels are spelled as in the releases. Counts in comments are those of the training tables of VinBigData and CheXpert.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from mlvicx_hf.common.errors import UserError


@dataclass(frozen=True)
class Finding:
    """The common name of a collection's label, and how their meanings differ (empty: not at all)."""

    name: str
    lost: str = ""


@dataclass(frozen=True)
class NoCommonName:
    """The reason why a collection's label has no common name."""

    reason: str


@dataclass(frozen=True)
class Match:
    """A finding that a model and a collection have in common."""

    name: str  # the common name, or the label itself if it has none
    model_columns: tuple[int, ...]  # outputs of the model. If there are several, the finding is their union
    data_columns: tuple[int, ...]  # labels of the collection. If there are several, the finding is their union
    lost: tuple[str, ...] = ()  # how the two sides differ, one line for each difference


@dataclass(frozen=True)
class Matching:
    """The labels that a model and a collection share, and those that only one of them has."""

    matches: tuple[Match, ...]  # the common findings, in the order of the collection's labels
    # The model's labels without a counterpart → the reason (empty: the collection lacks them)
    model_only: Mapping[str, str] = field(default_factory=dict)
    # The collection's labels without a counterpart → the reason (empty: the model lacks them)
    data_only: Mapping[str, str] = field(default_factory=dict)


# A finding is present if one of its parts is. Finding → parts, and what the parts together do not cover.
UNIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "Nodule or mass": (("Nodule", "Mass"), ""),
    "Fracture": (("Rib fracture", "Clavicle fracture"), "fractures of other bones than ribs and clavicles"),
}

# -- the table ---------------------------------------------------------------------------------------------------------

_FROM_IMAGE = "seen in the image alone, without what the clinician knew"
_OTHER_KINDS = NoCommonName("whatever else the readers found, of any kind")

_Table = dict[str, Finding | NoCommonName]  # label → meaning, in the order of the release


def _named(*labels: str) -> _Table:
    """Labels whose common name is the label itself, with one capital letter."""
    return {label: Finding(label.capitalize()) for label in labels}


_NIH14 = {
    **_named("Atelectasis", "Cardiomegaly"),
    "Effusion": Finding("Pleural effusion"),
    "Infiltration": Finding(
        "Infiltration", "the report's word for any infiltrate, much of it what others call consolidation or opacity"
    ),
    **_named("Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis"),
    "Pleural_Thickening": Finding("Pleural thickening"),
    **_named("Hernia"),
}

_VINBIGDATA = {
    **_named("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation"),
    "ILD": Finding("Interstitial lung disease"),
    "Infiltration": Finding("Infiltration", "a reader's box, apart from consolidation and opacity"),
    "Lung Opacity": Finding(  # drawn on 297 of 353 images with consolidation, but 128 of 386 with ILD
        "Lung opacity", "any opacity by its definition, but often not drawn where a box names the opacity's kind"
    ),
    "Nodule/Mass": Finding("Nodule or mass"),
    "Other lesion": _OTHER_KINDS,
    **_named("Pleural effusion", "Pleural thickening", "Pneumothorax"),
    "Pulmonary fibrosis": Finding("Fibrosis"),
    "No finding": Finding("No finding", "none of its findings, lesions of other kinds among them"),
}

_VINDR = {
    **_VINBIGDATA,
    **_named("Clavicle fracture", "Rib fracture", "Mediastinal shift"),
    **_named("Edema", "Emphysema", "Lung cavity", "Lung cyst"),
    "Enlarged PA": Finding("Enlarged pulmonary artery"),
    **{name: Finding(name, _FROM_IMAGE) for name in ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis")},
    "Other diseases": _OTHER_KINDS,
    "Other disease": _OTHER_KINDS,  # as the test tables spell it
}

_RSNA: _Table = {
    "Lung Opacity": Finding(
        "Pneumonia", f"opacity suspicious for pneumonia, {_FROM_IMAGE}; not any opacity, as others' Lung Opacity"
    ),
    "No Lung Opacity / Not Normal": NoCommonName("any finding but opacity suspicious for pneumonia"),
    "Normal": Finding("No finding", "normal altogether, whatever a collection's list of findings"),
}

_CHEXPERT = {
    "No Finding": Finding(  # 8,808 of 22,381 with support devices
        "No finding", "none of the labeller's 12 findings, but perhaps support devices"
    ),
    **_named("Enlarged Cardiomediastinum", "Cardiomegaly"),
    "Lung Opacity": Finding(  # blank for 23,439 of 52,246 images with edema
        "Lung opacity", "any opacity, but often unknown where the report names the opacity's kind alone"
    ),
    "Lung Lesion": Finding("Nodule or mass", "other focal lesions of the lung, such as cavities"),
    **_named("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    "Pleural Other": NoCommonName("pleural thickening together with plaques, scars and fibrothorax"),
    **_named("Fracture", "Support Devices"),
}

COLLECTIONS: Mapping[str, Mapping[str, Finding | NoCommonName]] = MappingProxyType(
    {
        "nih14": _NIH14,
        "vinbigdata": _VINBIGDATA,
        "vindr": _VINDR,
        "rsna": _RSNA,
        "siim": _named("Pneumothorax"),
        "chexpert": _CHEXPERT,
        "mimic_cxr_jpg": _CHEXPERT,  # the same labeller on other reports
    }
)

# Collections that hold some of the same images.
SHARED_IMAGES = (frozenset({"nih14", "rsna", "siim"}), frozenset({"vinbigdata", "vindr"}))

# Further names of findings, which other tables use.
_FURTHER_SPELLINGS = {
    "Oedema": "Edema",
    "Pulmonary edema": "Edema",
    "Pulmonary oedema": "Edema",
    "Hiatal hernia": "Hernia",
    "Hiatus hernia": "Hernia",
    "Lung nodule": "Nodule",
    "Pulmonary nodule": "Nodule",
    "Lung mass": "Mass",
    "Pulmonary mass": "Mass",
    "Airspace opacity": "Lung opacity",
    "Lung tumour": "Lung tumor",
}
# RSNA alone uses its names in its sense: elsewhere Lung Opacity means any opacity, and Normal is not defined.
_SPELLED_BY = [name for name in COLLECTIONS if name != "rsna"]


def release_labels(collection: str) -> tuple[str, ...]:
    """List the labels of a collection in the order of its release, without No Finding."""
    return tuple(label for label in COLLECTIONS[collection] if label.lower() != "no finding")


# -- looking up --------------------------------------------------------------------------------------------------------


def normalize(label: str) -> str:
    """Remove from a label what does not change its meaning: upper case, blanks, underscores, other signs, plurals."""
    return " ".join(_singular(word) for word in re.split(r"[\W_]+", label.casefold()) if word)


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "is", "us")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith("sses") else word[:-1]


@cache
def _spellings(collection: str | None) -> dict[str, Finding | NoCommonName]:
    """Map normalised spellings to entries: those of one collection, or (None) of all collections together."""
    if collection is not None:
        return {normalize(label): entry for label, entry in COLLECTIONS[collection].items()}
    # Drop the differences in meaning: they are known for the collections, not for somebody's own folder.
    entries = [item for name in _SPELLED_BY for item in COLLECTIONS[name].items()]
    names = {normalize(label): entry.name for label, entry in entries if isinstance(entry, Finding)}
    names |= {normalize(label): name for label, name in _FURTHER_SPELLINGS.items()}
    names |= {normalize(name): name for name in names.values()}
    return {spelling: Finding(name) for spelling, name in names.items()}


def _look_up(collection: str | None, label: str) -> Finding | NoCommonName | None:
    spelling = normalize(label)
    if collection in COLLECTIONS and spelling in _spellings(collection):
        return _spellings(collection)[spelling]
    return _spellings(None).get(spelling)


def common_name(collection: str | None, label: str) -> Finding | None:
    """Find the common name of a label, or None if it has none or is not known.

    For a collection that is none of `COLLECTIONS`, or None, the spelling of the label decides.
    """
    entry = _look_up(collection, label)
    return entry if isinstance(entry, Finding) else None


# -- matching ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """The labels of a model or of a collection of images."""

    collection: str | None
    labels: tuple[str, ...]

    def key(self, column: int) -> tuple[str, str]:
        """Identify the meaning of a label: ("", common name), or (collection or "", normalised label)."""
        entry = _look_up(self.collection, self.labels[column])
        if isinstance(entry, Finding):
            return "", entry.name
        # A label without a common name means the same in all collections with this table. An unknown label means the
        # same wherever it is spelled like this.
        tables = [name for name, table in COLLECTIONS.items() if table is COLLECTIONS.get(self.collection or "")]
        scope = tables[0] if entry is not None else ""
        return scope, normalize(self.labels[column])

    def keys(self) -> list[tuple[str, str]]:
        return [self.key(column) for column in range(len(self.labels))]

    def name(self, column: int) -> str:
        entry = _look_up(self.collection, self.labels[column])
        return entry.name if isinstance(entry, Finding) else self.labels[column]

    def lost(self, column: int) -> tuple[str, ...]:
        entry = common_name(self.collection, self.labels[column])
        return (f"{self.collection}'s {self.labels[column]}: {entry.lost}",) if entry and entry.lost else ()

    def parts(self, whole: str) -> list[int]:
        """Find the columns of all parts of a finding. Return none if one part is absent."""
        keys, parts = self.keys(), UNIONS[whole][0]
        columns = [column for column, key in enumerate(keys) if key in [("", part) for part in parts]]
        return columns if len(columns) == len(parts) == len({keys[column] for column in columns}) else []

    def without(self, used: set[int]) -> dict[str, str]:
        """Map the labels of all columns but these to the reason why they have no common name."""
        entries = {
            label: _look_up(self.collection, label) for column, label in enumerate(self.labels) if column not in used
        }
        return {label: entry.reason if isinstance(entry, NoCommonName) else "" for label, entry in entries.items()}


def match(
    model_collection: str | None,
    model_labels: Sequence[str],
    data_collection: str | None,
    data_labels: Sequence[str],
) -> Matching:
    """Pair the labels of a model with those of a collection.

    Two labels match if they have the same common name. A finding of one side also matches its parts on the other side
    (`UNIONS`), if all of them are there. Labels without a common name match by their spelling; those that a table
    lists match only between collections that share this table.

    Args:
        model_collection: the collection on which the model was trained; None if unknown.
        model_labels: names of the model's outputs.
        data_collection: the collection of the images; None if unknown.
        data_labels: names of the images' labels.

    Raises:
        UserError: two labels of one side mean the same, and neither is spelled as on the other side.
    """
    model, data = _Side(model_collection, tuple(model_labels)), _Side(data_collection, tuple(data_labels))
    matches = _same(model, data)
    matches += _unions(model, data, {found.name for found in matches})
    matches.sort(key=lambda found: found.data_columns)
    return Matching(
        tuple(matches),
        model.without({column for found in matches for column in found.model_columns}),
        data.without({column for found in matches for column in found.data_columns}),
    )


def _same(model: _Side, data: _Side) -> list[Match]:
    """Match single labels of both sides."""
    model_keys, data_keys = model.keys(), data.keys()
    matches = []
    for key in dict.fromkeys(key for key in data_keys if key in model_keys):
        ours = [column for column, found in enumerate(model_keys) if found == key]
        theirs = [column for column, found in enumerate(data_keys) if found == key]
        spelled = [(i, j) for i in ours for j in theirs if model.labels[i] == data.labels[j]]
        if not spelled and len(ours) * len(theirs) > 1:
            side, columns = (model, ours) if len(ours) > 1 else (data, theirs)
            listed = ", ".join(side.labels[column] for column in columns)
            raise UserError(f"labels {listed} found, which all mean {key[1]}; expected one of them")
        names = Counter(data.name(j) for _, j in spelled)
        for i, j in spelled or [(ours[0], theirs[0])]:
            alike = _look_up(model.collection, model.labels[i]) == _look_up(data.collection, data.labels[j])
            name = data.name(j) if names[data.name(j)] < 2 else data.labels[j]
            matches.append(Match(name, (i,), (j,), () if alike else model.lost(i) + data.lost(j)))
    return matches


def _unions(model: _Side, data: _Side, matched: set[str]) -> list[Match]:
    """Match a finding of one side with all its parts on the other side."""
    matches = []
    for whole in UNIONS.keys() - matched:
        for side, other in ((model, data), (data, model)):
            wholes = [column for column, key in enumerate(side.keys()) if key == ("", whole)]
            parts = other.parts(whole)
            if len(wholes) != 1 or not parts:
                continue
            pair = (tuple(wholes), tuple(parts)) if side is model else (tuple(parts), tuple(wholes))
            taken = " or ".join(other.labels[column] for column in parts)
            lost = [f"{whole} is {taken} of the {'images' if side is model else 'model'}"]
            lost += [f"{taken} lack {UNIONS[whole][1]}"] if UNIONS[whole][1] else []
            lost += [*side.lost(wholes[0]), *(note for column in parts for note in other.lost(column))]
            matches.append(Match(whole, *pair, tuple(lost)))
    return matches
