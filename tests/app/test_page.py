r"""The page in a real browser, where there is one, and what is behind it."""

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from flowguard.app import page
from flowguard.app.answers import partners
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow

pytest.importorskip("gradio", reason="gradio is not installed: the extra app")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")
IPV6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="there is no IPv6 here")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 300  # seconds for what takes one: it is there for machines that are busy


def guarded(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.conditioner.fit(0.5 + 0.1 * torch.rand(16, 3, 16, 16), progress=False)
        model.conditioner.calibrate(0.5 + 0.1 * torch.rand(49, 3, 16, 16), progress=False)
    return model


def small(coupling="robust", **options):
    return guarded(
        SuperResolutionFlow(levels=1, steps=1, hidden=8, features=8, coupling=coupling, **options)
    )


def photograph(path, width, height):
    rows = np.linspace(0, 200, height, dtype=np.uint8)[:, None, None]
    Image.fromarray(np.broadcast_to(rows, (height, width, 3)).copy()).save(path)
    return path


# -- without a browser ---------------------------------------------------------------------------


def test_a_photograph_is_deleted_once_it_is_read(tmp_path):
    folder = tmp_path / "hash"
    folder.mkdir()
    found, told = page.taken(str(photograph(folder / "a.png", 30, 20)))
    assert found.colour.shape == (3, 20, 30)
    assert "a.png: 30 × 20 pixels" in told
    assert not folder.exists()


def test_a_broken_file_is_answered_by_a_sentence_and_deleted_too(tmp_path):
    file = tmp_path / "<b>.png"
    file.write_bytes(b"no picture")
    found, told = page.taken(str(file))
    assert found is None
    assert "&lt;b&gt;.png cannot be used: it is no picture, or of an unknown kind;" in told
    assert not file.exists()


def test_the_page_is_built_without_a_partner_too():
    (robust,) = partners(small())
    made = page.build([robust], [], "a note & more")
    assert "a note &amp; more" in json.dumps(made.get_config_file(), default=str)
    assert made.analytics_enabled is False


def test_the_private_folder_is_gone_in_the_end(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    (robust,) = partners(small())
    seen = []

    def look():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (folder / "left").write_text("x")
        seen.append(folder)

    page.serve(lambda: page.build([robust], []), ready=lambda _: None, until=look)
    assert seen
    assert not seen[0].exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


def answers(address, hosts):
    r"""The status that a server answers with, by the name that it is asked for."""
    where, found = urlsplit(address), {}
    for host in hosts:
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=PATIENCE)
        connection.request("GET", "/config", headers={"Host": host.format(where.port)})
        response = connection.getresponse()
        found[host] = response.status, b"Spoil a condition" in response.read()
        connection.close()
    return found


OTHERS = ("evil.example", "evil.example:{}", "127.0.0.1.evil.example", "192.0.2.1", "0.0.0.0", "")
OWN = ("localhost", "localhost:{}", "127.0.0.1:{}", "127.0.0.1:1", "[::1]:{}", "LOCALHOST:{}")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", pytest.param("::1", marks=IPV6), "0.0.0.0"]
)
def test_names_of_others_are_not_answered_to_where_this_machine_alone_is(host):
    (robust,) = partners(small())
    told, found = [], {}
    page.serve(
        lambda: page.build([robust], []),
        host,
        ready=told.append,
        until=lambda: found.update(answers(told[0], OWN + OTHERS)),
    )
    assert {name: found[name] for name in OWN} == dict.fromkeys(OWN, (200, True))
    wanted = (200, True) if host == "0.0.0.0" else (400, False)
    assert {name: found[name] for name in OTHERS} == dict.fromkeys(OTHERS, wanted)


# -- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("app")
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    dark = guarded(LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder))
    models = {"robust": small(), "affine": small("affine", margin=None), "dark": dark}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "tmp").mkdir()
    photograph(folder / "wide.png", 96, 64)
    photograph(folder / "tall.png", 64, 80)
    photograph(folder / "large.jpg", 4000, 3000)
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def chrome():
    pytest.importorskip("selenium", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no Chromium with its chromedriver here")
    return browser, driver


@pytest.fixture(scope="module")
def server(folder, chrome):
    command = [sys.executable, "-m", "flowguard", "app", "--threads", "1"]
    command += ["--model", folder / "robust", "--affine", folder / "affine"]
    command += ["--lowlight-model", folder / "dark"]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    line = process.stdout.readline()
    assert "open http://127.0.0.1:" in line
    yield line.split("open ")[1].split(";")[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    left = [f for f in (folder / "tmp").rglob("*") if "flowguard-app" in str(f)]
    assert left == []
    assert not (folder / "tmp" / "gradio").exists()


class Visitor:
    r"""A browser on the page."""

    def __init__(self, chrome, address, profile, width=1280, height=900):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        binary, driver = chrome
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument(f"--window-size={width},{height}")
        if width < 500:
            metrics = {"width": width, "height": height, "pixelRatio": 1.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=Service(driver))
        self.browser.set_page_load_timeout(PATIENCE)
        self.browser.get(address)
        self.until(lambda: self.all("input[type=file]"))

    def all(self, css):
        return [e for e in self.browser.find_elements("css selector", css)]

    def seen(self, css):
        return [e for e in self.all(css) if e.is_displayed()]

    def until(self, question):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                answer = question()
            except (StaleElementReferenceException, IndexError):
                answer = None
            if answer:
                return answer
            time.sleep(0.1)
        raise AssertionError(f"the page did not show it: {self.browser.page_source[:2000]}")

    def tab(self, name):
        self.until(lambda: [t for t in self.seen("button[role=tab]") if t.text == name])[0].click()

    def text(self):
        return self.browser.find_element("tag name", "body").text

    def says(self, words):
        self.until(lambda: words in self.text())

    def shown(self):
        r"""What is shown, once nothing is computed."""
        script = """
        const shown = [...document.querySelectorAll('.fg-shown')].find(e => e.offsetParent);
        const busy = shown && /processing|queue/.test(shown.parentElement.innerText);
        return shown && !busy ? shown.innerHTML : '';"""
        return self.until(lambda: self.browser.execute_script(script))

    def drop(self, file):
        box = next(e for e in self.all("input[type=file]") if self._is_shown(e))
        box.send_keys(str(file))

    def _is_shown(self, element):
        return self.browser.execute_script(
            "return arguments[0].closest('.block').offsetParent !== null", element
        )

    def type(self, label, value):
        (box,) = [
            e
            for e in self.seen("input[type=number]")
            if e.get_attribute("aria-label") == f"number input for {label}"
        ]
        box.clear()
        box.send_keys(f"{value}\t")

    def requests(self):
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]

    def picture(self, file, width):
        height = self.browser.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        made = self.browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        file.write_bytes(base64.b64decode(made["data"]))


@pytest.fixture(scope="module")
def open_page(server, chrome, tmp_path_factory):
    visitors = []

    def open_page(**options):
        profile = tmp_path_factory.mktemp("profile")
        visitors.append(Visitor(chrome, server, profile, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.browser.quit()


@pytest.fixture(scope="module")
def visitor(open_page):
    return open_page()


@pytest.fixture(scope="module")
def answered(visitor, folder):
    r"""A visitor who has dropped a photograph and was answered."""
    visitor.drop(folder / "wide.png")
    visitor.until(lambda: "robust. Certificate" in visitor.shown())
    return visitor


def test_a_photograph_is_answered(answered):
    shown = answered.shown()
    for name in ("condition", "photograph", "affine", "affine, its guard shrinks", "robust"):
        assert f'alt="{name}"' in shown
    assert 'alt="how strange, level1"' in shown
    assert 'aria-label="colour bar"' in shown
    assert "p = " in shown
    assert shown.count("Certificate: ") == 3
    answered.says("wide.png: 96 × 64 pixels")


def test_nothing_of_a_photograph_is_on_the_disk(answered, folder):
    kept = [f for f in (folder / "tmp").rglob("*") if f.is_file() and "flowguard-app" in str(f)]
    assert [f for f in kept if f.stat().st_size] == []


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("gain", 3),
        ("noise", 0.2),
        ("blur", 1.5),
        ("JPEG quality", 10),
        ("inversion", 1),
        ("temperature", 0.3),
    ],
)
def test_each_slider_changes_what_is_shown(label, value, answered):
    before = answered.shown()
    answered.type(label, value)
    answered.until(lambda: answered.shown() != before)


def test_a_broken_file_is_answered_by_a_sentence(answered, folder):
    answered.drop(folder / "broken.png")
    answered.says("broken.png cannot be used: ")
    answered.says("Drop a photograph, or choose an example.")


def test_a_photograph_of_twelve_megapixels_is_reduced(answered, folder):
    answered.drop(folder / "large.jpg")
    answered.says("large.jpg: 4000 × 3000 pixels, reduced to 724 × 543")
    answered.until(lambda: "reduced 4 times to 181 × 135" in answered.shown())


def test_two_visitors_are_answered_at_once_each_with_what_is_theirs(answered, open_page, folder):
    other = open_page()
    answered.drop(folder / "wide.png")
    other.drop(folder / "tall.png")
    other.until(lambda: "reduced 4 times to 16 × 20" in other.shown())
    answered.until(lambda: "reduced 4 times to 24 × 16" in answered.shown())
    assert "tall.png" not in answered.text()
    assert "wide.png" not in other.text()
    other.browser.quit()


def test_a_dark_photograph_is_answered(answered, folder):
    answered.tab("Brighten")
    answered.drop(folder / "wide.png")
    answered.until(lambda: 'alt="robust"' in answered.shown())
    assert "taken in the dark, with 0.06 of its light" in answered.shown()


def test_a_condition_that_is_dragged_away_makes_affine_samples_fly_off(answered):
    from selenium.webdriver.common.action_chains import ActionChains

    answered.tab("Two numbers")
    answered.until(lambda: len(answered.seen(".fg-row svg")) == 3)
    answered.says("all are in the frame")
    plane = answered.seen("svg.fg-plane")[0]
    far = int(0.47 * plane.size["width"])
    drag = ActionChains(answered.browser).move_to_element(plane).click_and_hold()
    drag.move_by_offset(far // 2, -far // 2).move_by_offset(far - far // 2, -far + far // 2)
    drag.release().perform()
    answered.says("have left the frame")
    answered.says("Out of distribution")


def test_all_that_is_asked_for_comes_from_the_server_itself(answered, server):
    asked = {url for url in answered.requests() if url.startswith(("http", "ws"))}
    assert asked
    assert [url for url in asked if not url.startswith(server)] == []


def test_the_page_fits_a_phone(open_page, folder):
    phone = open_page(width=390, height=844)
    phone.drop(folder / "wide.png")
    phone.until(lambda: "robust. Certificate" in phone.shown())
    width = phone.browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
    phone.picture(folder / "phone.png", 390)
    assert Image.open(folder / "phone.png").size[0] == 390
