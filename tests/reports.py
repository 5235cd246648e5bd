"""A whole evaluation by eval_align.py, on images with hostile names, and results as the verdict takes them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_argv, make_photo, own_environment

import eval_align
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs

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
    module = align_module(AlignConfig(hidden_channels=8, num_blocks=1))
    module.remember_ridge(*(torch.randn_like(each) * 0.1 for each in (module.ridge_weight, module.ridge_bias)))
    config = {"image_size": 32, "precision": "float32", "proxy": "http://proxy.invalid", "seed": 1}
    config["log_dir"] = str(folder / "runs")
    return PipelineWithVAEs(module, *spaces).save_checkpoint(folder / "ckpt", config, 200, 2.0, {}, **more)


def write_logs(folder):
    """A run's JSON lines: three evaluations, one of them twice, a line cut off; five losses, one more without a value."""
    folder.mkdir(parents=True)
    steps = {0: 10.0, 100: 11.0, 200: 12.0}
    lines = [{"step": 100, "epoch": 1.0, "ladder": {"aligned": {"psnr": 99.0}}}]
    for step, psnr in steps.items():
        ladder = {"aligned": {"psnr": psnr, "latent_mse": 1 / psnr}, "reencode": {"psnr": 11.5, "ssim": None}}
        lines.append({"step": step, "epoch": step / 100, "ladder": ladder})
    text = "\n".join([*map(json.dumps, lines), '{"step": 300, "lad'])
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    losses = [{"step": step, "loss": 1 / (1 + step), "learning_rate": 1e-3} for step in range(5)]
    losses.append({"step": 5, "loss": None, "learning_rate": 1e-3})
    (folder / "training.jsonl").write_text("\n".join(map(json.dumps, losses)), encoding="utf-8")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def judge_hostile_images(folder, vae_folders):
    """One evaluation of two checkpoints: {out, results, metrics: as written, page, flags}."""
    (folder / "photos").mkdir()
    rng = np.random.default_rng(7)
    for name in HOSTILE:
        make_photo(rng, (64, 64)).save(folder / "photos" / f"{name}.png")
    (folder / "photos" / "<i>broken.png").write_bytes(b"no picture")
    first = save_checkpoint(folder, vae_folders, run=RUN)
    second = save_checkpoint(folder, vae_folders, seed=1)
    write_logs(folder / "runs" / RUN)
    flags = {
        "checkpoint": [first, second],
        "eval_data_dir": folder / "photos",
        "output_dir": folder / "out",
        "save_visualizations": True,
        "eval_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "metrics": ["ssim", "ms_ssim", "st_lpips", "texture"],
        "num_samples": 4,
        "vae2_path": vae_folders["nested"],
        "vae2_subfolder": "vae",
        "proxy": "http://user:secret@127.0.0.1:9",
    }
    with own_environment():  # --proxy is not to reach other tests
        results = eval_align.main(as_argv(flags))
    out = folder / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    return SimpleNamespace(out=out, results=results, metrics=read_json(out / "metrics.json"), page=page, flags=flags)


def results_of(gains, aligned=None, reencode=None, nearer=0.0, others=None, **more):
    """Results with one image for each of `gains`: the PSNR of the module minus that of decode + re-encode, in dB. `nearer`: the
    ST-LPIPS of decode + re-encode minus the module's. `others`: {further rung: (PSNR, ST-LPIPS)}, on each image."""
    per_image = {"reencode": {"psnr": [25.0] * len(gains)}, "vae2": {"psnr": [30.0] * len(gains)}}
    per_image["aligned"] = {"psnr": [25.0 + gain for gain in gains], "latent_mse": [0.1] * len(gains)}
    for row, distance in (("vae2", 0.05), ("reencode", 0.2), ("aligned", 0.2 - nearer)):
        per_image[row]["st_lpips_vgg"] = [distance] * len(gains)
    for row, (psnr, distance) in (others or {}).items():
        per_image[row] = {"psnr": [psnr] * len(gains), "st_lpips_vgg": [distance] * len(gains)}
    plain = {"latent_mse": 0.1, "ssim": 0.8, "colour_bias": [0.0, 0.0, 0.0], "macs": 4e9, "milliseconds": 8.0}
    ladder = {
        row: plain
        | {"label": row, "kind": row.split("_")[0]}
        | {name: float(np.mean(figures[name])) for name in ("psnr", "st_lpips_vgg")}
        for row, figures in per_image.items()
    }
    ladder["aligned"] |= {"macs": 1e9} | (aligned or {})
    ladder["reencode"] |= reencode or {}
    return {"images": len(gains), "unreadable": [], "ladder": ladder, "per_image": per_image, "image_size": 256} | more
