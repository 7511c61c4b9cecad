"""The page of `mlvicx demo`: drop a radiograph, see what the models say of it, where they look, and what is similar.

The browser sends a file's content alone, without its name, and nothing is written to the disk: a file and its reading
live in the memory of this process until the next file, or until an hour after the last use.
"""

import base64
import binascii
import io
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import numpy as np
from matplotlib import colormaps
from PIL import Image

from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.common.text import NOTICE
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.synthetic.phantom import draw_phantom

from .reading import MAX_UPLOAD, JudgedFinding, RadiographReading, Reader

SECONDS_KEPT = 3600
NO_MAP = "no heat map"  # a label may be called "No Finding"
OUTLINE_COLOURS = ((255, 0, 255), (0, 255, 255), (255, 255, 0), (0, 255, 0))  # not of the grey image
DROP = """
<label class="drop" for="radiograph">
  <strong>Drop a radiograph here, or choose a file</strong>
  <span>PNG, JPEG, TIFF or DICOM, up to ${limit} MB. It is read in memory and not kept.</span>
  <input id="radiograph" type="file" aria-label="Radiograph">
</label>
<p class="problem" role="alert">${value}</p>
"""
DROP_CSS = """
.drop { display: block; padding: 1.2em; border: 2px dashed var(--body-text-color-subdued); border-radius: 8px; }
.drop span { display: block; margin: 0.3em 0; }
.drop:focus-within, .drop.over { outline: 3px solid var(--color-accent); }
.problem { margin: 0.5em 0 0; font-weight: bold; color: var(--body-text-color); }
.problem:empty { display: none; }
"""
# `trigger` sends the content to `Page.read`. The name stays in the browser.
DROP_JS = """
const limit = props.limit * 1048576;
const give = (file) => {
  if (!file) return;
  if (file.size > limit) {
    element.querySelector(".problem").textContent = `This file cannot be read: larger than ${props.limit} MB.`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger("given", {content: reader.result.split(",")[1] || ""});
  reader.readAsDataURL(file);
};
element.addEventListener("change", (event) => { give(event.target.files[0]); event.target.value = ""; });
element.addEventListener("dragover", (event) => {
  event.preventDefault(); element.querySelector(".drop").classList.add("over");
});
element.addEventListener("dragleave", () => element.querySelector(".drop").classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault(); element.querySelector(".drop").classList.remove("over");
  give(event.dataTransfer.files[0]);
});
"""
CSS = """
.notice { padding: 0.5em 1em; border: 2px solid currentColor; border-radius: 8px; font-weight: bold; }
.radiograph img { width: 100%; height: auto; background: black; }
.findings { width: 100%; border-collapse: collapse; }
.findings tbody th { overflow-wrap: anywhere; }
.findings th, .findings td { padding: 0.3em 0.5em; text-align: left; border-bottom: 1px solid currentColor; }
.similar { display: flex; flex-wrap: wrap; gap: 1em; list-style: none; padding: 0; margin: 0; }
.similar li { width: 9em; overflow-wrap: anywhere; }
.similar img { width: 100%; background: black; }
.warning { padding: 0.5em 1em; border-left: 6px solid #b45309; font-weight: bold; }
"""


def make_page(reader: Reader) -> gr.Blocks:
    """Make the page of a reader."""
    page = Page(reader)
    with gr.Blocks(title="mlvicx demo", analytics_enabled=False) as blocks:
        state = gr.State(None, time_to_live=SECONDS_KEPT)
        gr.HTML(f'<h1>What the model says</h1><p class="notice">{escape(NOTICE)}</p>')
        drop = gr.HTML(
            "", html_template=DROP, css_template=DROP_CSS, js_on_load=DROP_JS, limit=MAX_UPLOAD // 2**20, elem_id="drop"
        )
        example = gr.Button("Show a synthetic radiograph", size="sm")
        with gr.Column(visible=False) as results:
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    picture = gr.HTML(elem_classes="radiograph")
                    black = gr.Slider(0, 255, 0, step=1, label="Grey level shown as black", buttons=[])
                    white = gr.Slider(0, 255, 255, step=1, label="Grey level shown as white", buttons=[])
                    opacity = gr.Slider(0, 1, 0.4, step=0.05, label="Opacity of the heat map", buttons=[])
                    outlined = gr.Checkbox(True, label="Show outlines", visible=reader.segmenter is not None)
                with gr.Column(scale=2, min_width=300):
                    judged = gr.HTML()
                    chosen = gr.Radio([NO_MAP], value=NO_MAP, label="Where the model looks for")
                    pointing = gr.HTML()
            similar = gr.HTML()
        view = [state, chosen, black, white, opacity, outlined]
        shown = [drop, state, results, judged, chosen, pointing, similar, picture]
        quiet: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
        drop.given(page.read, [black, white, outlined], shown, **quiet)
        example.click(page.draw, [black, white, outlined], shown, **quiet)
        for control in (chosen, black, white, opacity, outlined):
            control.change(page.show, view, [picture, pointing], trigger_mode="always_last", **quiet)
    return blocks


@contextmanager
def serving(reader: Reader, host: str, port: int) -> Iterator[tuple[gr.Blocks, str]]:
    """Serve the page of a reader, and yield it and its address.

    Args:
        reader: what it shows.
        host: address to listen at.
        port: 0 for any free one.

    Raises:
        UserError: a host or port at which the page cannot listen.
    """
    port = _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="mlvicx-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of which the page makes no use
        page = make_page(reader).queue(default_concurrency_limit=1, api_open=False)
        _, where, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=1,  # nothing is uploaded in gradio's way
            state_session_capacity=50,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            # Fonts of the reader's machine: those of other themes come from the network.
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
        )
        try:
            yield page, where
        finally:
            page.close(verbose=False)


def _check_address(host: str, port: int) -> int:
    """Try to listen, since gradio tells no reason. Return the port, or a free one instead of 0."""
    try:
        kind, *_, where = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0]  # [::1] is IPv6
        with socket.socket(kind) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gradio's server does
            found.bind((where[0], port, *where[2:]))
            return int(found.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} found; expected a free address of this machine: {error}"
        ) from error


class Page:
    """The answers to what people do on the page. `reader` serves all of them; a reading belongs to one of them."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def read(self, black: float, white: float, outlined: bool, event: gr.EventData) -> list[Any]:
        """Read a file that was dropped."""
        try:
            content = base64.b64decode(event.content, validate=True)
            reading = self.reader.read(content)
        except UnreadableImageError as error:
            return self._fail(error.reason)
        except MissingExtraError as error:
            return self._fail(str(error))
        except (binascii.Error, TypeError):
            return self._fail("it arrived damaged")
        return self._present(reading, black, white, outlined)

    def draw(self, black: float, white: float, outlined: bool) -> list[Any]:
        """Read a synthetic radiograph."""
        phantom = draw_phantom(secrets.randbelow(10_000), size=512)
        return self._present(self.reader.read_image(Image.fromarray(phantom.image)), black, white, outlined)

    def show(
        self,
        reading: RadiographReading | None,
        finding: str,
        black: float,
        white: float,
        opacity: float,
        outlined: bool,
    ) -> list[Any]:
        """Draw the picture again, and say how well heat maps of this finding point."""
        if reading is None:
            return ["", ""]
        heat = None if finding == NO_MAP else self.reader.heat_map(reading, finding)
        picture = draw_picture(reading, black, white, heat, opacity, outlined)
        return [_image(picture, _describe(reading, finding)), _say_pointing(reading, finding, heat)]

    def _fail(self, reason: str) -> list[Any]:
        return [f"This file cannot be read: {escape(reason)}.", None, gr.Column(visible=False), *[gr.skip()] * 5]

    def _present(self, reading: RadiographReading, black: float, white: float, outlined: bool) -> list[Any]:
        names = [NO_MAP, *(finding.name for finding in reading.findings)]
        picture, pointing = self.show(reading, NO_MAP, black, white, 0, outlined)
        choice = gr.Radio(names, value=NO_MAP)
        judged = _table(reading)
        return ["", reading, gr.Column(visible=True), judged, choice, pointing, _similar(reading), picture]


def draw_picture(
    reading: RadiographReading, black: float, white: float, heat: np.ndarray | None, opacity: float, outlined: bool
) -> Image.Image:
    """Draw the window of grey levels, the heat map over it (opaque where it is high), and outlines."""
    grey = np.clip((reading.gray.astype(np.float32) - black) / max(white - black, 1), 0, 1)
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    if heat is not None:
        cover = (opacity * heat)[:, :, None]
        colour = (1 - cover) * colour + cover * colormaps["turbo"](heat)[:, :, :3]
    pixels = np.round(colour * 255).astype(np.uint8)
    if outlined:
        for number, border in enumerate(reading.outlines.values()):
            pixels[border] = OUTLINE_COLOURS[number % len(OUTLINE_COLOURS)]
    return Image.fromarray(pixels)


def _image(picture: Image.Image, description: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description)}">'


def _describe(reading: RadiographReading, finding: str) -> str:
    outlines = f", outlines of {', '.join(reading.outlines)}" if reading.outlines else ""
    return f"Radiograph{'' if finding == NO_MAP else f', heat map of {finding}'}{outlines}"


def _say_pointing(reading: RadiographReading, finding: str, heat: np.ndarray | None) -> str:
    if heat is None:
        return ""
    (known,) = (each.pointing for each in reading.findings if each.name == finding)
    text = (
        f"Heat map: {known}." if known else "Nobody has measured whether heat maps of this model point at this finding."
    )
    return f"<p>{escape(text)}{'' if heat.any() else ' This one is zero everywhere.'}</p>"


def _table(reading: RadiographReading) -> str:
    """The findings as a table, and the warnings above it."""
    parts = []
    if reading.unlike:
        parts.append(
            '<p class="warning" role="alert">Unlike anything seen: this image is less similar to the known images than '
            "95 % of the validation images are. Do not trust what follows.</p>"
        )
    if reading.note:
        parts.append(f'<p class="warning" role="alert">Look at this picture first: {escape(reading.note)}.</p>')
    if reading.answer:
        parts.append(f"<p>Answer: <strong>{escape(reading.answer)}</strong></p>")
    rows = "".join(map(_row, reading.findings))
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Finding", "Probability", "Answer"))
    parts.append(f'<table class="findings"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')
    return "".join(parts)


def _row(finding: JudgedFinding) -> str:
    threshold = "" if finding.threshold is None else f"<br>threshold {finding.threshold:.1%}"
    band = "" if finding.band is None else f"<br>unsure from {finding.band[0]:.1%} to {finding.band[1]:.1%}"
    probability = "not calibrated" if finding.probability is None else f"{finding.probability:.1%}{threshold}"
    cells = (probability, f"{escape(finding.answer)}{band}")
    return f'<tr><th scope="row">{escape(finding.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _similar(reading: RadiographReading) -> str:
    """The most similar known images."""
    if not reading.neighbours:
        return ""
    items = []
    for near in reading.neighbours:
        picture = "" if near.picture is None else _image(near.picture, "similar radiograph")
        items.append(
            f"<li>{picture}<div>image {near.row}, cosine {near.cosine:.3f}</div><div>{escape(near.findings)}</div></li>"
        )
    return f'<h2>Similar known images</h2><ol class="similar">{"".join(items)}</ol>'
