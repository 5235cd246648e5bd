"""The shipped config with real VAEs and photos, where VAE_ALIGN_SHARED names them."""

import json
import math

from conftest import ROOT, as_argv, run_script
from runs import results_of


def test_taesd_to_taef1_trains_and_evaluates_with_the_shipped_config(shared, tmp_path):
    """Tiny autoencoders with local folders in place of hub ids; a wrong scale or range: VAE2's reconstruction below 20 dB."""
    for name, number in (("train", 8), ("eval", 4)):
        photos = shared / "photos" / name
        chosen = sorted(photo for photo in photos.iterdir() if photo.suffix.lower() in (".jpg", ".jpeg", ".png"))[:number]
        assert len(chosen) == number
        (tmp_path / name).mkdir()
        for photo in chosen:
            (tmp_path / name / photo.name).symlink_to(photo.resolve())
    flags = {
        "load_config": ROOT / "config" / "taesd_to_taef1.json",
        "vae1_path": shared / "vaes" / "taesd",
        "vae2_path": shared / "vaes" / "taef1",
        "train_data_dir": tmp_path / "train",
        "eval_data_dir": tmp_path / "eval",
        "image_size": 64,
        "num_workers": 0,
        "max_train_steps": 2,
        "eval_frequency": 0,
        "log_dir": tmp_path / "runs",
        "save_dir": tmp_path / "ckpt",
    }
    run_script("train_align_with_args.py", *as_argv(flags), cwd=tmp_path)
    run = results_of(tmp_path)
    assert run.last["step"] == 2
    assert run.last["align_config"]["latent_channels"] == 4
    assert run.last["align_config"]["out_channels"] == 16
    hidden_channels = json.loads(flags["load_config"].read_text())["hidden_channels"]
    assert run.last["align_config"]["hidden_channels"] == hidden_channels  # not the parser's

    output = tmp_path / "results"
    judged = {"checkpoint": run.checkpoints[-1], "eval_data_dir": tmp_path / "eval", "output_dir": output, "num_workers": 0}
    run_script("eval_align.py", *as_argv(judged), "--save_visualizations", cwd=tmp_path)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["images"] == 4
    assert len(list(output.glob("*.png"))) == 4
    ladder = metrics["ladder"]
    assert ladder["vae2"]["psnr"] > 20
    assert ladder["vae1"]["psnr"] > 18
    assert ladder["vae2"]["psnr"] > ladder["aligned"]["psnr"] > ladder["reencode"]["psnr"]  # it starts at the shipped module
    assert all(math.isfinite(ladder["aligned"][name]) for name in ("latent_mse", "psnr", "ssim"))
