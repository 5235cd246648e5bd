"""report.html: one file that opens from disk and asks the network for nothing, from what `eval_align.main` returns.

The verdict comes first, then the ladder, pictures, charts, and how it was measured. Everything that is not a number or our
own words goes through `charts.text`, file names above all.
"""

from __future__ import annotations

import json

from evaluation import charts, pictures, tables
from evaluation.charts import number, text
from evaluation.metrics import METRICS, Metric

OTHER_COLOURS = 3  # for further checkpoints' lines
GROUPS = {"worst": "Worst", "median": "Median", "best": "Best"}
ARROWS = {+1: "↑", -1: "↓", 0: ""}
COLUMNS = [metric for metric in METRICS.values() if metric.text]  # of the ladder
ANSWERS = {"yes": "Yes", "equal": "On a par", "no": "No", "unknown": "No verdict"}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --dim: #59636e; --rule: #d5dae0; --soft: #f3f5f8;
  --aligned: #0b63ce; --aligned2: #7b3fc4; --reencode: #b35300; --vae2: #15803d; --linear: #8a6d00; --plain: #7a828c;
  --good: #15803d; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --dim: #a0a9b4; --rule: #363d46;
  --soft: #1e2329; --aligned: #6cb0ff; --aligned2: #c79bff; --reencode: #ffa257; --vae2: #5fd08a; --linear: #e0c04c;
  --plain: #8d96a1; --good: #5fd08a; --bad: #ff8a7d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; } p { margin: .25rem 0 .75rem; max-width: 48rem; }
.dim, figcaption { color: var(--dim); font-size: .875rem; }
.verdict { background: var(--soft); border-left: 6px solid var(--plain); border-radius: 6px; padding: 1rem; margin: 1rem 0; }
.verdict.yes, .verdict.equal { border-color: var(--good); } .verdict.no { border-color: var(--bad); }
.verdict p { font-size: 1.1rem; margin: 0 0 .5rem; } .verdict ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.verdict h2, .verdict h3 { margin: .75rem 0 .25rem; font-size: .875rem; color: var(--dim); font-weight: 600; }
.verdict h2 { margin: 0 0 .5rem; } .verdict h2 strong { display: block; font-size: 1.6rem; line-height: 1.2; }
.verdict.yes strong, .verdict.equal strong { color: var(--good); } .verdict.no strong { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; margin: 0 0 1rem; padding: 0; }
.tiles div { border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .75rem; }
.tiles dt { color: var(--dim); font-size: .8125rem; } .tiles dd { margin: 0; font-size: 1.35rem; font-weight: 650; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  overflow-wrap: normal; }
tbody tr:last-child > * { border-bottom: 0; } thead th { color: var(--dim); font-weight: 600;
  vertical-align: bottom; white-space: normal; }
thead small { display: block; font-weight: 400; } td small { color: var(--dim); font-weight: 400; }
th[scope=row] { text-align: left; font-weight: 500; }
th:first-child { text-align: left; white-space: normal; min-width: 7.5rem; position: sticky; left: 0;
  background: var(--paper); overflow-wrap: anywhere; }
td.name, th.name { text-align: left; white-space: normal; min-width: 10rem; overflow-wrap: anywhere; }
tr.main > * { background: var(--soft); font-weight: 650; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.25rem; }
.charts > figure, .histograms > div { min-width: 0; margin: 0; } figure h3 { margin-top: 0; }
.charts svg { width: 100%; max-width: 34rem; height: auto; display: block; }
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .75rem; }
.histograms svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .tick { fill: var(--dim); font-size: 11.5px; }
svg .strong { font-weight: 650; } .grid { stroke: var(--rule); stroke-width: 1; }
.mark { stroke: var(--dim); stroke-dasharray: 3 3; } .line { fill: none; stroke: currentColor; stroke-width: 2; }
.bar, .dot { fill: currentColor; } .area { fill: currentColor; opacity: .12; }
.c-aligned { color: var(--aligned); } .c-other0 { color: var(--aligned2); } .c-other1 { color: var(--linear); }
.c-other2 { color: var(--bad); } .c-reencode { color: var(--reencode); }
.c-vae2 { color: var(--vae2); } .c-linear { color: var(--linear); } .c-vae1, .c-untrained { color: var(--plain); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .25rem 0;
  font-size: .8125rem; }
.legend .key { width: 28px; height: 10px; display: inline-block; margin-right: .4rem; vertical-align: middle; }
.strip { margin: 0 0 1.5rem; } .strip h4 { margin: .75rem 0 0; font-size: .9375rem; font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .4rem; margin-bottom: .75rem; }
.panels .gap { display: none; }
@media (min-width: 44rem) { .panels { grid-template-columns: repeat(var(--columns), minmax(0, 11.5rem)); }
  .panels .gap { display: block; align-self: center; margin: 0; padding: .5rem; } }
.panels figure { margin: 0; min-width: 0; } .panels figcaption { font-size: .75rem; line-height: 1.3; }
.shot { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in; border-radius: 3px; }
.shot:focus-visible, .scroll:focus-visible, summary:focus-visible { outline: 3px solid var(--aligned); outline-offset: 2px; }
.shot img { display: block; width: 100%; aspect-ratio: 1; border-radius: 3px; } .pixelated { image-rendering: pixelated; }
dialog { border: 0; padding: .75rem; background: var(--paper); color: var(--ink); max-width: 100vw; max-height: 100vh; }
dialog::backdrop { background: rgb(0 0 0 / .75); }
dialog img { display: block; width: min(92vw, 100vh - 9rem); aspect-ratio: 1; }
dialog p { margin: .5rem 0; max-width: min(92vw, 100vh - 9rem); font-size: .875rem; }
dialog button { font: inherit; padding: .4rem .9rem; }
pre { background: var(--soft); padding: .75rem; border-radius: 6px; white-space: pre-wrap; font-size: .8125rem; }
@media print { .scroll { overflow: visible; } }
"""

SCRIPT = """
const shots = [...document.querySelectorAll(".shot")], zoom = document.getElementById("zoom");
const picture = zoom.querySelector("img"), caption = zoom.querySelector("p");
let at = 0;
function show(index) {
  at = (index + shots.length) % shots.length;
  const image = shots[at].querySelector("img");
  picture.src = image.src; picture.alt = image.alt; picture.className = image.className; caption.textContent = image.alt;
}
function step(key) {
  const strip = shots[at].closest(".strip"), strips = [...document.querySelectorAll(".strip")];
  const own = [...strip.querySelectorAll(".shot")], place = own.indexOf(shots[at]);
  if (key === "ArrowLeft") show(at - 1);
  else if (key === "ArrowRight") show(at + 1);
  else {
    const other = strips[(strips.indexOf(strip) + (key === "ArrowDown" ? 1 : -1) + strips.length) % strips.length];
    const theirs = other.querySelectorAll(".shot");
    show(shots.indexOf(theirs[Math.min(place, theirs.length - 1)]));
  }
}
shots.forEach((shot, index) => shot.addEventListener("click", () => { show(index); zoom.showModal(); }));
zoom.addEventListener("keydown", event => {
  if (event.key.startsWith("Arrow")) { event.preventDefault(); step(event.key); }
});
zoom.addEventListener("click", event => {
  if (event.target === zoom) zoom.close();
  else if (event.target.dataset.key) step(event.target.dataset.key);
  else if (event.target.dataset.close) zoom.close();
});
"""


def colours_of(ladder: dict) -> dict:
    """{rung: class of its bars and lines}; further checkpoints have their own."""
    further = [name for name, rung in ladder.items() if rung["kind"] == "aligned" and name != "aligned"]
    own = {name: f"c-other{number % OTHER_COLOURS}" for number, name in enumerate(further)}
    return {name: own.get(name, f"c-{rung['kind']}") for name, rung in ladder.items()}


def figure_text(metric: Metric, value) -> str:
    """A figure as the page's tables show it, with a minus sign in place of the hyphen."""
    return tables.figure_text(metric, value).replace("-", "−")


def render(results: dict, strips: list[dict], curves: dict | None) -> str:
    """The page.

    Args:
        results: what metrics.json holds.
        strips: the images to show, {group: "worst" | "median" | "best", name, figures: text, panels: what
            `pictures.page_panels` gives}.
        curves: see `run_logs.read_curves`.
    """
    sections = [
        _head(results),
        _verdict(results),
        _ladder(results),
        _strips(strips),
        _errors(results),
        _curves(results, curves),
        _spread(results),
        _method(results),
    ]
    title = f"Align report: {results['checkpoints'][0]['name']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{STYLE}</style></head>\n<body>'
        + "\n".join(section for section in sections if section)
        + '</main>\n<dialog id="zoom" aria-label="Enlarged picture"><img alt=""><p aria-live="polite"></p>'
        '<button type="button" data-key="ArrowLeft">← Previous</button> '
        '<button type="button" data-key="ArrowRight">Next →</button> '
        '<button type="button" data-close="1">Close</button></dialog>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _head(results):
    settings, main = results["settings"], results["checkpoints"][0]
    return (
        f"<header><h1>Align report: {text(main['name'])}</h1>"
        f'<p class="dim">{text(settings["vae1"])} → {text(settings["vae2"])} · {results["images"]} images at '
        f"{results['image_size']} px from {text(settings['eval_data_dir'])} · step {text(main['step'])} · "
        f"{text(settings['created'])}</p></header>\n<main>"
    )


def _verdict(results):
    verdict, aligned = results["verdict"], results["ladder"]["aligned"]
    says = "".join(f"<p>{text(sentence)}</p>" for sentence in verdict["sentences"])
    against = "".join(f"<li>{text(sentence)}</li>" for sentence in verdict["weaknesses"])
    against = f"<h3>What to mind</h3><ul>{against}</ul>" if against else ""
    gain, fraction, below = verdict["gain_db"], verdict["macs_fraction"], verdict["below_vae2_db"]
    perceptual, closer = aligned.get("st_lpips_vgg"), verdict["perceptual_gain"]
    tiles = (
        ("PSNR, aligned", "–" if aligned["psnr"] is None else f"{aligned['psnr']:.2f} dB"),
        ("over decode + re-encode", "–" if gain is None else f"{gain:+.2f} dB".replace("-", "−")),
        ("ST-LPIPS, aligned", "–" if perceptual is None else f"{perceptual:.3f}"),
        ("beside decode + re-encode", "–" if closer is None else f"{-closer:+.3f}".replace("-", "−")),
        ("over VAE2's own reconstruction", "–" if below is None else f"{-below:+.2f} dB".replace("-", "−")),
        ("multiply-adds, of re-encode's", "–" if fraction is None else tables.percent(fraction)),
    )
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in tiles)
    return (
        f'<section class="verdict {verdict["answer"]}" aria-label="Verdict"><h2>Is it worth using instead of decode + '
        f"re-encode? <strong>{ANSWERS[verdict['answer']]}</strong></h2>{says}{against}</section>"
        f'<dl class="tiles">{tiles}</dl>'
    )


def _table(label: str, header: list[str], rows: list[str]) -> str:
    """A table that scrolls within itself, by keyboard too. Header cells and rows are HTML."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table><thead><tr>{"".join(header)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _ladder(results):
    ladder, colours = results["ladder"], colours_of(results["ladder"])
    columns = [metric for metric in COLUMNS if any(rung.get(metric.name) is not None for rung in ladder.values())]
    header = ['<th scope="col">Rung</th>']
    for metric in columns:
        unit = f"{metric.unit} {ARROWS[metric.better]}".strip()
        header.append(f'<th scope="col">{text(metric.label)}<small>{text(unit)}</small></th>')
    rows = []
    for name, rung in ladder.items():
        intervals = results["intervals"].get(name, {})
        cells = "".join(
            f'<td data-row="{text(name)}" data-metric="{metric.name}">{text(figure_text(metric, rung.get(metric.name)))}'
            f"<small>{text(tables.interval_text(metric, intervals))}</small></td>"
            for metric in columns
        )
        main = ' class="main"' if name == "aligned" else ""
        rows.append(f'<tr{main}><th scope="row">{text(rung["label"])}</th>{cells}</tr>')
    left_out = "".join(
        f"<li>{text(METRICS[name].label)} is not measured: {text(why)}</li>"
        for name, why in results["left_out_metrics"].items()
    )
    left_out = f'<ul class="dim">{left_out}</ul>' if left_out else ""
    points = [
        (rung["caption"], rung["st_lpips_vgg"], rung["psnr"], colours[name])
        for name, rung in ladder.items()
        if None not in (rung.get("st_lpips_vgg"), rung.get("psnr"))
    ]
    charts_of = ""
    if points:
        chart = charts.scatter(
            "Distortion and perception", points, "ST-LPIPS, VGG (less is better)", "PSNR, dB (more is better)"
        )
        charts_of = (
            '<figure><h3>Distortion and perception</h3><p class="dim">The best place is the upper left. A soft picture stands '
            f"higher and farther right than a crisp one.</p>{chart}</figure>"
        )
    for metric, title in (
        (METRICS["psnr"], "PSNR against the original"),
        (METRICS["latent_mse"], "Error of the latents (MSE)"),
    ):
        entries = [
            (rung["label"], rung.get(metric.name), figure_text(metric, rung.get(metric.name)), colours[name])
            for name, rung in ladder.items()
            if metric.name == "psnr" or rung["kind"] in ("reencode", "linear", "aligned")
        ]
        unit = " dB" if metric.name == "psnr" else ""
        charts_of += f"<figure><h3>{title}</h3>{charts.bars(title, entries, unit)}</figure>"
    return (
        "<section><h2>The ladder</h2><p>Means over all images, ± their 95% intervals. What is compared: VAE2 decodes its own "
        "latents of the image, "
        "the latents that people get today by decoding with VAE1 and encoding again, and the latents of the module. An "
        "arrow says whether more (↑) or less (↓) is better.</p>"
        f'{_table("The ladder of baselines", header, rows)}{left_out}<div class="charts">{charts_of}</div></section>'
    )


def _grid(name, rows):
    """The panels of one image: on a wide screen a column for each rung."""
    panels = ""
    for panel in (panel for row in rows for panel in row):
        caption = text(panel["caption"])
        if panel["uri"] is None:
            panels += f'<p class="dim gap">{caption}</p>'
            continue
        pixelated = ' class="pixelated"' if panel["pixelated"] else ""
        panels += (
            f'<figure><button type="button" class="shot"><img src="{panel["uri"]}" alt="{text(name)}: {caption}"{pixelated}>'
            f"</button><figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="panels" style="--columns: {len(rows[0])}">{panels}</div>'


def _strips(strips):
    if not strips:
        return ""
    body, group = "", None
    for strip in strips:
        if strip["group"] != group:
            group = strip["group"]
            body += f"<h3>{GROUPS[group]}</h3>"
        body += (
            f'<section class="strip"><h4>{text(strip["name"])}</h4><p class="dim">{text(strip["figures"])}</p>'
            f"{_grid(strip['name'], strip['panels'])}</section>"
        )
    return (
        "<section><h2>Pictures</h2><p>The images on which the module loses most, middling and least against VAE2's own "
        f"reconstruction (in PSNR). Differences are amplified {pictures.DIFFERENCE_GAIN} times around grey; latents are shown "
        "through one fixed projection to RGB, so panels can be compared. Click a picture, or press Enter on it, to enlarge; "
        f"← → step through the panels, ↑ ↓ to the same panel of another image, Esc closes.</p>{body}</section>"
    )


def _errors(results):
    ladder, colours = results["ladder"], colours_of(results["ladder"])
    names = {row: figures["label"] for row, figures in ladder.items()}
    channels = [
        (names[row], figures["latent_mse_by_channel"], colours[row])
        for row, figures in ladder.items()
        if figures["kind"] in ("aligned", "reencode") and figures.get("latent_mse_by_channel")
    ]
    spectrum = results["spectrum"]
    bands = [(names[row], list(zip(spectrum["frequency"], powers)), colours[row]) for row, powers in spectrum["rows"].items()]
    histograms = results["histograms"]
    target, aligned = histograms["rows"]["vae2"], histograms["rows"]["aligned"]
    total = [[sum(bins) for bins in zip(*counts)] for counts in (aligned, target)]
    limit, bins = histograms["limit"], len(total[0])
    places = [((place + 0.5) / bins * 2 - 1) * limit for place in range(bins)]
    overall = [
        (label, [(x, count / (sum(counts) or 1)) for x, count in zip(places, counts)], shade)
        for label, counts, shade in (("aligned", total[0], "c-aligned"), ("VAE2's own", total[1], "c-vae2"))
    ]
    small = "".join(
        "<div>"
        + charts.histogram(f"channel {channel}", [("aligned", ours, "c-aligned"), ("VAE2's own", own, "c-vae2")], limit)
        + "</div>"
        for channel, (ours, own) in enumerate(zip(aligned, target))
    )
    figures = (
        (
            "Error by latent channel",
            "Mean squared error of each channel of VAE2's latents.",
            charts.columns("Error by latent channel", channels, "channel", "MSE"),
        ),
        (
            "Error by spatial frequency",
            "Power of the picture's error relative to the original's power. Left coarse shapes, right the finest detail; at 1 "
            "the error is as strong as what is there.",
            charts.lines("Error by spatial frequency", bands, "cycles per pixel", "error / original", log_y=True),
        ),
        (
            "Values of the latents",
            "All channels together. Two curves that part show latents of another level or spread than VAE2's.",
            charts.lines("Values of the latents", overall, "scaled latent", "share", zero=True, fill=True),
        ),
        (
            "Power of the latents by spatial frequency",
            "Of VAE2's own latents, mean over channels. Below 1 the latents lack structure of that size, above they "
            "have too much.",
            charts.lines("Power of the latents by spatial frequency", _latent_spectra(ladder, colours), "cycles per latent",
                         "power, of VAE2's", zero=True),
        ),
    )  # fmt: skip
    body = "".join(f'<figure><h3>{title}</h3><p class="dim">{note}</p>{chart}</figure>' for title, note, chart in figures)
    return (
        f'<section><h2>Where the error lies</h2><div class="charts">{body}</div><details><summary>Values of the latents, '
        f'channel by channel</summary><div class="histograms">{small}</div></details></section>'
    )


def _latent_spectra(ladder, colours):
    """The series of the latents' spectra, band by band from 0 to 0.5 cycles per latent."""
    series = []
    for name, rung in ladder.items():
        powers = rung.get("latent_spectrum")
        if powers and rung["kind"] in ("vae2", "reencode", "aligned"):
            points = [((band + 0.5) / (2 * len(powers)), power) for band, power in enumerate(powers)]
            series.append((rung["label"], points, colours[name]))
    return series


def _curves(results, curves):
    if not curves:
        return ""
    step = results["checkpoints"][0]["step"]
    evaluations, body = curves["evaluations"], ""
    for metric, title, label in (("psnr", "PSNR while training", "dB"), ("latent_mse", "Latent MSE while training", "MSE")):
        series = [
            (results["ladder"].get(row, {}).get("label", row), evaluations[row][metric], f"c-{row}")
            for row in ("aligned", "reencode", "vae2")
            if metric in evaluations.get(row, {}) and not (metric == "latent_mse" and row == "vae2")
        ]
        last = max((x for _, points, _ in series for x, _ in points), default=step)
        mark = (step, "this checkpoint") if step < last else None
        if any(row == "aligned" for row in evaluations) and series:
            chart = charts.lines(title, series, "step", label, log_y=metric == "latent_mse", mark=mark)
            body += f"<figure><h3>{title}</h3>{chart}</figure>"
    if curves["loss"]:
        chart = charts.lines("Training loss", [("loss", curves["loss"], "c-aligned")], "step", "loss", log_y=True)
        body += f"<figure><h3>Training loss</h3>{chart}</figure>"
    if not body:
        return ""
    return (
        f'<section><h2>Training</h2><p class="dim">From {text(curves["folder"])}.</p><div class="charts">{body}</div></section>'
    )


def _spread(results):
    header = "".join(f'<th scope="col">{name}</th>' for name in ("Metric", "Mean", "Std", "Worst"))
    header += '<th scope="col" class="name">Worst image</th>'
    body = ""
    for row, metrics in results["summary"].items():
        if results["ladder"][row]["kind"] != "aligned":
            continue
        rows = []
        for metric in COLUMNS:
            if metric.name in metrics:
                figures = metrics[metric.name]
                cells = "".join(f"<td>{text(figure_text(metric, figures[name]))}</td>" for name in ("mean", "std", "worst"))
                name = text(tables.shown_name(results["paths"][figures["worst_image"]], results["settings"]["eval_data_dir"]))
                rows.append(f'<tr><th scope="row">{text(metric.label)}</th>{cells}<td class="name">{name}</td></tr>')
        label = results["ladder"][row]["label"]
        body += f"<h3>{text(label)}</h3>" + _table(f"Spread over images, {label}", [header], rows)
    return f"<section><h2>Spread over images</h2>{body}</section>"


def _method(results):
    settings = results["settings"]
    checkpoints = "".join(
        f'<tr><th scope="row">{text(results["ladder"][each["row"]]["label"])}</th><td class="name">{text(each["path"])}</td>'
        f"<td>{text(each['step'])}</td><td>{number(each['epoch'])}</td></tr>"
        for each in results["checkpoints"]
    )
    header = '<th scope="col">Row</th><th scope="col" class="name">File</th><th scope="col">Step</th><th scope="col">Epoch</th>'
    unreadable = "".join(f"<li>{text(message)}</li>" for message in results["unreadable"])
    unreadable = f"<h3>Left out</h3><ul>{unreadable}</ul>" if unreadable else ""
    config = text_block(json.dumps(results["checkpoints"][0]["config"], indent=2, ensure_ascii=False))
    environment = text_block(json.dumps(settings, indent=2, ensure_ascii=False))
    rfid = (
        "<li>rFID compares sets of images and depends on how many there are: a figure from fewer than some thousand images "
        "compares only with others from the same images.</li>"
    )
    return (
        "<section><h2>How it was measured</h2><ul>"
        "<li>PSNR, SSIM and the other picture metrics are taken per image on clamped 8-bit values, against the original, and "
        "then averaged.</li><li>Latents are scaled latents; their target is VAE2's posterior mean. Their cosine is that of the "
        "whole latent as one vector.</li>"
        "<li>ST-LPIPS is how far apart two pictures look to a frozen ImageNet network, VGG-16 or AlexNet (Ghildyal &amp; Liu "
        "2022): 0 for equal pictures. A loss may use AlexNet; the verdict uses VGG.</li>"
        "<li>Texture distance is the Fréchet distance of VGG's first three stages at every position, of a rung's pictures "
        "against "
        "the originals, in per cent of the originals' variance.</li>"
        "<li>Finest detail is the power at up to 4 pixels a cycle, of VAE2's reconstructions. The latents' variance and finest "
        "detail are means over channels, of VAE2's latents.</li>"
        "<li>± is half a 95% interval: of a mean over images by the normal distribution, of texture, detail and variance "
        "by the "
        "jackknife over ten groups of images.</li>"
        "<li>Colour bias is the mean of a rung's pictures − VAE2's own reconstructions, for red, green and blue each, in "
        "8-bit levels.</li>"
        "<li>Time, weights and multiply-adds are what it takes to come by VAE2's latents, from VAE1's (and the image, where "
        f"the module takes it), at batch size 1 on {text(settings['device'])} in {text(settings['precision'])}; the time is "
        "the fastest of three.</li>"
        f"<li>The VAEs run in {text(settings['precision'])} and the modules under autocast to it, as in training; "
        "<code>translate</code> computes in float32.</li>"
        "<li>The verdict is yes if neither PSNR nor ST-LPIPS is worse than that of decode + re-encode beyond the 95% interval "
        "of "
        "their mean difference, and one is better.</li>"
        f"{rfid if results['ladder']['aligned'].get('rfid') is not None else ''}"
        "<li>A dash stands for what is undefined or infinite, as is the PSNR of identical pictures.</li></ul>"
        f"{_table('Checkpoints', [header], [checkpoints])}{unreadable}"
        f"<h3>Command</h3><pre>{text_block(settings['command'])}</pre>"
        f"<details><summary>Settings of this evaluation</summary><pre>{environment}</pre></details>"
        f"<details><summary>Configuration of the training run</summary><pre>{config}</pre></details></section>"
    )


def text_block(value: str) -> str:
    """`text` that keeps line ends, for <pre>."""
    return "\n".join(text(line) for line in value.split("\n"))
