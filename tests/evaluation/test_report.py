"""report.html, as text and as a real Chromium shows it, and the log of the training run that it draws."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from browser import Browser, find_chromium
from reports import RUN

from evaluation import report, tables


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_page_is_one_file_and_names_in_it_are_text(judged):
    """A page that asks the network, a file name that becomes markup, a rung without its pictures."""
    tags = Tags(judged.page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, _ in tags if tag in ("b", "i", "iframe", "object")]
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in judged.page
    assert "&lt;script&gt;" in judged.page
    assert "two\\nlines" in judged.page
    images = [attributes for tag, attributes in tags if tag == "img"]
    of_strips = 4 * (1 + 3 * 5)  # the original; picture, difference and latents of every rung
    assert len(images) == of_strips + 1
    assert all(image["alt"] for image in images[:-1])
    assert len(judged.page) < 2_000_000


def test_training_curves_are_drawn_from_the_runs_logs(judged):
    """A step that was evaluated twice and is drawn twice; a curve of another metric, or without its losses."""
    section = judged.page.split("<h2>Training</h2>")[1].split("</section>")[0]
    assert section.count('role="img"') == 3
    assert "aligned: from 10 at 0 to 12 at 200" in section
    assert "99" not in re.sub(r'"[^"]*"', "", section.split("<svg")[1])
    assert "loss: from 1 at 0 to 0.2 at 4" in section


def test_logs_that_are_missing_damaged_or_older_are_read_as_far_as_they_go(tmp_path):
    """A report that fails for want of a log, or a name in a checkpoint that leads out of the log folder; curves that go missing
    after an update: older runs wrote no losses, and called VAE2's own reconstruction otherwise."""
    content = {"run": RUN, "config": {"log_dir": "elsewhere"}}
    checkpoint = tmp_path / "ckpt" / "align_pipeline_20260101_000000.pth"
    assert report.read_curves(checkpoint, content) is None
    folder = tmp_path / "elsewhere" / RUN  # moved together with the checkpoints
    folder.mkdir(parents=True)
    assert report.read_curves(checkpoint, content) is None
    (folder / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x", "ladder": 3}\n{"step": 1, "ladder": {"aligned": 5}}\n{"step": 2, "loss": "x"}\n'
    )
    assert report.read_curves(checkpoint, content) is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "ladder": {"aligned": {"psnr": 20, "ssim": NaN}}}\n')
    assert report.read_curves(checkpoint, content)["evaluations"] == {"aligned": {"psnr": [(1, 20)]}}
    for run in (None, 5, "", "../" + RUN):
        assert report.run_folder(checkpoint, {**content, "run": run}) is None
    entries = [{"step": 4, "epoch": 1.0, "ladder": {"ceiling": {"psnr": 30.0}, "aligned": {"psnr": 20.0}}}]
    curves = report.evaluation_curves(entries)
    assert curves == {"vae2": {"psnr": [(4, 30.0)]}, "aligned": {"psnr": [(4, 20.0)]}}
    assert report.loss_curve(entries) == []


def test_a_long_runs_loss_is_thinned_out_evenly(tmp_path):
    """A page of many megabytes from a run of a million steps; a curve that is cut off instead."""
    lines = [json.dumps({"step": step, "loss": float(step), "learning_rate": 0.1}) for step in range(5000)]
    (tmp_path / "training.jsonl").write_text("\n".join(lines))
    points = report.loss_curve(report.read_lines(tmp_path / tables.TRAINING_FILE))
    assert 1000 < len(points) <= report.LONGEST_CURVE
    assert points[-1][0] > 4990
    assert {second[0] - first[0] for first, second in itertools.pairwise(points)} == {3}


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if not program:
        pytest.skip("no Chromium here")
    try:
        started = Browser(program)
    except (RuntimeError, TimeoutError) as error:
        pytest.skip(f"Chromium does not start here: {error}")
    with started:
        yield started


@pytest.mark.browser
def test_page_in_a_browser_shows_the_figures_and_asks_for_nothing(judged, browser):
    """Figures that are rounded away or in another column; a script that the page's own policy refuses."""
    browser.resize(1280)
    browser.open(judged.out / "report.html")
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.endswith("/report.html")] == []
    assert browser.run("window.hacked") is None
    cells = browser.run(
        "Object.fromEntries([...document.querySelectorAll('td[data-row]')]"
        ".map(cell => [cell.dataset.row + ' ' + cell.dataset.metric, cell.innerText]))"
    )
    ladder = judged.metrics["ladder"]
    for row, figures in ladder.items():
        for metric, digits in (("psnr", 2), ("ssim", 4), ("latent_mse", 4), ("latent_cosine", 4)):
            shown = cells[f"{row} {metric}"].split(" ±")[0].strip()
            assert (None if shown == "–" else float(shown.replace("−", "-"))) == (
                None if figures[metric] is None else pytest.approx(figures[metric], abs=0.51 * 10**-digits)
            ), (row, metric)
    assert cells["vae1 latent_mse"] == cells["vae2 psnr_vs_vae2"] == "–"
    assert browser.run("document.querySelector('.verdict').innerText").count(judged.metrics["verdict"]["sentences"][0]) == 1
    assert browser.run("[...document.images].every(image => image.alt === '' || image.naturalWidth > 0)")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone_and_is_readable_in_the_dark(judged, browser, dark):
    """A table or a long name that makes the page scroll sideways; PSNR or cost out of sight; dark text on a dark page."""
    browser.resize(390, dark=dark)
    browser.open(judged.out / "report.html")
    assert browser.run("(each => each.scrollWidth - each.clientWidth)(document.querySelector('.scroll'))") == 0
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= browser.run("window.innerWidth") == 390
    brightness = "(name => getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3)"
    paper, ink = (browser.run(f"{brightness}({name!r})") for name in ("backgroundColor", "color"))
    assert paper - ink < -150 if dark else paper - ink > 150


@pytest.mark.browser
def test_zoom_works_by_keyboard(judged, browser):
    """Pictures that only a mouse enlarges: Enter opens, arrows step, Escape closes, and the focus is back where it was."""
    browser.resize(1280)
    browser.open(judged.out / "report.html")
    shown = "document.querySelector('dialog p').innerText"
    alts = browser.run("[...document.querySelectorAll('.shot img')].map(image => image.alt)")
    per_strip = len(alts) // 4
    browser.run("document.querySelectorAll('.shot')[1].focus()")
    assert browser.run("document.querySelector('dialog').open") is False
    browser.press("Enter")
    assert browser.run("document.querySelector('dialog').open") is True
    steps = {"ArrowRight": 2, "ArrowLeft": 1, "ArrowDown": 1 + per_strip, "ArrowUp": 1}
    for key, place in steps.items():
        browser.press(key)
        assert browser.run("document.querySelector('dialog img').alt") == alts[place], key
        assert browser.run(shown).split() == alts[place].split()
    browser.press("Escape")
    assert browser.run("document.querySelector('dialog').open") is False
    assert browser.run("[...document.querySelectorAll('.shot')].indexOf(document.activeElement)") == 1
    assert browser.complaints() == []
