"""Checkpoints: they carry all that use needs, run no code, appear whole, and never replace one another."""

import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_kl_vae
from pipelines import Payload, make_pipeline, save

from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from runtime.cli import MISTAKES
from train_align_with_args import create_align_pipeline, parse_args
from vae_align import AlignConfig, AlignModule, read_checkpoint

NAME = re.compile(r"align_pipeline_\d{8}_\d{6}\.pth")


def make_inputs():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, 4, 5, 3, generator=generator), torch.rand(1, 3, 40, 24, generator=generator) * 2 - 1


@pytest.fixture
def saved(vae_folders, tmp_path):
    """(pipeline kl4 -> kl16, its checkpoint)."""
    pipeline = make_pipeline(vae_folders["kl4"], vae_folders["kl16"])
    return pipeline, save(pipeline, tmp_path / "ckpt")


@pytest.fixture
def orphan(vae_folders, tmp_path):
    """(pipeline, its checkpoint), both VAEs gone from where they were."""
    for name in ("kl4", "kl16"):
        shutil.copytree(vae_folders[name], tmp_path / "gone" / name)
    pipeline = make_pipeline(tmp_path / "gone" / "kl4", tmp_path / "gone" / "kl16")
    path = save(pipeline, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "gone")
    return pipeline, path


def complaint(call, *parts):
    """The UserError that `call()` raises, as text: one line that holds every part."""
    with pytest.raises(MISTAKES) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text.strip()
    assert len(text) < 600
    for part in parts:
        assert str(part) in text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("input_types", [("latent",), ("image",), ("image", "latent")], ids="-".join)
def test_a_checkpoint_gives_the_same_pipeline_back(vae_folders, tmp_path, input_types):
    """A default in place of an architecture value, a buffer that is not saved, VAEs swapped, progress lost."""
    options = {"input_types": input_types, "hidden_channels": 12, "num_blocks": 3, "downsample_times": 4}
    pipeline = make_pipeline(vae_folders["kl4_stride4"], vae_folders["kl16"], **options)
    metrics = {"aligned": {"psnr": 20.5, "ssim": None}}
    path = save(pipeline, tmp_path, config={"image_size": 32, "input_types": ["image"]}, metrics=metrics)
    again = PipelineWithVAEs.from_checkpoint(path)
    assert again.config == pipeline.config
    assert again.progress == {
        "step": 7,
        "epoch": 1.5,
        "metrics": metrics,
        "config": {"image_size": 32, "input_types": ["image"]},
    }
    torch.testing.assert_close(again.module.state_dict(), pipeline.module.state_dict(), rtol=0, atol=0)
    latents, image = torch.randn(1, 4, 10, 6), torch.rand(1, 3, 40, 24)
    assert torch.equal(again.translate(latents, image), pipeline.translate(latents, image))
    assert again.module.has_ridge == ("latent" in input_types)
    assert not again.module.training
    assert again.codec1.identity == pipeline.codec1.identity
    assert again.codec2.identity == pipeline.codec2.identity
    assert torch.equal(again.codec2.encode(image), pipeline.codec2.encode(image))


def test_training_afterwards_does_not_change_what_was_saved(saved):
    """Tensors shared with the file's content, or the live module in the place of a copy."""
    pipeline, path = saved
    expected = pipeline.translate(*make_inputs())
    with torch.no_grad():
        for parameter in pipeline.module.parameters():
            parameter.zero_()
    assert torch.equal(PipelineWithVAEs.from_checkpoint(path).translate(*make_inputs()), expected)


def test_plain_torch_reads_the_file_without_running_code(saved):
    """An object of ours (config, path, dtype) among the content: a file that only pickle can read."""
    pipeline, path = saved
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == pipeline.module.state_dict().keys()
    assert content["vae2"]["channels"] == 16
    assert (content["vae2"]["space"]["name"], content["vae2"]["space"]["mean"][0]) == ("flux1", pytest.approx(0.1159))
    assert all(tensor.device.type == "cpu" for tensor in content["state_dict"].values())


def test_paths_given_as_path_objects_can_be_read_back(vae_folders, tmp_path):
    """A pathlib.Path in the file, which weights_only refuses: a checkpoint that is written and never read again."""
    args = parse_args(["--hidden_channels", "8"])
    args.vae1_path, args.vae2_path = vae_folders["kl4"], vae_folders["kl16"]
    vaes = [load_vae_model(path, "", None, "cpu", torch.float32) for path in (args.vae1_path, args.vae2_path)]
    path = save(create_align_pipeline(*vaes, args), tmp_path)
    assert PipelineWithVAEs.from_checkpoint(path).codec2.channels == 16


# ----------------------------------------------------------------------------------------------------------------------
# With and without VAEs


def test_translate_needs_neither_vae(orphan):
    """VAEs that are loaded, looked for or asked about although only the module is used."""
    pipeline, path = orphan
    again = PipelineWithVAEs.from_checkpoint(path)
    assert torch.equal(again.translate(*make_inputs()), pipeline.translate(*make_inputs()))


def test_moving_to_a_device_needs_neither_vae(orphan):
    """`from_checkpoint(...).to(device).translate(...)`: the three lines of a diffusers user without our VAE folders."""
    pipeline, path = orphan
    again = PipelineWithVAEs.from_checkpoint(path).to("cpu")
    assert torch.equal(again.translate(*make_inputs()), pipeline.translate(*make_inputs()))


def test_a_vae_that_is_gone_is_one_line_that_names_it(orphan):
    """The other VAE's flag, or a traceback from the hub client."""
    pipeline = PipelineWithVAEs.from_checkpoint(orphan[1])
    complaint(lambda: pipeline.vae2, "VAE2", "gone")
    complaint(lambda: pipeline.codec1, "VAE1", "gone")


def test_vae_of_a_relative_path_is_found_from_another_directory(vae_folders, tmp_path, monkeypatch):
    """A path recorded as typed: elsewhere it means another folder, and one such as `vaes/kl16` reads like a hub id."""
    for name in ("kl4", "kl16"):
        shutil.copytree(vae_folders[name], tmp_path / "here" / "assets" / "vaes" / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = save(make_pipeline("assets/vaes/kl4", "assets/vaes/kl16"), tmp_path / "ckpt")  # two slashes: no hub id
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert PipelineWithVAEs.from_checkpoint(path).codec2.channels == 16


@pytest.mark.parametrize("given", ["folder", "path", "subfolder", "lazy", "object"])
def test_vaes_can_be_named_anew(orphan, vae_folders, given):
    """An override that is ignored, taken only as text, or that must lie in the recorded subfolder."""
    path = orphan[1]
    vae2 = {
        "folder": str(vae_folders["kl16"]),
        "path": vae_folders["kl16"],
        "subfolder": vae_folders["nested"],
        "lazy": load_vae_model(vae_folders["kl16"], "", None, "cpu", torch.float32),
        "object": load_vae_model(vae_folders["kl16"], "", None, "cpu", torch.float32).model,
    }[given]
    again = PipelineWithVAEs.from_checkpoint(path, vae2=vae2)
    _, image = make_inputs()
    assert again.codec2.encode(image).shape == (1, 16, 5, 3)
    if given in ("lazy", "object"):
        assert again.vae2 is vae2 or again.vae2.model is vae2
    complaint(lambda: again.codec1, "VAE1")  # only the one that was named


@pytest.mark.parametrize("number, other, said", [(2, "kl4", "channels"), (1, "kl4_stride4", "stride"), (1, "kl16", "channels")])
def test_a_vae_of_another_latent_space_is_one_line_that_names_it(saved, vae_folders, number, other, said):
    """Wrong channels found by a convolution much later; VAEs given the wrong way round."""
    for vae in (vae_folders[other], load_vae_model(vae_folders[other], "", None, "cpu", torch.float32).model):
        pipeline = PipelineWithVAEs.from_checkpoint(saved[1], **{f"vae{number}": vae})
        complaint(lambda pipeline=pipeline: getattr(pipeline, f"codec{number}"), f"VAE{number}", said)


def test_a_pipeline_of_objects_says_that_it_does_not_know_where_they_are(tmp_path):
    """The path None looked up as a folder of that name."""
    spaces = [Codec(make_kl_vae(4)), Codec(make_kl_vae(16))]
    path = save(PipelineWithVAEs(AlignModule(AlignConfig(hidden_channels=8)), *spaces), tmp_path)
    complaint(lambda: PipelineWithVAEs.from_checkpoint(path).codec2, "VAE2", "does not say")


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not ours


@pytest.mark.parametrize("form", ["torch", "torch_legacy", "pickle"])
def test_a_malicious_file_runs_no_code(saved, tmp_path, form):
    """torch.load with weights_only off, or with a fall-back to it."""
    target, path = tmp_path / "executed", tmp_path / "malicious.pth"
    pickle.loads(pickle.dumps(Payload(target))).close()
    assert target.exists()  # the payload is live
    target.unlink()
    content = torch.load(saved[1], weights_only=True) | {"metrics": Payload(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["metrics"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    complaint(lambda: PipelineWithVAEs.from_checkpoint(path), path, "code")
    assert not target.exists()


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


FOREIGN = {
    "cut_in_half": lambda path: cut(path, 0.5),
    "cut_at_the_end": lambda path: cut(path, 0.99),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("# a page of text, not a checkpoint\n" * 9),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "dict": lambda path: torch.save({"step": 1}, path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "state_dict": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "format_only": lambda path: torch.save({"format": "vae-align"}, path),
    "folder_without_checkpoints": lambda path: (path.unlink(), path.mkdir()),
    "nothing_there": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_in_one_line(saved, kind):
    """A traceback from zipfile, pickle or torch; a warning about malicious code for a file that merely is another kind."""
    path = saved[1]
    FOREIGN[kind](path)
    text = complaint(lambda: PipelineWithVAEs.from_checkpoint(path), path)
    assert "run code" not in text


def change(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict": {}},
        {"state_dict": [1, 2]},
        {"align_config": {"hidden_channels": "many"}},
        {"align_config": {"hidden_channels": 16}},  # not what the weights are
        {"align_config": None},
        {"align_config": {"input_types": ["sound"]}},
        {"vae2": None},
        {"vae2": {"path": "somewhere"}},
        {"config": [1]},
    ],
    ids=str,
)
def test_a_checkpoint_with_a_broken_part_is_one_line(saved, changes):
    """A traceback from a missing key or a wrong type, far from where the file was read."""
    path = saved[1]
    change(path, **changes)

    def use():
        pipeline = PipelineWithVAEs.from_checkpoint(path)
        return pipeline.codec2, pipeline.progress["config"].get("seed")

    complaint(use)


# ----------------------------------------------------------------------------------------------------------------------
# Names and appearance


def test_two_saves_within_a_second_get_two_names_that_sort(saved):
    """One name for both (the first is lost), or a suffix that sorts before."""
    pipeline, first = saved
    paths = [first, *(save(pipeline, first.parent, step=step) for step in range(8, 12))]
    assert all(NAME.fullmatch(path.name) for path in paths)
    assert sorted(path.name for path in paths) == [path.name for path in paths]
    assert [read_checkpoint(path)["step"] for path in paths] == [7, 8, 9, 10, 11]


def test_a_clock_that_went_back_does_not_change_the_order(saved):
    """A checkpoint of the future sorts after everything saved from now on."""
    pipeline, first = saved
    future = first.rename(first.parent / "align_pipeline_20991231_235959.pth")
    latest = save(pipeline, first.parent, step=8)
    assert latest.name > future.name
    assert NAME.fullmatch(latest.name)


def test_a_folder_stands_for_its_newest_checkpoint(saved, tmp_path):
    """The oldest, or the one that the file system lists last."""
    pipeline, first = saved
    latest = save(pipeline, first.parent, step=8)
    os.utime(first)  # touched later, but not newer
    assert read_checkpoint(first.parent)["step"] == 8
    assert PipelineWithVAEs.from_checkpoint(latest.parent).progress["step"] == 8


def test_a_renamed_copy_does_not_pass_for_the_newest(saved):
    """`align_pipeline_best.pth` sorts after every date."""
    pipeline, first = saved
    shutil.copy(first, first.parent / "align_pipeline_best.pth")
    save(pipeline, first.parent, step=8)
    assert read_checkpoint(first.parent)["step"] == 8


def save_many(pipeline, folder, number, start, names):
    start.wait()
    names.put([(number, save(pipeline, folder, step=100 * number + count).name, 100 * number + count) for count in range(4)])


def test_two_processes_that_save_at_once_never_overwrite(saved, tmp_path):
    """A name that is looked up and taken in two steps, with another process in between."""
    context = multiprocessing.get_context("fork")
    start, names = context.Barrier(2), context.Queue()
    folder = tmp_path / "together"
    workers = [context.Process(target=save_many, args=(saved[0], folder, number, start, names)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    written = [entry for _ in workers for entry in names.get(timeout=240)]
    for worker in workers:
        worker.join(60)
    assert len({name for _, name, _ in written}) == 8
    assert {entry.name for entry in folder.iterdir()} == {name for _, name, _ in written}
    for _, name, step in written:
        assert read_checkpoint(folder / name)["step"] == step


def test_a_save_that_fails_leaves_nothing_behind(saved):
    """Half a checkpoint under its final name, or a temporary file for ever."""
    pipeline, first = saved
    with pytest.raises(Exception, match="pickle"):
        save(pipeline, first.parent, metrics={"unwritable": lambda: None})
    assert list(first.parent.iterdir()) == [first]


def test_a_checkpoint_is_readable_by_whoever_the_umask_allows(saved):
    """mkstemp's 0600 left on the file: a group that shares a folder cannot read each other's checkpoints."""
    before = os.umask(0o022)
    try:
        assert Path(save(saved[0], saved[1].parent)).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
