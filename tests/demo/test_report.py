r"""The report of the demo: its sentences, and the page in a browser."""

import base64
import dataclasses
import io
import math
import os
import pathlib
import re
import shutil

import pytest
import torch

from flowguard.demo import page as html
from flowguard.demo import report
from flowguard.demo.run import TASKS, DemoOptions, Result, Sampled, Trained, artefact_mask
from flowguard.demo.task import Question
from flowguard.training import TrainingResult

for package in ("matplotlib", "PIL"):
    pytest.importorskip(package)

Image = pytest.importorskip("PIL.Image")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Two untrained flows, of which one is made to break on one condition."""
    torch.manual_seed(0)
    task = TASKS["superres"]
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 16, 24)  # smooth: bicubic does not overshoot
    named = {"quiet": ramp, "gain 5": 5 * ramp, 'odd <b>&"': ramp.flip(-1)}
    conditions = [Question(name, image) for name, image in named.items()]
    models, sampled = {}, [{} for _ in conditions]
    for name in ("affine", "robust"):
        model = task.build(name, quick=True).eval()
        model.conditioner.fit([torch.rand(1, 3, 16, 24) for _ in range(4)], progress=False)
        model.conditioner.calibrate([torch.rand(8, 3, 8, 8)] * 3, progress=False)
        training = TrainingResult([4.0, 3.0], 20.0, 0, 12.0)
        held_out = {"bits_per_dim": 3.0, **dict.fromkeys(task.columns, 30.0)}
        certified = math.inf if name == "affine" else 5.25
        models[name] = Trained(model, training, held_out, certified, 2.0, 0.1, 0.1)
        for question, by_model in zip(conditions, sampled, strict=True):
            x = model.sample(question.image, 1, 0.0)[0]  # untrained it adds nothing
            if (name, question.name) == ("affine", "gain 5"):
                x[..., :16, :] = 1e9
                x[0, 0, 0, 0] = torch.nan
            mask = artefact_mask(x, question.image)
            by_model[name] = Sampled(x, mask, model.conditioner.report)
    baseline = dict.fromkeys(("psnr", "ssim"), 29.0)
    out = tmp_path_factory.mktemp("report")
    return Result(DemoOptions(out, steps=2), baseline, models, conditions, sampled)


@pytest.fixture(scope="module")
def page(result):
    return report.page(result)


def test_the_finding_is_one_sentence_at_the_top(result, page):
    lead = re.search(r'<h1>[^<]*</h1><p class="lead">([^<]*)</p>', page)[1]
    assert lead == report.finding(result.sampled)
    assert "Of 3 conditions the flows break: affine on 1 (artefacts in up to 25 % of the" in lead
    assert "values without end); robust on none (values up to 5)" in lead


def test_the_guard_is_said_to_have_known_only_of_what_it_flagged(result):
    assert "flags every condition on which there are artefacts" in report.foreseen(result.sampled)
    calm = [{n: by["robust"] for n in by} for by in result.sampled]
    assert report.foreseen(calm) == ""


def test_the_failing_condition_comes_first_and_the_rest_is_folded(page):
    first, rest = page.split("<details>", 1)
    assert re.findall(r"<h2[^>]*>([^<]*)", first)[0] == "In one picture: gain 5"
    assert first.count('class="card"') == 1
    assert rest.count('class="card"') == 2
    assert "odd &lt;b&gt;&amp;&quot;" in rest


def test_many_failing_conditions_are_folded_too(result):
    many = [result.conditions[1]] * 6
    made = report.cards(result.task, many, [result.sampled[1]] * 6, "gain 5")
    first, *folded = made.split("<details>")
    assert first.count('class="card"') == 1 + report.OPEN
    assert len(folded) == 5 - report.OPEN
    assert folded[0].startswith("<summary>gain 5: affine: 25 % artefact pixels")


def test_conditions_are_explained(result):
    told = dataclasses.replace(result.conditions[1], meaning="the photograph, too bright")
    made = report.cards(result.task, [told], result.sampled[1:2], "gain 5")
    assert "<p>The photograph, too bright; affine: 25 %" in made


def test_quality_is_told_beside_what_needs_no_model(result, page):
    assert "at temperature 0: affine 30.00 dB, robust 30.00 dB; bicubic 29.00 dB." in page
    row = re.search(r'<th scope="row">bicubic</th>(.*?)</tr>', page)[1]
    assert re.findall(r"<td>(.*?)</td>", row)[0] == "29.00"  # in the column of temperature 0 too


def noisy(result, height, width):
    """One condition of which two flows make noise without end."""
    torch.manual_seed(0)
    x = 1e9 * torch.randn(1, 3, height, width)
    guard = result.sampled[0]["robust"].report
    broken = {name: Sampled(x, artefact_mask(x, x.new_zeros(1)), guard) for name in ("a", "b")}
    question = Question("noise", torch.randn(1, 3, height // 4, width // 4))

    def made(quality):
        return report.cards(result.task, [question], [broken], "", quality)

    return made


def test_a_page_is_small_enough_even_if_all_is_noise(result, monkeypatch):
    """What explodes hardly gets smaller by compression."""
    made = noisy(result, 64, 96)
    best = len(made(html.QUALITIES[0]))
    monkeypatch.setattr(html, "LIMIT", 9 * best // 10)
    assert len(html.fitting(made)) <= 9 * best // 10
    assert html.LIMIT < 3_000_000


def test_large_photographs_are_reduced_on_the_page(result):
    made = noisy(result, 16, 1300)(html.QUALITIES[0])
    files = re.findall(r'base64,([^"]*)', made)
    sizes = [Image.open(io.BytesIO(base64.b64decode(f))).size for f in files]
    assert max(width for width, _ in sizes) == report.WIDEST
    assert (report.WIDEST, 8) in sizes


def test_the_encoder_is_named_if_the_flows_share_one(result, page):
    assert "on top of the encoder" not in page
    options = dataclasses.replace(result.options, encoder=pathlib.Path("models") / "a<b>")
    shared = dataclasses.replace(result, options=options)
    assert shared.to_dict()["options"]["encoder"] == "a<b>"
    made = report.page(shared)
    assert "on top of the encoder of a&lt;b&gt;, which stays as it is;" in made


def test_scores_are_told_on_one_scale_and_the_floor_of_p_values_is_named(page):
    assert not re.search(r"\bp = ", page)
    assert "with 24 crops none is below 1/25" in page
    assert re.search(r"flagged by the guard \([^)]+ × its threshold\)", page)


def test_alt_texts_tell_the_outcome(page):
    assert 'alt="sample for gain 5, affine: 25 % artefact pixels' in page
    assert 'alt="sample for quiet, robust: no artefacts' in page
    assert 'alt="affine: its 25 % artefact pixels, in pink"' in page


def test_times_are_those_of_the_processor_unless_it_is_another_device(result):
    assert "12 CPU s" in report.table(result)
    options = DemoOptions(result.options.out, steps=2, device="cuda")
    other = Result(options, result.baseline, result.models, result.conditions, result.sampled)
    assert "20 s" in report.table(other)


def test_what_flows_couplings_and_artefacts_are_is_said(page):
    for word in ("flow", "coupling", "artefact", "guard", "certificate"):
        assert f"<dt>{word}</dt>" in page
    assert "An affine coupling multiplies by a scale" in page
    assert "B-spline" not in page  # of couplings that are not there nothing is said


# -- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    """Chromium at the page, or the reason why not."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("there is no Chromium with its chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page, encoding="utf-8")
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver, env={**os.environ}))
    try:
        chrome.get(file.as_uri())
        yield chrome
    finally:
        chrome.quit()


def screen(browser, width, dark=False):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def test_a_browser_shows_all_pictures_and_complains_of_nothing(browser):
    broken = "return [...document.images].filter(i => !i.naturalWidth || !i.alt).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") > 20
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_a_slider_moves_between_affine_and_robust(browser):
    assert browser.execute_script("return document.querySelectorAll('.slider').length") == 3
    moved = """
    const range = document.querySelector('.slider input');
    range.value = 20; range.dispatchEvent(new Event('input'));
    const stack = range.parentNode, over = stack.querySelector('img.over');
    return [getComputedStyle(over).clipPath, range.getAttribute('aria-valuetext'),
            [...stack.querySelectorAll('b')].map(b => b.textContent),
            over.src === document.querySelector('img[data-side=robust]').src];
    """
    clip, told, labels, same = browser.execute_script(moved)
    assert "20%" in clip
    assert told == "20 % affine"
    assert labels == ["affine", "robust"]
    assert same


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_no_wider_than_the_screen(browser, width):
    screen(browser, width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script(
        "return [...document.querySelector('.plates').querySelectorAll('img')]"
        ".map(i => [Math.round(i.clientWidth), Math.round(i.clientHeight)].join('x'))"
    )
    assert len(sizes) == 7
    assert len(set(sizes)) == 1


def test_the_page_is_dark_where_all_is(browser):
    def paper():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    screen(browser, 1200)
    light = paper()
    screen(browser, 1200, dark=True)
    assert paper() == "rgb(22, 22, 22)"
    assert light != paper()
