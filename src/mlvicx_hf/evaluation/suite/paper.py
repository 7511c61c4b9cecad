"""The figures of the paper's Tables I to IV (arXiv 2403.11504)."""

from functools import cache
from importlib.resources import files

import pandas as pd

CITATION = "Singh, Gorade and Mishra, MLVICX, arXiv 2403.11504"


@cache
def paper_results() -> pd.DataFrame:
    """Read the paper's figures, one a row.

    Columns: table, dataset, protocol, label_fraction, method, column (a finding, Mean or Dice), metric, value, sd.
    """
    with (files(__package__) / "paper_results.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"table": str})


def paper_tables() -> list[str]:
    """Names of the tables: I, II, III, IV."""
    return paper_results()["table"].unique().tolist()
