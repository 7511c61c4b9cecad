"""The report of a suite: `report.html`, which needs nothing else, and its twins `report.md` and `report.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlvicx_hf.common.files import new_file, write_json
from mlvicx_hf.common.provenance import describe_commit
from mlvicx_hf.common.text import NOTICE, number, number_range
from mlvicx_hf.scoring.calibration import CALIBRATION_BINS
from mlvicx_hf.scoring.labels import NOT_SCORED
from mlvicx_hf.scoring.neighbours import PRECISION_TOP

from .documents import Document
from .figures import PROTOCOL_TITLES, forest, label_efficiency, reliability
from .paper import CITATION
from .shortcuts import FEWEST

MAIN_SCORES = {
    "auroc_macro": "AUROC, macro",
    "auprc_macro": "AUPRC, macro",
    "accuracy": "accuracy",
    "dice": "Dice",
    "dice_positive": "Dice, images that show it",
}
CLASS_SCORES = {"auroc": "AUROC", "auprc": "AUPRC", "dice": "Dice", "dice_positive": "Dice, images that show it"}
CALIBRATION_SCORES = {"ece_macro": "ECE before → after", "brier_macro": "Brier before → after"}
LAYOUTS = {  # of the paper's tables: what a line is called, column by column, and what the other columns are called
    "I": ({"labels": "{percent}", "method": "{method}"}, "{column}"),
    "II": ({"data": "{dataset} ({how})", "labels": "{percent}"}, "{method}"),
    "III": ({"method": "{method}"}, "{how}, {percent}"),
    "IV": ({"protocol": "{how}", "loss": "{method}"}, "{percent}"),
}


def write_report(report: dict[str, Any], output: Path) -> None:
    """Write a report of `analyse` as `report.html`, `report.md` with `figures/`, and `report.json`."""
    document = compose(report)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for name, png in document.pictures.items():
        with new_file(output / "figures" / name) as temporary:
            temporary.write_bytes(png)
    for name, text in (("report.md", document.to_markdown()), ("report.html", document.to_html())):
        with new_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(output / "report.json", report)


def describe_briefly(report: dict[str, Any]) -> str:
    """A line a setting, for the terminal."""
    lines = []
    for row in report["settings"]:
        metric = report["tasks"][row["task"]]["metric"]
        lines.append(
            f"{row['task']}, {PROTOCOL_TITLES[row['protocol']]}, {_percent(row)} of the labels, {row['model']}: "
            f"{MAIN_SCORES.get(metric, metric)} {_score(row['scores'][metric])}"
        )
    return "\n".join(lines)


def compose(report: dict[str, Any]) -> Document:
    """The text of a report."""
    document = Document(report["suite"]["title"])
    document.notice(NOTICE)
    cells = report["cells"]
    document.paragraph(
        f"{cells['finished']} of {cells['planned']} runs finished, {len(cells['failed'])} failed. Suite "
        f"{report['suite']['file']} (SHA-256 {report['suite']['sha256'][:12]}), report by mlvicx_hf "
        f"{report['code']['mlvicx_hf']}, {_commit(report['code']['commit'])}. Scores are means over "
        "the runs on the test split, which was looked at once, after validation had chosen epoch and thresholds. "
        f"Intervals are 95 % bootstrap intervals over patients ({report['suite']['samples']} draws): how much a "
        "score depends on who was tested. ± is the standard deviation over runs: how much it depends on the training. "
        "Neither covers the other."
    )
    if cells["failed"]:
        document.table(["failed run", "reason"], [[path, reason] for path, reason in cells["failed"].items()])
    _add_data(document, report)
    _add_scores(document, report)
    _add_comparisons(document, report)
    for table, rows in report["tables"].items():
        _add_paper_table(document, table, rows)
    _add_classes(document, report)
    _add_calibration(document, report)
    _add_subgroups(document, report)
    _add_shortcuts(document, report)
    _add_search(document, report)
    return document


def _add_data(document: Document, report: dict[str, Any]) -> None:
    document.heading("Data")
    rows, unknown, leaks = [], [], []
    for task, about in report["tasks"].items():
        train = ", ".join(f"{100 * float(k):g} %: {number_range(v['images'])}" for k, v in about["train"].items())
        data = about["data"]
        patients = f"{about['test']['patients']:,} patients"
        if data.get("patients_known") is False:
            patients = "patients unknown"
            unknown.append(task)
        if data.get("copies_across_splits"):
            leaks.append(f"{task}, {data['copies_across_splits']:,} pairs")
        test = f"{about['test']['images']:,} ({patients})"
        made = ", ".join(_commit(commit) for commit in about["commits"])
        collection = data["collection"] + (" (synthetic)" if data["synthetic"] else "")
        hashes = (data[name][:12] for name in ("data_hash", "split_hash"))
        rows.append([task, collection, train, f"{about['validation']['images']:,}", test, *hashes, made])
    document.table(["task", "collection", "train images", "validation", "test", "data", "split", "runs made by"], rows)
    if unknown:
        document.paragraph(
            f"The patients of {', '.join(unknown)} are not known: each image counts as one. A patient may have images "
            "in two splits, and intervals may be too narrow."
        )
    if leaks:
        document.paragraph(f"Copies of an image are in two splits: {'; '.join(leaks)}. Scores may be too good.")


def _add_scores(document: Document, report: dict[str, Any]) -> None:
    document.heading("Scores")
    metrics = {task: about["metric"] for task, about in report["tasks"].items()}
    document.picture(
        "label_efficiency.png", label_efficiency(report["settings"], metrics), "Test score over the share of labels"
    )
    for task, about in report["tasks"].items():
        document.heading(task, 3)
        rows = [row for row in report["settings"] if row["task"] == task]
        columns = [name for name in MAIN_SCORES if name in rows[0]["scores"]]
        lines = [
            [_setting(row), str(row["scores"][about["metric"]]["runs"]), *(_score(row["scores"][c]) for c in columns)]
            for row in rows
        ]
        document.table(["protocol, labels, model", "runs", *(MAIN_SCORES[name] for name in columns)], lines)


def _add_comparisons(document: Document, report: dict[str, Any]) -> None:
    rows = report["comparisons"]
    if not rows:
        return
    document.heading("Differences")
    document.paragraph(
        "The interval shows how much a difference depends on who was tested. The paired tests show how much it depends "
        "on the pretraining or, if a model has only one, on the seed. With few pairs they can hardly be significant, "
        "however large the difference is. There is no correction for the number of comparisons."
    )
    document.picture("differences.png", forest(rows), "Differences of the test score with 95 % intervals")
    lines, left_out = [], 0
    for row in rows:
        paired = row["paired"]
        tests = ["–", "–", "–"]
        if paired:
            tests = [f"{paired['pairs']} {paired['unit']}", _p(paired["t_p"]), _p(paired["wilcoxon_p"])]
        change, low, high = (number(row[name], "+.3f") for name in ("difference", "low", "high"))
        score = MAIN_SCORES.get(row["metric"], row["metric"])
        left_out += row["left_out"]
        lines.append([_pair(row), score, change, f"{low} to {high}", *tests])
    document.table(["setting", "score", "difference", "95 % interval", "pairs", "t-test p", "Wilcoxon p"], lines)
    if left_out:
        document.paragraph(f"Runs without a counterpart of the same seed were left out, {left_out} times.")
    _add_delong(document, rows)


def _add_delong(document: Document, rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        for label, found in (row.get("delong") or {}).items():
            scores = [f"{found['auroc']:.3f}", f"{found['other_auroc']:.3f}", number(found["difference"], "+.3f")]
            lines.append([f"{_pair(row)}, {label}", *scores, _p(found["p"])])
    if lines:
        document.heading("DeLong test of single pairs of runs", 3)
        document.paragraph(
            "The test assumes that images are independent. It is made only if every patient has one image, and for "
            "findings with at least two positive and two negative images."
        )
        document.table(["setting, finding", "AUROC", "against", "difference", "p"], lines)


def _add_paper_table(document: Document, table: str, rows: Sequence[dict[str, Any]]) -> None:
    document.heading(f"Table {table} of the paper")
    document.paragraph(f"Our figures, with those of the paper in parentheses ({CITATION}); – was not measured by us.")
    head, lines = layout(table, rows)
    document.table(head, lines)


def layout(table: str, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Arrange the rows of `paper_table` as the paper arranges its table I, II, III or IV: head and lines."""
    names, column = LAYOUTS[table]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    columns: dict[str, None] = {}  # a set in order
    for row in rows:
        words = row | {"percent": _percent(row), "how": PROTOCOL_TITLES[row["protocol"]]}
        line = tuple(form.format_map(words) for form in names.values())
        columns[column.format_map(words)] = None
        lines.setdefault(line, {})[column.format_map(words)] = _beside(row)
    return [*names, *columns], [[*line, *(cells[name] for name in columns)] for line, cells in lines.items()]


def _beside(row: dict[str, Any]) -> str:
    """Our figure, and the paper's in parentheses, with deviations where the paper has one (ours of several runs)."""
    with_deviation = row["paper_sd"] is not None
    paper = f"({row['paper']:.2f} ± {row['paper_sd']:.2f})" if with_deviation else f"({row['paper']:.3f})"
    if row["ours"] in (None, NOT_SCORED):
        return f"– {paper}"
    deviation = f" ± {row['ours_sd']:.3f}" if with_deviation and row["ours_sd"] is not None else ""
    return f"{row['ours']:.3f}{deviation} {paper}"


def _add_classes(document: Document, report: dict[str, Any]) -> None:
    document.heading("By finding")
    for task, about in report["tasks"].items():
        rows = [row for row in report["settings"] if row["task"] == task]
        for kind, name in CLASS_SCORES.items():
            keys = [f"{kind}:{label}" for label in about["labels"]]
            if keys[0] in rows[0]["scores"]:
                document.heading(f"{task}: {name}", 3)
                lines = [[_setting(row), *(_score(row["scores"][key]) for key in keys)] for row in rows]
                document.table(["protocol, labels, model", *about["labels"]], lines)


def _add_calibration(document: Document, report: dict[str, Any]) -> None:
    picture = reliability(report["settings"])
    if picture is None:
        return
    document.heading("Calibration and decisions")
    document.paragraph(
        f"ECE is the expected calibration error of the probabilities of all runs over {CALIBRATION_BINS} bins of equal "
        "width, averaged over the findings. Sensitivity, specificity and this accuracy use the thresholds that "
        "Youden's index chose on validation; the accuracy among the scores above uses 0.5, or the likeliest class."
    )
    document.picture("reliability.png", picture, "Frequency of findings over their probability")
    rows = [row for row in report["settings"] if "calibration" in row]
    lines = [[f"{row['task']}, {_setting(row)}", f"{row['calibration']['ece_macro']:.3f}"] for row in rows]
    document.table(["task, protocol, labels, model", "ECE"], lines)
    names = ("sensitivity", "specificity", "accuracy")
    decided = [
        [f"{row['task']}, {_setting(row)}, {label}", *(number(scores[name], ".3f") for name in names)]
        for row in rows
        for label, scores in (row["decisions"] or {}).items()
    ]
    if decided:
        document.table(["task, protocol, labels, model, finding", *names], decided)
    _add_confidence(document, rows)


def _add_confidence(document: Document, settings: Sequence[dict[str, Any]]) -> None:
    """What calibration changed, at the largest share of labels of each task and protocol."""
    most: dict[tuple[str, str], float] = {}
    for row in settings:
        key = (row["task"], row["protocol"])
        most[key] = max(most.get(key, 0), row["label_fraction"])
    rows = [r for r in settings if r["confidence"] and r["label_fraction"] == most[(r["task"], r["protocol"])]]
    if not rows:
        return
    document.heading("What calibration on validation changed", 3)
    document.paragraph(
        "Means over the findings and the runs. The Brier score is the mean squared distance of probability and truth. "
        "Unsure is the share of answers within the band that validation chose, and error the share of wrong answers "
        "among the others; findings without a band are left out of both."
    )
    lines = []
    for row in rows:
        found = row["confidence"]
        both = [[number(found[when][s], ".3f") for when in ("before", "after")] for s in CALIBRATION_SCORES]
        cells = [" → ".join(pair) for pair in both]
        cells += [number(found[name], ".3f") for name in ("unsure", "error")]
        lines.append([f"{row['task']}, {_setting(row)}", *cells])
    head = ["task, protocol, labels, model", *CALIBRATION_SCORES.values(), "unsure", "error of the rest"]
    document.table(head, lines)
    document.paragraph(
        "Share of wrong answers if only the most confident images are answered, by the likelier of the two answers or "
        "the likeliest class."
    )
    shares = [f"{100 * float(share):g} % answered" for share in rows[0]["confidence"]["errors"]]
    errors = [
        [f"{r['task']}, {_setting(r)}", *(number(e, ".3f") for e in r["confidence"]["errors"].values())] for r in rows
    ]
    document.table(["task, protocol, labels, model", *shares], errors)


def _add_subgroups(document: Document, report: dict[str, Any]) -> None:
    lines = [
        [
            *(f"{row['task']}, {_setting(row)}", kind, name, f"{score['images']:,}", f"{score['patients']:,}"),
            *(f"{len(score['labels'])} of {len(report['tasks'][row['task']]['labels'])}", _score(score)),
        ]
        for row in report["settings"]
        for kind, groups in row["subgroups"].items()
        for name, score in groups.items()
    ]
    if lines:
        document.heading("Subgroups")
        document.paragraph(
            "The score of a group is the mean over the labels that can be scored in every group of its kind, since "
            "means over other labels cannot be compared."
        )
        head = ["task, protocol, labels, model", "by", "group", "images", "patients", "labels scored", "score"]
        document.table(head, lines)


def _add_shortcuts(document: Document, report: dict[str, Any]) -> None:
    rows, missing = report["shortcuts"], report["not_audited"]
    if not rows and not missing:
        return
    document.heading("Shortcut audit")
    if missing:
        document.paragraph(
            f"Not audited: {', '.join(missing)}. A view or sex counts if {FEWEST} training images and {FEWEST} test "
            "images have it, and there must be two of them; a source, if there are two caches that share no image."
        )
    if not rows:
        return
    document.paragraph(
        "How well a linear layer on the same frozen features tells view, sex and source of an image: AUROC of one "
        "value against the rest; 0.5 is no knowledge. For several pretrainings it is their mean, with the lowest and "
        "highest end of their intervals. The source is the cache that holds the image. A kind with a single value is "
        "left out, and so is the source of caches that share images. Features that know view or source can score well "
        "for the wrong reason."
    )
    lines = []
    for row in rows:
        score = [f"{row['auroc']:.3f}", " to ".join(number(row[end], ".3f") for end in ("low", "high"))]
        lines.append([row["model"], row["kind"], row["data"], ", ".join(row["classes"]), f"{row['images']:,}", *score])
    document.table(["model", "tells", "data", "values", "test images", "AUROC", "95 % interval"], lines)


def _add_search(document: Document, report: dict[str, Any]) -> None:
    rows = report["search"]
    if not rows:
        return
    document.heading("Search")
    document.paragraph(
        f"Share of the {PRECISION_TOP} training images nearest to a test image with a finding that have the finding, "
        "too: mean over the findings, and over several pretrainings. Nearest is by the cosine of the frozen "
        "features. Chance is the share of the training images with the finding."
    )
    lines = [[row["model"], row["data"], f"{row['precision']:.3f}", f"{row['chance']:.3f}"] for row in rows]
    document.table(["model", "data", f"precision@{PRECISION_TOP}", "chance"], lines)


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['label_fraction']:g} %"


def _pair(row: dict[str, Any]) -> str:
    setting = f"{row['task']}, {PROTOCOL_TITLES[row['protocol']]}, {_percent(row)}"
    return f"{setting}: {row['model']} − {row['baseline']}"


def _setting(row: dict[str, Any]) -> str:
    return f"{PROTOCOL_TITLES[row['protocol']]}, {_percent(row)}, {row['model']}"


def _score(score: dict[str, Any]) -> str:
    if NOT_SCORED in (score["mean"], score["low"], score["high"]):
        return number(score["mean"], ".3f")
    spread = f" ± {score['sd']:.3f}" if score["runs"] > 1 else ""
    return f"{score['mean']:.3f}{spread} ({score['low']:.3f}–{score['high']:.3f})"


def _p(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _commit(commit: str) -> str:
    return describe_commit(commit).replace("`", "")
