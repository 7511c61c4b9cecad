"""Write the page of `mlvicx demo` as a Space of the Hugging Face Hub: the app, what it needs, and the models."""

import re
import shutil
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import yaml

from mlvicx_hf import __version__
from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import check_output, new_output
from mlvicx_hf.common.text import NOTICE
from mlvicx_hf.encoders.loading import saved_class
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXForSemanticSegmentation

from .folder import export

EXTRAS = {"demo", "dicom", "explain"}
ROLES = {"model": MLVICXForImageClassification, "segmenter": MLVICXForSemanticSegmentation}
APP = '''"""The page of `mlvicx demo`. Research use only."""

import os
from pathlib import Path

from mlvicx_hf.commands.demo import main

HERE = Path(__file__).parent
port = os.environ.get("GRADIO_SERVER_PORT", "7860")
main([{words}"--host", "0.0.0.0", "--port", port])
'''
README = """---
{metadata}---

# {title}

**{notice}**

Drop a chest radiograph on the page: the classifier's probabilities, where it looks, and how sure it is. Files are read
in memory and not kept. Do not send images of patients to a server that is not yours.

Made by `mlvicx publish --space` of mlvicx_hf {version}, whose code lies in the folder `mlvicx_hf`.
"""


def write_space(output: str | Path, title: str, **models: str | Path | None) -> Path:
    """Write and return the folder of a Space, whole or not at all.

    An index goes into no Space: it holds file names and patient ids.

    Args:
        output: new or empty folder.
        title: of the page on the Hub.
        models: `model`, a classifier, and `segmenter` if wanted: folders or Hub names.

    Raises:
        UserError: a model of another kind.
        MissingExtraError: without gradio, whose version the Space names.
        OSError: as `export`.
    """
    require("a Space", "demo", "gradio")
    output = check_output(Path(output))
    given = {role: source for role, source in models.items() if source is not None}
    for role, source in given.items():
        found = saved_class(source)
        if found is not ROLES[role]:
            raise UserError(f"{source}: {found.__name__} found; expected a {ROLES[role].__name__} as the {role}")
    metadata = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "What a model says of a chest radiograph",  # the Hub takes up to 60 characters
        "tags": ["mlvicx", "chest-x-ray"],
    }
    with new_output(output) as folder:
        for role, source in given.items():
            export(source, folder / role)
        words = "".join(f'"--{role}", str(HERE / "{role}"), ' for role in given)
        (folder / "app.py").write_text(APP.format(words=words), encoding="utf-8")
        # The package itself goes along: no index of packages need have it, nor another one of its name.
        package = Path(str(files("mlvicx_hf")))
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")
        head = yaml.safe_dump(metadata, sort_keys=False)
        text = README.format(metadata=head, title=title, notice=NOTICE, version=__version__)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return output


def _requirements() -> list[str]:
    """What the package needs with the extras of the page, without itself."""
    needed = set()
    for line in requires("mlvicx-hf") or []:
        name, _, condition = line.partition(";")
        extras = re.findall(r"""extra == ['"]([^'"]+)""", condition)
        if not name.startswith("mlvicx-hf") and (not extras or set(extras) & EXTRAS):
            needed.add(name.strip())
    return sorted(needed)
