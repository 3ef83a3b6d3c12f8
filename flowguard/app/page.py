r"""The page: sliders before what is shown, and a server for it.

Nothing of a visitor is kept: a photograph is deleted as soon as it is read, pictures are sent in the
page and never written, and what the server may have put into its temporary folder goes with it.
"""

__all__ = ["CSS", "build", "serve", "taken"]

import contextlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flowguard.hosts import install
from flowguard.io.pictures import ImageError
from flowguard.ood import OODContextWarning

from . import drawing, words
from .address import place
from .answers import Partner
from .conditions import (
    EXAMPLES,
    MODES,
    Changes,
    Photograph,
    changed,
    darkened,
    enlarged_from,
    example,
    opened,
)
from .panels import Asked, panel
from .toy import REACH, drawn

#: The style of the page.
CSS = """
.fg-row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(230px, 100%), 1fr)); gap: 12px }
.fg-row figure { margin: 0; min-width: 0 }
.fg-row figcaption { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere }
.fg-row img, .fg-row svg { width: 100%; max-width: 560px; height: auto; display: block }
.fg-row img.sharp { image-rendering: pixelated }
.fg-row svg, svg.fg-plane { background: #fff }
.fg-row svg rect, svg.fg-plane rect { fill: none; stroke: #999; stroke-width: .08 }
.fg-row circle.in { fill: #2b6cb0 } .fg-row circle.out { fill: #d33 }
svg.fg-plane { width: 100%; max-width: 380px; touch-action: none; cursor: crosshair; display: block }
svg.fg-plane path { stroke: #ddd; stroke-width: .06 } svg.fg-plane polygon { fill: #4d8a5366; stroke: #4d8a53; stroke-width: .1 }
svg.fg-plane circle { fill: #d33 }
.fg-told { margin: 8px 0; overflow-wrap: anywhere }
.fg-told.wrong { border-left: 4px solid #d33; padding-left: 8px }
.fg-told.flagged { border-left: 4px solid #d98200; padding-left: 8px }
.fg-bar { max-width: 560px; margin: 10px 0; font-size: 12px }
.fg-bar > div:first-child { height: 14px }
.fg-bar > div + div { position: relative; height: 18px } .fg-bar span { position: absolute; transform: translateX(-50%) }
.fg-bar span:first-child { transform: none } .fg-bar span:last-child { transform: translateX(-100%) }
"""

#: Moves the condition of the toy to where it is dragged, and tells the server.
#: What moves the condition of the toy with a mouse or a finger.
DRAG = """
let held = false, x = 0, y = 0, told = 0;
function tell() {
  told = performance.now();
  trigger('input', {first: Math.round(20 * x) / 20, second: Math.round(20 * y) / 20});
}
function move(event) {
  const svg = element.querySelector('svg');
  const box = svg.getBoundingClientRect();
  const at = (value) => Math.max(-REACH, Math.min(REACH, value));
  x = at(REACH * (2 * (event.clientX - box.left) / box.width - 1));
  y = at(REACH * (1 - 2 * (event.clientY - box.top) / box.height));
  const dot = svg.querySelector('circle');
  dot.setAttribute('cx', x); dot.setAttribute('cy', -y);
  if (performance.now() - told > 150) tell();
}
function drop() {
  if (held) tell();
  held = false;
}
element.addEventListener('pointerdown', (event) => {
  if (event.target.closest('svg')) { held = true; move(event); event.preventDefault(); }
});
window.addEventListener('pointermove', (event) => { if (held) move(event); });
window.addEventListener('pointerup', drop);
window.addEventListener('pointercancel', drop);
""".replace("REACH", f"{REACH:g}")

#: What is said before there is a photograph.
NOTHING = "Drop a photograph, or choose an example."
_KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_KEPT = 3600.0  # seconds after which a photograph that nobody asks of is forgotten
_SWEEP = (60, 300)  # seconds between two looks for files left behind, and their age
_DIRECT = ("127.0.0.1", "localhost", "::1")  # never by a proxy


def gradio() -> Any:
    r"""Returns the library of the page.

    Raises:
        ImportError: If it is not installed, with how to install it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the page needs gradio: {install('app')}") from error
    return gradio


def taken(path: str | None) -> tuple[Photograph | None, str]:
    r"""Reads a photograph that was dropped, and deletes its file.

    Arguments:
        path: The file; :py:`None` if there is none.

    Returns:
        The photograph, if it can be read, and a sentence as HTML.
    """
    if path is None:
        return None, drawing.sentence(NOTHING)
    file = Path(path)
    try:
        photograph = opened(file)
    except (ImageError, ImportError, OSError, MemoryError) as error:
        told = f"{file.name} cannot be used: {str(error).rstrip('.')}; a PNG, JPEG, TIFF, WebP or BMP will do."
        return None, drawing.sentence(told, kind="wrong")
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of others, which lie in it
            file.parent.rmdir()
    return photograph, drawing.sentence(f"{file.name}: {photograph.told}")


def _chosen(name: str | None) -> tuple[Photograph | None, str]:
    if name is None:
        return None, drawing.sentence(NOTHING)
    try:
        photograph = example(name)
    except (ImportError, FileNotFoundError, ValueError) as error:
        return None, drawing.sentence(str(error), kind="wrong")
    return photograph, drawing.sentence(f"{name}: {photograph.told}")


def _telling(make: Callable[..., str]) -> Callable[..., str]:
    r"""Answers by a sentence what cannot be answered by pictures."""

    def told(photograph: Photograph | None, *values: Any) -> str:
        if photograph is None:
            return drawing.sentence(NOTHING)
        if any(value is None for value in values):  # a number that was deleted
            return drawing.sentence("Every slider must have a number; one has none.", kind="wrong")
        try:
            return make(photograph, *values)
        except (ValueError, RuntimeError, MemoryError, ImportError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            return drawing.sentence(f"There is no answer: {line}", kind="wrong")

    return told


def asked_to_enlarge(
    photograph: Photograph, scale: int, mode: str, changes: Changes, temperature: float, seed: int
) -> Asked:
    r"""Returns what super-resolution flows are asked.

    Arguments:
        photograph: The photograph.
        scale: How many times it is enlarged.
        mode: One of :data:`flowguard.app.conditions.MODES`.
        changes: What is done to the condition.
        temperature: The standard deviation of the noise.
        seed: The seed of the noise.
    """
    small = enlarged_from(photograph, scale, mode)
    truth = photograph.colour if mode == MODES[0] else None
    y = changed(small.colour, changes, seed)
    return Asked(y, small.told, truth, temperature, seed)


def build(superres: Sequence[Partner], lowlight: Sequence[Partner], note: str = "") -> Any:
    r"""Returns the page, which no server serves yet.

    Arguments:
        superres: The super-resolution flows; see :func:`flowguard.app.answers.partners`.
        lowlight: The low-light flows; none leaves the tab out.
        note: What is said below the title, such as how to get a partner that is missing.

    Raises:
        ImportError: If gradio is not installed.
    """
    gr = gradio()
    with gr.Blocks(title="flowguard", analytics_enabled=False, delete_cache=_SWEEP) as blocks:
        gr.Markdown("# flowguard\nSpoil a condition, and see which flow explodes.")
        if note:
            gr.HTML(drawing.sentence(note))
        with gr.Tab("Enlarge", id="superres"):
            _enlarge_tab(gr, superres)
        if lowlight:
            with gr.Tab("Brighten", id="lowlight"):
                _brighten_tab(gr, lowlight)
        with gr.Tab("Two numbers", id="toy") as tab:
            _toy_tab(gr, tab)
    return blocks


def _source(gr: Any) -> tuple[Any, Any, Any, Any]:
    r"""What a photograph comes from, where it is kept, and what is said of it."""
    file = gr.File(label="Drop a photograph, or choose one", file_types=list(_KINDS), height=160)
    name = gr.Dropdown(list(EXAMPLES), value=None, label="or an example")
    held = gr.State(None, time_to_live=_KEPT)
    told = gr.HTML(drawing.sentence(NOTHING))
    return file, name, held, told


def _sliders(gr: Any, temperature: float) -> list[Any]:
    r"""What is done to the condition, and the noise of the flow."""
    return [
        gr.Slider(0, 10, 1, step=0.1, label="gain", info="what the condition is multiplied by"),
        gr.Slider(0, 1, 0, step=0.01, label="noise", info="its standard deviation"),
        gr.Slider(0, 5, 0, step=0.1, label="blur", info="its standard deviation, in pixels"),
        gr.Slider(1, 100, 100, step=1, label="JPEG quality", info="96 and more: no JPEG"),
        gr.Slider(0, 2, 0, step=0.05, label="inversion", info="1 is the negative"),
        gr.Slider(0, 1.5, temperature, step=0.05, label="temperature", info="of the flow's noise"),
    ]


def _changes(gain: float, noise: float, blur: float, quality: float, inversion: float) -> Changes:
    return Changes(blur, gain, inversion, noise, int(quality))


def _wire(
    gr: Any, source: tuple[Any, Any, Any, Any], settings: Sequence[Any], make: Callable[..., str]
) -> None:
    r"""Connects a source of photographs and settings to the pictures that are made of them."""
    file, name, held, told = source
    again = gr.Button("Sample again", variant="primary")
    seed = gr.State(0)
    shown = gr.HTML(elem_classes="fg-shown")
    ask: dict[str, Any] = {
        "fn": _telling(make),
        "inputs": [held, seed, *settings],
        "outputs": shown,
        "concurrency_limit": 1,
        "concurrency_id": "models",  # two visitors wait for each other, not for half the cores
        "api_visibility": "private",
    }

    def from_file(path: str | None) -> tuple[Any, ...]:
        photograph, line = taken(path)
        return None, None, photograph, line  # the drop zone is free again, no example is chosen

    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    file.upload(from_file, file, [file, name, held, told], **quiet).then(**ask)
    name.input(_chosen, name, [held, told], **quiet).then(**ask)
    again.click(lambda n: n + 1, seed, seed, **quiet).then(**ask)
    for setting in settings:
        on = setting.release if isinstance(setting, gr.Slider) else setting.input
        on(**ask, trigger_mode="always_last")


def _enlarge_tab(gr: Any, partners: Sequence[Partner]) -> None:
    scale = partners[-1].model.scale
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = _source(gr)
            mode = gr.Radio(
                list(MODES), value=MODES[0], label=f"before it is enlarged {scale} times"
            )
            sliders = _sliders(gr, 0.8)

            def make(photograph: Photograph, seed: int, mode: str, *values: float) -> str:
                *of_condition, temperature = values
                asked = asked_to_enlarge(
                    photograph, scale, mode, _changes(*of_condition), temperature, seed
                )
                return panel(partners, asked)

        with gr.Column(scale=3, min_width=300):
            _wire(gr, source, [mode, *sliders], make)


def _brighten_tab(gr: Any, partners: Sequence[Partner]) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source = _source(gr)
            exposure = gr.Slider(
                0.02, 1, 0.06, step=0.02, label="light",
                info="1 for a photograph that is dark already",
            )  # fmt: skip
            sliders = _sliders(gr, 0.0)

            def make(photograph: Photograph, seed: int, light: float, *values: float) -> str:
                *of_condition, temperature = values
                dark = darkened(photograph, light, seed)
                y = changed(dark.colour, _changes(*of_condition), seed)
                truth = None if light == 1 else photograph.colour
                return panel(partners, Asked(y, dark.told, truth, temperature, seed))

        with gr.Column(scale=3, min_width=300):
            _wire(gr, source, [exposure, *sliders], make)


def _toy(first: float, second: float) -> tuple[str, str]:
    r"""The samples of the toys, and what the guard says, as HTML."""
    made = drawn(first, second)
    kind = "flagged" if bool(made.report.flagged[0]) else ""
    return drawing.toy_row(made), drawing.sentence(words.chance(made.report), kind=kind)


def _toy_tab(gr: Any, tab: Any) -> None:
    gr.Markdown(
        "The same in the plane: two moons, turned by the condition's first number and scaled by its"
        " second. Training knew the conditions in the green parallelogram. Drag the red one out of"
        " it."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            plane = gr.HTML(drawing.plane(0, 0), js_on_load=DRAG, elem_classes="fg-drag")
            numbers = [
                gr.Slider(-REACH, REACH, 0, step=0.05, label=label)
                for label in ("first number", "second number")
            ]
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(
                drawing.sentence("Both flows are trained when this is first opened: some seconds.")
            )
            told = gr.HTML()

    def from_sliders(first: float | None, second: float | None) -> tuple[str, str, str]:
        first, second = first or 0.0, second or 0.0
        return drawing.plane(first, second), *_toy(first, second)

    def from_plane(event: gr.EventData) -> tuple[float, float, str, str]:
        first, second = float(event.first), float(event.second)
        return first, second, *_toy(first, second)

    how = {"concurrency_id": "toy", "concurrency_limit": 1, "api_visibility": "private"}
    last = {"show_progress": "hidden", "trigger_mode": "always_last", **how}
    tab.select(from_sliders, numbers, [plane, shown, told], **how)
    for number in numbers:
        number.input(from_sliders, numbers, [plane, shown, told], **last)
    # All are answered, in turn: of the last event alone gradio forgets what came with it.
    each = {"show_progress": "hidden", "trigger_mode": "multiple", **how}
    plane.input(from_plane, None, [*numbers, shown, told], **each)


@contextlib.contextmanager
def _private_folder(host: str) -> Iterator[Path]:
    r"""A temporary folder for the server alone, which is removed in the end, with surroundings in
    which it asks no other server."""
    folder = Path(tempfile.mkdtemp(prefix="flowguard-app-"))
    names = {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": ",".join(
            filter(None, (os.environ.get("no_proxy"), host.strip("[]"), *_DIRECT))
        ),
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield folder
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def serve(
    make: Callable[[], Any],
    host: str = "127.0.0.1",
    port: int | None = None,
    ready: Callable[[str], None] = print,
    until: Callable[[], object] | None = None,
) -> None:
    r"""Serves a page until it is told to end.

    On an address that this machine alone can reach, requests for other names than those of the
    machine are refused; see :mod:`flowguard.app.address`.

    Arguments:
        make: Returns the page; it is called once all is prepared for it.
        host: The address to listen on.
        port: The port; the first free one from 7860 if :py:`None`.
        ready: Is told the address, once the page can be opened.
        until: Returns when the page shall end; by default never.

    Raises:
        ValueError: If the address is none of this machine.
        OSError: If the port cannot be listened on.
        ImportError: If gradio is not installed.
    """
    where = place(host, port)
    with _private_folder(where.host), warnings.catch_warnings():
        gr = gradio()
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        warnings.simplefilter("ignore", OODContextWarning)  # the page tells
        fonts = ["system-ui", "sans-serif"]
        theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=where.names, www_redirect=False)
        blocks = make()
        try:
            _, address, _ = blocks.queue(max_size=32).launch(
                server_name=where.host,
                server_port=where.port,
                app_kwargs={"middleware": [trusted]},
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,  # else the browser keeps what was asked
                enable_monitoring=False,
                mcp_server=False,
                footer_links=[],
                max_file_size="100mb",
                theme=theme,
                css=CSS,
            )
            ready(address.replace("[::]", "localhost"))  # which no browser opens
            (until or threading.Event().wait)()
        finally:
            blocks.close(verbose=False)
