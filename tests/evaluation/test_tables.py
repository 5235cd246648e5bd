"""Figures as text, and the three files of an evaluation."""

import csv
import os

from reports import HOSTILE, read_json

from evaluation import tables
from evaluation.metrics import METRICS


def test_table_shows_every_rung_and_a_dash_where_a_figure_has_no_meaning(judged):
    """A rung or a column that is lost; a zero in place of a figure that was not measured."""
    lines = tables.ladder_table(judged.results).splitlines()
    labels = [rung["label"] for rung in judged.results["ladder"].values()]
    legend = " ".join(lines[1 + len(labels) :])
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(labels)]] == labels and "texture: VGG" in legend
    measured = [metric for metric in METRICS.values() if metric.name not in ("lpips", "grid")]  # none at this size
    assert all(metric.heading in lines[0] for metric in measured)
    assert "PSNR dB ↑" in lines[0] and "ST-LPIPS ↓" in lines[0]
    assert "–" in lines[1]
    error = judged.results["intervals"]["aligned_2"]["psnr"]
    assert f"{judged.results['ladder']['aligned_2']['psnr']:.2f} ±{error:.2f}" in lines[len(labels)]


def test_a_label_with_a_terminals_commands_is_one_line(judged):
    """A checkpoint's name that a terminal obeys, or that breaks the table."""
    ladder = judged.results["ladder"]
    named = {"ladder": {"aligned": ladder["aligned"] | {"label": "a\nb\x1b[2J"}}}
    assert tables.ladder_table(named).splitlines()[1].startswith("a\\nb\\x1b[2J ")


def test_csv_has_a_row_per_image_and_rung(judged):
    """Figures of another image or rung; a zero where nothing was measured; a name that breaks the row."""
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
