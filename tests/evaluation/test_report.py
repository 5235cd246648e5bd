"""The report of eval_align.py: its files, the verdict, and the page as a real Chromium shows it."""

import csv
import json
import math
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from conftest import as_argv, make_photo
from PIL import Image
from runs import ONE_THREAD  # noqa: F401  one thread in this interpreter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import eval_align
from evaluation import charts, page, pictures, run_logs, tables
from evaluation.verdict import verdict
from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from vae_align import AlignConfig, AlignModule

HOSTILE = (
    "<img src=x onerror=window.hacked=1><script>",
    '"quo\'ted" & <b>',
    "two\nlines",
    "\udcff\udcfe raw",
    "=1+1,;",
    "長" * 60,
)
RUN = "align_20260101_000000"


def save_checkpoint(folder, vae_folders, names=("kl4", "kl16"), seed=0, **more):
    """A checkpoint of an untrained module that knows a linear map, for 32 px."""
    spaces = [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32), vae_folders[name]) for name in names]
    torch.manual_seed(seed)
    module = AlignModule(AlignConfig(hidden_channels=8, num_blocks=1))
    module.remember_ridge(*(torch.randn_like(each) * 0.1 for each in (module.ridge_weight, module.ridge_bias)))
    config = {
        "image_size": 32,
        "precision": "float32",
        "proxy": "http://proxy.invalid",
        "seed": 1,
        "log_dir": str(folder / "runs"),
    }
    return PipelineWithVAEs(module, *spaces).save_checkpoint(folder / "ckpt", config, 200, 2.0, {}, **more)


def write_logs(folder):
    """A run's logs: three evaluations, one of them twice, a line that was cut off; losses in an event file."""
    folder.mkdir(parents=True)
    steps = {0: 10.0, 100: 11.0, 200: 12.0}
    lines = [json.dumps({"step": 100, "epoch": 1.0, "ladder": {"aligned": {"psnr": 99.0}}})]
    for step, psnr in steps.items():
        ladder = {"aligned": {"psnr": psnr, "latent_mse": 1 / psnr}, "reencode": {"psnr": 11.5, "ssim": None}}
        lines.append(json.dumps({"step": step, "epoch": step / 100, "ladder": ladder}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 300, "lad']), encoding="utf-8")
    writer = EventFileWriter(str(folder))
    for step in range(5):
        value = Summary.Value(tag="train/loss", simple_value=1 / (1 + step))
        writer.add_event(Event(step=step, summary=Summary(value=[value])))
    writer.close()


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


@pytest.fixture(scope="module")
def judged(vae_folders, tmp_path_factory):
    """One evaluation of three checkpoints, two of them between the same VAEs, on images with hostile names."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(7)
    for name in HOSTILE:
        make_photo(rng, (64, 64)).save(folder / "photos" / f"{name}.png")
    (folder / "photos" / "<i>broken.png").write_bytes(b"no picture")
    first = save_checkpoint(folder, vae_folders, run=RUN)
    others = save_checkpoint(folder, vae_folders, seed=1), save_checkpoint(folder, vae_folders, ("tiny4", "kl16"), seed=2)
    write_logs(folder / "runs" / RUN)
    flags = {
        "checkpoint": [first, *others],
        "eval_data_dir": folder / "photos",
        "output_dir": folder / "out",
        "save_visualizations": True,
        "eval_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "metrics": ["ssim", "ms_ssim"],
        "num_samples": 4,
        "vae2_path": vae_folders["nested"],
        "vae2_subfolder": "vae",
        "proxy": "http://user:secret@127.0.0.1:9",
    }
    proxies = {name: os.environ.get(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    results = eval_align.main(as_argv(flags))
    for name, value in proxies.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    out = folder / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    return SimpleNamespace(out=out, results=results, metrics=read_json(out / "metrics.json"), page=page, flags=flags)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_metrics_json_holds_what_was_measured(judged):
    """Infinity where JSON has none, names that do not survive, keys that others read and that are gone."""
    assert judged.metrics == judged.results
    assert judged.metrics["images"] == len(HOSTILE)
    assert {os.path.basename(path)[:-4] for path in judged.metrics["paths"]} == set(HOSTILE)
    assert len(judged.metrics["unreadable"]) == 1
    aligned = judged.metrics["ladder"]["aligned"]
    for name in ("label", "latent_mse", "psnr", "ssim", "psnr_vs_vae2", "ssim_vs_vae2", "colour_bias", "macs", "parameters"):
        assert name in aligned
    assert len(aligned["latent_mse_by_channel"]) == 16
    assert np.mean(aligned["latent_mse_by_channel"]) == pytest.approx(aligned["latent_mse"], rel=1e-5)
    assert judged.metrics["ladder"]["ceiling"]["psnr_vs_vae2"] is None
    assert judged.metrics["left_out_metrics"].keys() == {"ms_ssim"}  # 32 px are too few


def test_fixed_rungs_come_once_a_pair_and_every_checkpoint_has_its_row(judged):
    """Checkpoints of the same VAEs judged in two passes, rows that overwrite one another, weights mixed up."""
    ladder = judged.metrics["ladder"]
    rungs = ["vae1", "ceiling", "reencode", "linear", "untrained", "aligned"]
    assert list(ladder) == [*rungs, "aligned_2", *(f"{rung}@2" for rung in rungs)]
    assert [each["row"] for each in judged.metrics["checkpoints"]] == ["aligned", "aligned_2", "aligned@2"]
    errors = [ladder[row]["latent_mse"] for row in ("aligned", "aligned_2", "aligned@2")]
    assert len(set(errors)) == 3
    assert ladder["ceiling"]["psnr"] == ladder["ceiling@2"]["psnr"]  # the same VAE2
    assert ladder["reencode"]["psnr"] != ladder["reencode@2"]["psnr"]
    assert len({figures["label"] for figures in ladder.values()}) == len(ladder)


def test_a_checkpoint_alone_has_the_figures_it_has_beside_others(judged, vae_folders, tmp_path):
    flags = {**judged.flags, "checkpoint": judged.flags["checkpoint"][1], "output_dir": tmp_path, "num_samples": 0}
    flags |= {"save_visualizations": None, "proxy": None, "metrics": "ssim"}
    alone = eval_align.main(as_argv(flags))["ladder"]["aligned"]
    beside = judged.metrics["ladder"]["aligned_2"]
    for name in ("psnr", "ssim", "latent_mse", "parameters", "macs"):
        assert alone[name] == pytest.approx(beside[name], rel=1e-4)
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8").split("<dialog")[0]


def test_csv_has_a_row_per_image_and_rung(judged):
    with open(judged.out / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ladder, per_image = judged.metrics["ladder"], judged.metrics["per_image"]
    assert len(rows) == len(HOSTILE) * len(ladder)
    for row in ladder:
        mine = [each for each in rows if each["rung"] == row]
        assert [float(each["psnr"]) for each in mine] == per_image[row]["psnr"]
        assert [float(each["colour_bias_g"]) for each in mine] == [bias[1] for bias in per_image[row]["colour_bias"]]
    assert all(each["latent_mse"] == "" for each in rows if each["rung"] == "vae1")
    assert any("two\nlines" in each["image"] for each in rows)


def test_pictures_have_names_every_system_takes(judged):
    pictures = sorted(path.name for path in judged.out.glob("*.png"))
    assert len(pictures) == len(HOSTILE)
    assert all(re.fullmatch(r"\d{5}_.*\.png", name) and name.isprintable() and len(name.encode()) < 255 for name in pictures)
    with Image.open(judged.out / pictures[0]) as picture:
        picture.load()


def test_command_is_repeatable_and_keeps_no_password(judged):
    for path in judged.out.glob("*.*"):
        assert b"secret" not in path.read_bytes(), path
    command = judged.metrics["settings"]["command"]
    assert "--proxy" not in command
    assert "--num_samples 4" in command
    assert eval_align.command_line(["--proxy=http://a:b@c", "--device", "cpu"]) == "python eval_align.py --device cpu"


def test_interrupt_leaves_the_older_report_whole(judged, tmp_path, monkeypatch):
    """Half a page, new figures beside an old page, temporary files that stay."""
    (tmp_path / "report.html").write_text("older")
    monkeypatch.setattr(page, "render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = {**judged.flags, "output_dir": tmp_path, "num_samples": 1, "save_visualizations": None, "proxy": None}
    with pytest.raises(KeyboardInterrupt):
        eval_align.main(as_argv({**flags, "checkpoint": flags["checkpoint"][0]}))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "older"


def test_no_moment_of_writing_has_files_of_two_evaluations(judged, tmp_path, monkeypatch):
    """New figures beside an old page after a kill between two files; a half-written file under its own name."""
    names, ages = ("metrics.json", "metrics.csv", "report.html"), []
    for name in names:
        (tmp_path / name).write_text("old")

    def look(function):
        def looked_at(*args, **options):
            result = function(*args, **options)
            there = [(tmp_path / name).read_text(encoding="utf-8") for name in names if (tmp_path / name).exists()]
            ages.append({"old" if text == "old" else "new" for text in there})
            assert all(text == "old" or text.endswith(("\n", "</html>")) for text in there)
            return result

        return looked_at

    for name in ("fsync", "unlink", "replace"):
        monkeypatch.setattr(os, name, look(getattr(os, name)))
    tables.write_files(tmp_path, judged.results, "<p>new</p></html>")
    assert len(ages) >= 9
    assert ages[0] == {"old"}
    assert ages[-1] == {"new"}
    assert all(len(age) <= 1 for age in ages)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert read_json(tmp_path / "metrics.json") == judged.results


# ----------------------------------------------------------------------------------------------------------------------
# The page


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_page_is_one_file_and_names_in_it_are_text(judged):
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
    of_strips = 4 * ((1 + 3 * 5) + (1 + 3 * 4))  # the original; picture, difference and latents of every way; both pairs
    assert len(images) == of_strips + 1
    assert all(image["alt"] for image in images[:-1])
    assert len(judged.page) < 2_000_000


def test_text_is_safe_and_shows_what_cannot_be_shown():
    assert charts.text('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert charts.text("a\nb\udcff\u202e") == "a\\nb\\udcff\\u202e"
    assert charts.text("長い ×") == "長い ×"


def test_training_curves_are_drawn_from_the_runs_logs(judged):
    section = judged.page.split("<h2>Training</h2>")[1].split("</section>")[0]
    assert section.count('role="img"') == 3
    assert "aligned: from 10 at 0 to 12 at 200" in section
    assert "99" not in re.sub(r'"[^"]*"', "", section.split("<svg")[1])
    assert "loss: from 1 at 0 to 0.2 at 4" in section


def test_logs_that_are_missing_or_damaged_give_no_curves(tmp_path):
    content = {"run": RUN, "config": {"log_dir": "elsewhere"}}
    checkpoint = tmp_path / "ckpt" / "align_pipeline_20260101_000000.pth"
    assert run_logs.read_curves(checkpoint, content) is None
    folder = tmp_path / "elsewhere" / RUN  # moved together with the checkpoints
    folder.mkdir(parents=True)
    assert run_logs.read_curves(checkpoint, content) is None
    (folder / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x", "ladder": 3}\n{"step": 1, "ladder": {"aligned": 5}}\n'
    )
    (folder / "events.out.tfevents.1").write_bytes(b"no events")
    assert run_logs.read_curves(checkpoint, content) is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "ladder": {"aligned": {"psnr": 20, "ssim": NaN}}}\n')
    assert run_logs.read_curves(checkpoint, content)["evaluations"] == {"aligned": {"psnr": [(1, 20)]}}
    for run in (None, 5, "", "../" + RUN):
        assert run_logs.run_folder(checkpoint, {**content, "run": run}) is None


def test_pictures_keep_within_the_pages_bytes():
    """A page of tens of megabytes from large or noisy images."""
    noise = torch.rand(3, 768, 768, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = {row: row for row in ("vae1", "ceiling", "reencode", "aligned")}
    made = {row: (torch.randn(16, 96, 96), noise) for row in names}
    for count in (9, 100):
        rows = pictures.page_panels(pictures.comparison_rows(noise, made, names), 13 * count)
        assert [panel["caption"] for panel in rows[0]] == ["original", *names]
        panels = [panel for row in rows for panel in row if panel["uri"]]
        assert len(panels) == 13
        assert sum(len(panel["uri"]) for panel in panels) * count < 9_500_000
        assert [panel["pixelated"] for panel in rows[2] if panel["uri"]] == [True] * 4


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


def test_page_in_a_browser_shows_the_figures_and_asks_for_nothing(judged, browser):
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
            shown = cells[f"{row} {metric}"]
            assert (None if shown == "–" else float(shown.replace("−", "-"))) == (
                None if figures[metric] is None else pytest.approx(figures[metric], abs=0.51 * 10**-digits)
            ), (row, metric)
    assert cells["vae1 latent_mse"] == cells["ceiling psnr_vs_vae2"] == "–"
    assert browser.run("document.querySelector('.verdict').innerText").count(judged.metrics["verdict"]["sentences"][0]) == 1
    assert browser.run("[...document.images].every(image => image.alt === '' || image.naturalWidth > 0)")


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone_and_is_readable_in_the_dark(judged, browser, dark):
    """A table or a long name that makes the whole page scroll sideways; dark text on a dark page."""
    browser.resize(390, dark=dark)
    browser.open(judged.out / "report.html")
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= browser.run("window.innerWidth") == 390
    brightness = "(name => getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3)"
    paper, ink = (browser.run(f"{brightness}({name!r})") for name in ("backgroundColor", "color"))
    assert paper - ink < -150 if dark else paper - ink > 150


def test_zoom_works_by_keyboard(judged, browser):
    """Enter opens, arrows step, Escape closes, and the focus is back where it was."""
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


def test_module_that_has_gone_wrong_still_gets_its_report(judged, vae_folders, tmp_path):
    """A crash on the first figure that is not a number, at the end of a long run."""
    path = save_checkpoint(tmp_path, vae_folders)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["out.bias"] += 3e38  # finite, which a checkpoint must be; what is computed from it is not
    torch.save(content, path)
    flags = {"checkpoint": path, "eval_data_dir": judged.flags["eval_data_dir"], "output_dir": tmp_path / "out"}
    eval_align.main(as_argv({**flags, "num_workers": 0, "device": "cpu", "num_samples": 2, "metrics": "ssim"}))
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["ladder"]["aligned"]["psnr"] is None
    assert metrics["verdict"]["answer"] == "no"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "not finite" in page
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page).lower()


# ----------------------------------------------------------------------------------------------------------------------
# The verdict


def results_of(gains, aligned=None, reencode=None, **more):
    """Results of as many images as there are `gains`, the PSNR of the module over decode + re-encode in dB."""
    per_image = {"reencode": {"psnr": [25.0] * len(gains)}, "ceiling": {"psnr": [30.0] * len(gains)}}
    per_image["aligned"] = {"psnr": [25.0 + gain for gain in gains], "latent_mse": [0.1] * len(gains)}
    plain = {"latent_mse": 0.1, "ssim": 0.8, "colour_bias": [0.0, 0.0, 0.0], "macs": 4e9, "milliseconds": 8.0}
    ladder = {row: plain | {"label": row, "psnr": float(np.mean(figures["psnr"]))} for row, figures in per_image.items()}
    ladder["aligned"] |= {"macs": 1e9} | (aligned or {})
    ladder["reencode"] |= reencode or {}
    return {"images": len(gains), "unreadable": [], "ladder": ladder, "per_image": per_image, "image_size": 256} | more


@pytest.mark.parametrize(
    ("gains", "answer"),
    [([1.0] * 40, "yes"), ([-1.0] * 40, "no"), ([0.01] * 40, "equal"), ([3.0, -3.0] * 20, "equal"), ([1.0], "yes")],
)
def test_verdict_answers_by_the_gain_and_its_uncertainty(gains, answer):
    found = verdict(results_of(gains))
    assert found["answer"] == answer
    assert found["gain_db"] == pytest.approx(np.mean(gains))
    assert found["macs_fraction"] == 0.25
    assert "25% of the multiply-adds" in found["sentences"][0]
    assert 1 <= len(found["sentences"]) <= 2
    if len(gains) > 1:
        assert found["gain_error_db"] == pytest.approx(1.96 * np.std(gains, ddof=1) / math.sqrt(len(gains)))


@pytest.mark.parametrize(("gain", "said"), [(4.0, "stays 1.00 dB below"), (6.0, "by 1.00 dB"), (5.0, "stays 0.00 dB below")])
def test_verdict_says_on_which_side_of_vae2_the_module_stands(gain, said):
    """A module that passes VAE2's own reconstruction, called below it or impossible."""
    assert said in verdict(results_of([gain] * 40))["sentences"][1]


@pytest.mark.parametrize(("detail", "soft"), [(0.5, True), (0.9, False), (None, False)])
def test_verdict_says_when_pictures_are_soft(detail, soft):
    """Praise for a blurred picture, whose PSNR is the better for it."""
    results = results_of([1.0] * 40, spectrum={"detail": {"aligned": detail, "reencode": 1.0}})
    said = " ".join(verdict(results)["sentences"])
    assert ("softer" in said and "50% of the power" in said) == soft


def test_verdict_names_the_weaknesses_and_only_those():
    assert verdict(results_of([1.0] * 40))["weaknesses"] == []
    weak = results_of(
        [1.0] * 39 + [-2.0], aligned={"colour_bias": [0.2, -1.4, 0.0], "latent_mse": 0.2, "ssim": 0.7}, unreadable=["x"]
    )
    said = verdict(weak)["weaknesses"]
    assert len(said) == 5
    for sentence, part in zip(said, ("green −1.4", "0.2000 against 0.1000", "SSIM", "On 1 image", "1 file")):
        assert part in sentence
    idle = results_of([1.0] * 40)
    idle["ladder"]["linear"] = {"psnr": idle["ladder"]["aligned"]["psnr"] - 0.01}
    assert ["linear map" in sentence for sentence in verdict(idle)["weaknesses"]] == [True]
    few = results_of([1.0] * 3, settings={"trained_image_size": 128})
    assert [sentence.split()[0] for sentence in verdict(few)["weaknesses"]] == ["Judged", "Judged"]


def test_verdict_on_what_is_not_finite():
    """A crash at the end of a run whose module has gone wrong, or a kind word for it."""
    broken = results_of([1.0] * 3, aligned={"latent_mse": None, "psnr": None, "colour_bias": [None] * 3})
    assert verdict(broken)["answer"] == "no"
    perfect = results_of([1.0] * 3, aligned={"psnr": None})
    perfect["per_image"]["aligned"]["psnr"] = [None] * 3
    assert verdict(perfect)["answer"] == "unknown"


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("images", [1, 2, 7, 30])
def test_chosen_images_are_the_worst_the_median_and_the_best_each_once(wanted, images):
    gains = np.random.default_rng(images).permutation(images).astype(float).tolist()
    chosen = pictures.chosen_images(results_of(gains), wanted)
    places = [place for group in chosen.values() for place in group]
    assert len(places) == len(set(places)) == min(wanted, images)
    if wanted:
        assert chosen["worst"][0] == gains.index(0)
    if wanted == 9 and images == 30:
        assert [gains[place] for place in chosen["worst"]] == [0, 1, 2]
        assert sorted(gains[place] for place in chosen["median"]) in ([13, 14, 15], [14, 15, 16])
        assert [gains[place] for place in chosen["best"]] == [29, 28, 27]


# ----------------------------------------------------------------------------------------------------------------------
# Charts


def test_charts_say_their_figures_and_survive_what_is_not_there():
    chart = charts.lines("t<", [("a", [(0, 1.0), (1, None), (2, 3.0)], "c-aligned"), ("b", [(0, None)], "c-linear")], "x", "y")
    assert "t&lt;" in chart
    assert "a: from 1 at 0 to 3 at 2" in chart
    assert "b" not in re.findall(r"</svg>(\w)</li>", chart)
    assert "nan" not in chart
    assert "nothing to draw" in charts.lines("t", [("a", [(0, 0.0)], "c-aligned")], "x", "y", log_y=True)
    assert "nan" not in charts.lines("t", [("a", [(5, 2.0)], "c-aligned")], "x", "y")
    assert "–" in charts.bars("t", [("a", None, "–", "c-aligned")])
    assert "1, –" in charts.columns("t", [("a", [1.0, None], "c-aligned")], "x", "y")
    assert "nothing to draw" in charts.columns("t", [], "x", "y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 15, [0, 5, 10, 15]), (-2, -1, [-2, -1.8, -1.6, -1.4, -1.2, -1]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (0.05, "0.05"), (12.345, "12.3"), (1234.5, "1234"), (2e-7, "2.0e−07"), (-5, "−5")],
)
def test_numbers_on_axes_are_short(value, shown):
    assert charts.number(value) == shown
