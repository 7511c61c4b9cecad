"""One vocabulary: every label is accounted for, and labels of different collections match by what they mean."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlvicx_hf.data.collections import chexpert, mimic_cxr_jpg, nih14, rsna, siim, vinbigdata, vindr
from mlvicx_hf.data.vocabulary import (
    _FURTHER_SPELLINGS,
    COLLECTIONS,
    SHARED_IMAGES,
    UNIONS,
    Finding,
    Match,
    NoCommonName,
    common_name,
    match,
    normalize,
)

# As the releases spell them, written down apart from the table.
CHEXPERT = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
]  # fmt: skip
VINBIGDATA = [
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "No finding",
]  # fmt: skip
VINDR = [
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation",
    "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst",
    "Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis",
    "Other diseases", "No finding",
]  # fmt: skip
RELEASED = {
    "nih14": list(nih14.NIH_FINDINGS),
    "vinbigdata": VINBIGDATA,
    "vindr": [*VINDR, "Other disease"],  # the test tables' spelling
    "rsna": ["Normal", "No Lung Opacity / Not Normal", "Lung Opacity"],
    "siim": ["Pneumothorax"],
    "chexpert": CHEXPERT,
    "mimic_cxr_jpg": CHEXPERT,
}
PAIRS = [(one, other) for one in RELEASED for other in RELEASED]


def names(matches: tuple[Match, ...]) -> list[str]:
    return [found.name for found in matches]


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_label_of_every_collection_has_an_entry_and_no_other():
    assert {name: set(table) for name, table in COLLECTIONS.items()} == {n: set(ls) for n, ls in RELEASED.items()}
    assert all(names <= set(COLLECTIONS) for names in SHARED_IMAGES)


@pytest.mark.parametrize(
    ("collection", "labels"),
    [
        ("nih14", nih14.NIH_FINDINGS),
        ("vinbigdata", vinbigdata._FINDINGS),
        ("vindr", vindr.VINDR_FINDINGS),
        ("rsna", rsna.CLASS_NAMES),
        ("siim", (siim._FINDING,)),
        ("chexpert", chexpert.CHEXPERT_FINDINGS),
        ("mimic_cxr_jpg", mimic_cxr_jpg.CHEXPERT_FINDINGS),
    ],
)
def test_the_labels_that_caches_have_are_in_the_table(collection: str, labels: tuple[str, ...]):
    assert labels
    assert set(labels) <= set(COLLECTIONS[collection])


@pytest.mark.parametrize("collection", RELEASED)
def test_an_entry_is_a_name_or_a_reason(collection: str):
    for label, entry in COLLECTIONS[collection].items():
        if isinstance(entry, NoCommonName):
            assert entry.reason
            assert common_name(collection, label) is None
        else:
            assert isinstance(entry, Finding)
            assert entry.name
            assert common_name(collection, label) == entry


@pytest.mark.parametrize("collection", RELEASED)
def test_two_labels_of_a_collection_never_share_a_common_name(collection: str):
    found = [entry.name for entry in COLLECTIONS[collection].values() if isinstance(entry, Finding)]
    assert len(set(found)) == len(found)


def test_a_spelling_means_one_thing_wherever_the_collection_is_not_known():
    meanings: dict[str, set[str]] = {}
    for collection, table in COLLECTIONS.items():
        for label, entry in table.items():
            if isinstance(entry, Finding) and collection != "rsna":
                meanings.setdefault(normalize(label), set()).add(entry.name)
    for label, name in _FURTHER_SPELLINGS.items():
        meanings.setdefault(normalize(label), set()).add(name)
    for found in [*meanings.values()]:
        for name in found:
            meanings.setdefault(normalize(name), set()).add(name)
    assert {spelling: found for spelling, found in meanings.items() if len(found) > 1} == {}
    assert {name for found in meanings.values() for name in found} >= {"Pleural effusion", "Nodule or mass", "Nodule"}


def test_parts_of_a_union_are_common_names():
    known = {entry.name for table in COLLECTIONS.values() for entry in table.values() if isinstance(entry, Finding)}
    assert {name for whole, (parts, _) in UNIONS.items() for name in (whole, *parts)} <= known


# -- spelling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("pleural_effusions", "Pleural effusion"),
        ("  PLEURAL  effusion ", "Pleural effusion"),
        ("Effusion", "Pleural effusion"),
        ("Nodules", "Nodule"),
        ("masses", "Mass"),
        ("Lung opacities", "Lung opacity"),
        ("pleural-thickening", "Pleural thickening"),
        ("Oedema", "Edema"),
        ("Airspace_Opacity", "Lung opacity"),
        ("atelectasis", "Atelectasis"),
    ],
)
@pytest.mark.parametrize("collection", ["folder", None, "nih14"])
def test_labels_are_known_by_their_spelling(collection: str | None, label: str, name: str):
    found = common_name(collection, label)
    assert found is not None
    assert found.name == name


def test_what_is_not_known_has_no_common_name():
    assert common_name("folder", "disc") is None
    assert common_name("rsna", "disc") is None


def test_rsna_means_another_lung_opacity():
    rsna, chexpert = common_name("rsna", "Lung Opacity"), common_name("chexpert", "Lung Opacity")
    assert rsna is not None
    assert chexpert is not None
    assert (rsna.name, chexpert.name) == ("Pneumonia", "Lung opacity")
    assert "suspicious for pneumonia" in rsna.lost
    assert names(match("rsna", ["Lung Opacity"], "chexpert", ["Lung Opacity"]).matches) == []
    assert names(match("rsna", ["Lung Opacity"], "nih14", nih14.NIH_FINDINGS).matches) == ["Pneumonia"]


@given(st.text(max_size=30) | st.text(alphabet="aiesuS _:", max_size=12))
@example("0:S")
def test_normalising_leaves_what_is_normal(label: str):
    assert normalize(normalize(label)) == normalize(label) == normalize(f" {label}_")


# -- matching ----------------------------------------------------------------------------------------------------------


def test_nih14_to_vinbigdata():
    found = match("nih14", nih14.NIH_FINDINGS, "vinbigdata", VINBIGDATA)
    columns = {
        m.name: ([nih14.NIH_FINDINGS[i] for i in m.model_columns], [VINBIGDATA[i] for i in m.data_columns])
        for m in found.matches
    }
    assert columns == {
        "Atelectasis": (["Atelectasis"], ["Atelectasis"]),
        "Cardiomegaly": (["Cardiomegaly"], ["Cardiomegaly"]),
        "Consolidation": (["Consolidation"], ["Consolidation"]),
        "Infiltration": (["Infiltration"], ["Infiltration"]),
        "Nodule or mass": (["Mass", "Nodule"], ["Nodule/Mass"]),
        "Pleural effusion": (["Effusion"], ["Pleural effusion"]),
        "Pleural thickening": (["Pleural_Thickening"], ["Pleural thickening"]),
        "Pneumothorax": (["Pneumothorax"], ["Pneumothorax"]),
        "Fibrosis": (["Fibrosis"], ["Pulmonary fibrosis"]),
    }
    assert set(found.model_only) == {"Pneumonia", "Edema", "Emphysema", "Hernia"}
    assert set(found.data_only) == {
        "Aortic enlargement", "Calcification", "ILD", "Lung Opacity", "Other lesion", "No finding",
    }  # fmt: skip
    assert "of any kind" in found.data_only["Other lesion"]
    lost = {m.name: m.lost for m in found.matches}
    assert lost["Atelectasis"] == ()
    assert [note.split(":")[0] for note in lost["Infiltration"]] == [
        "nih14's Infiltration",
        "vinbigdata's Infiltration",
    ]
    assert lost["Nodule or mass"] == ("Nodule or mass is Mass or Nodule of the model",)


def test_chexpert_to_nih14():
    found = match("chexpert", CHEXPERT, "nih14", nih14.NIH_FINDINGS)
    assert names(found.matches) == [
        "Atelectasis", "Cardiomegaly", "Pleural effusion", "Nodule or mass", "Pneumonia", "Pneumothorax",
        "Consolidation", "Edema",
    ]  # fmt: skip
    lesion = found.matches[3]
    assert [CHEXPERT[i] for i in lesion.model_columns] == ["Lung Lesion"]
    assert [nih14.NIH_FINDINGS[i] for i in lesion.data_columns] == ["Mass", "Nodule"]
    assert lesion.lost[0] == "Nodule or mass is Mass or Nodule of the images"
    assert lesion.lost[1].startswith("chexpert's Lung Lesion: other focal lesions")
    assert "thickening" in found.model_only["Pleural Other"]
    assert "Pleural_Thickening" in found.data_only


def test_fractures_of_vindr_are_not_all_that_chexpert_means():
    (fracture,) = (found for found in match("vindr", VINDR, "chexpert", CHEXPERT).matches if found.name == "Fracture")
    assert [VINDR[i] for i in fracture.model_columns] == ["Clavicle fracture", "Rib fracture"]
    assert any("other bones" in note for note in fracture.lost)


def test_a_part_alone_does_not_match_the_whole():
    found = match("folder", ["Nodule"], "vinbigdata", ["Nodule/Mass"])
    assert found.matches == ()
    assert set(found.model_only) == {"Nodule"}
    assert set(found.data_only) == {"Nodule/Mass"}


def test_labels_without_a_common_name_match_where_the_same_table_holds():
    assert names(match("chexpert", ["Pleural Other"], "mimic_cxr_jpg", ["Pleural Other"]).matches) == ["Pleural Other"]
    assert names(match("vinbigdata", ["Other lesion"], "vinbigdata", ["Other lesion"]).matches) == ["Other lesion"]
    assert names(match("vinbigdata", ["Other lesion"], "vindr", ["Other lesion"]).matches) == []
    assert names(match("folder", ["disc", "Bright Stripes"], "folder", ["bright_stripe", "Disc"]).matches) == [
        "bright_stripe", "Disc",
    ]  # fmt: skip


@pytest.mark.parametrize("collection", RELEASED)
def test_a_collection_matches_itself_without_loss(collection: str):
    labels = [label for label in RELEASED[collection] if label != "Other disease"]
    found = match(collection, labels, collection, labels)
    assert [(m.model_columns, m.data_columns, m.lost) for m in found.matches] == [
        ((i,), (i,), ()) for i in range(len(labels))
    ]
    assert len(set(names(found.matches))) == len(labels)
    assert (found.model_only, found.data_only) == ({}, {})


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_matching_is_symmetric_and_accounts_for_every_label(one: str, other: str):
    ours, theirs = ([label for label in RELEASED[name] if label != "Other disease"] for name in (one, other))
    forth, back = match(one, ours, other, theirs), match(other, theirs, one, ours)
    assert {(m.name, m.model_columns, m.data_columns) for m in forth.matches} == {
        (m.name, m.data_columns, m.model_columns) for m in back.matches
    }
    assert {ours[i] for m in forth.matches for i in m.model_columns} | set(forth.model_only) == set(ours)
    assert {theirs[i] for m in forth.matches for i in m.data_columns} | set(forth.data_only) == set(theirs)
    assert not {ours[i] for m in forth.matches for i in m.model_columns} & set(forth.model_only)
    assert (forth.model_only, forth.data_only) == (back.data_only, back.model_only)


def test_two_labels_that_mean_the_same_are_refused_unless_one_is_spelled_alike():
    with pytest.raises(ValueError, match="labels Effusion, pleural_effusion found, which all mean Pleural effusion"):
        match("chexpert", ["Pleural Effusion"], "folder", ["Effusion", "pleural_effusion"])
    found = match("nih14", ["Effusion"], "folder", ["Pleural effusion", "Effusion"])
    assert [(m.name, m.data_columns) for m in found.matches] == [("Pleural effusion", (1,))]
    assert found.data_only == {"Pleural effusion": ""}
    both = match("folder", ["Effusion", "Pleural effusion"], "folder", ["Effusion", "Pleural effusion"])
    assert names(both.matches) == ["Effusion", "Pleural effusion"]
