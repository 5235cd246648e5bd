"""Checkpoints: they carry all that use needs, run no code, appear whole, and never replace one another."""

import json
import math
import os
import pickle
import random
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import as_argv, make_kl_vae, tiny_flags
from hostile import flip_bit, no_hang, refusal
from pipelines import Payload, make_pipeline, save
from runs import QUIET, judge, train

import train_align_with_args as train_script
from vae_align import AlignConfig, AlignError, AlignPipeline, align_module
from vaes import pipeline as pipeline_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, compare_vaes, read_checkpoint, require_memory_for, weights_digest

NAMES = ("kl4", "kl16")


@pytest.fixture(scope="module")
def saved(vae_folders, tmp_path_factory):
    """(pipeline kl4 -> kl16, its checkpoint, which no test changes)."""
    pipeline = make_pipeline(vae_folders["kl4"], vae_folders["kl16"])
    config = {"seed": 1, "image_size": 32, "precision": "float32"}
    return pipeline, save(pipeline, tmp_path_factory.mktemp("saved"), config=config)


@pytest.fixture
def path(saved, tmp_path):
    """A copy of the good checkpoint, to be damaged."""
    return shutil.copy(saved[1], tmp_path / "align_pipeline_20260101_000000.pth")


@pytest.fixture
def orphan(vae_folders, tmp_path):
    """A checkpoint whose VAEs are both gone from where they were."""
    for name in NAMES:
        shutil.copytree(vae_folders[name], tmp_path / "gone" / name)
    path = save(make_pipeline(tmp_path / "gone" / "kl4", tmp_path / "gone" / "kl16"), tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "gone")
    return path


@pytest.mark.parametrize("input_types", [("latent",), ("image",), ("image", "latent")], ids="-".join)
def test_a_checkpoint_gives_the_same_pipeline_back(vae_folders, tmp_path, input_types):
    """A default in place of an architecture value, a buffer that is not saved, VAEs swapped, progress lost."""
    options = {"input_types": input_types, "hidden_channels": 12, "num_blocks": 3, "downsample_times": 4}
    pipeline = make_pipeline(vae_folders["kl4_stride4"], vae_folders["kl16"], **options)
    metrics = {"aligned": {"psnr": 20.5, "ssim": None}}
    config = {"image_size": 32, "input_types": ["image"]}
    again = PipelineWithVAEs.from_checkpoint(save(pipeline, tmp_path, config=config, metrics=metrics))
    assert again.config == pipeline.config
    assert again.progress == {"step": 7, "epoch": 1.5, "metrics": metrics, "config": config}
    torch.testing.assert_close(again.module.state_dict(), pipeline.module.state_dict(), rtol=0, atol=0)
    latents, image = torch.randn(1, 4, 10, 6), torch.rand(1, 3, 40, 24)
    assert torch.equal(again.translate(latents, image), pipeline.translate(latents, image))
    assert again.module.has_ridge == ("latent" in input_types)
    assert not again.module.training
    assert again.codec1.identity == pipeline.codec1.identity
    assert again.codec2.identity == pipeline.codec2.identity
    assert torch.equal(again.codec2.encode(image), pipeline.codec2.encode(image))


# ----------------------------------------------------------------------------------------------------------------------
# With and without VAEs


def test_vae_of_a_relative_path_is_found_from_another_directory(vae_folders, tmp_path, monkeypatch):
    """A path recorded as typed: elsewhere it means another folder, and one such as `vaes/kl16` reads like a hub id."""
    for name in NAMES:
        shutil.copytree(vae_folders[name], tmp_path / "here" / "assets" / "vaes" / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = save(make_pipeline("assets/vaes/kl4", "assets/vaes/kl16"), tmp_path / "ckpt")  # two slashes: no hub id
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert PipelineWithVAEs.from_checkpoint(path).codec2.channels == 16


@pytest.mark.parametrize("given", ["path", "subfolder", "lazy", "object"])
def test_vaes_can_be_named_anew(orphan, vae_folders, given):
    """An override that is ignored, text alone, or in the recorded subfolder; a missing VAE under the other's flag."""
    vae2 = {
        "path": vae_folders["kl16"],
        "subfolder": str(vae_folders["nested"]),
        "lazy": load_vae_model(vae_folders["kl16"], "", None, "cpu", torch.float32),
        "object": load_vae_model(vae_folders["kl16"], "", None, "cpu", torch.float32).model,
    }[given]
    again = PipelineWithVAEs.from_checkpoint(orphan, vae2=vae2)
    assert again.codec2.encode(torch.zeros(1, 3, 40, 24)).shape == (1, 16, 5, 3)
    if given in ("lazy", "object"):
        assert again.codec2.vae is vae2 or again.codec2.vae.model is vae2
    refusal(lambda: again.codec1, "VAE1", "gone")  # only the one that was named
    refusal(lambda: PipelineWithVAEs.from_checkpoint(orphan).codec2, "VAE2", "gone")


@pytest.mark.parametrize("number, other, said", [(2, "kl4", "channels"), (1, "kl4_stride4", "stride"), (1, "kl16", "channels")])
def test_a_vae_of_another_latent_space_is_one_line_that_names_it(saved, vae_folders, number, other, said):
    """Wrong channels found by a convolution much later; VAEs given the wrong way round."""
    for vae in (vae_folders[other], load_vae_model(vae_folders[other], "", None, "cpu", torch.float32).model):
        pipeline = PipelineWithVAEs.from_checkpoint(saved[1], **{f"vae{number}": vae})
        refusal(lambda pipeline=pipeline: getattr(pipeline, f"codec{number}"), f"VAE{number}", said)


def edited_copy(folder, copy, **changes):
    """A copy of a VAE's folder with these changes to its config."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize("scales", [(0.18215, 0.5), (0.5, 0.18215), (0.5, 0.6)])
def test_a_vae_with_another_scale_is_of_another_space(vae_folders, tmp_path, scales):
    """Only spaces that both have names are compared: latents at a multiple of what the module knows, judged without a word."""
    one, other = (edited_copy(vae_folders["kl4"], tmp_path / str(scale), scaling_factor=scale) for scale in scales)
    path = save(make_pipeline(one, vae_folders["kl16"]), tmp_path)
    refusal(lambda: PipelineWithVAEs.from_checkpoint(path, vae1=other).codec1, "VAE1", "its latent space is", "0.5")


def test_vaes_are_compared_by_content(vae_folders, tmp_path, monkeypatch):
    """Another VAE that nobody hears of; a word about one that was moved; images encoded where digests tell."""
    tiny = edited_copy(vae_folders["tiny4"], tmp_path / "tiny")
    content = read_checkpoint(save(make_pipeline(tiny, vae_folders["kl16"]), tmp_path))

    def compare(content, vae1, found=None, images=lambda: torch.rand(1, 3, 64, 64)):
        monkeypatch.setattr(pipeline_module, "detect_wrong_space", lambda *_: found)
        return compare_vaes(content, PipelineWithVAEs.from_checkpoint(content, vae1=vae1), images)

    assert compare(content, shutil.copytree(tiny, tmp_path / "moved"), images=None) == ([], [])
    other = edited_copy(tiny, tmp_path / "other", latent_magnitude=4)
    content["vae1"]["space"] |= {"name": "sd15"}
    assert compare(content, other) == ([], [f"VAE1 {other} is not the one of the training, {tiny}: its files differ."])
    assert compare(content, other, "these look like sdxl") == ([f"VAE1 {other}: these look like sdxl."], [])
    del content["vae1"]["content"]  # as in an older file
    assert compare(content, tiny) == ([], [])
    assert "nothing shows that they are the same" in compare(content, other)[1][0]


def test_a_module_has_one_digest_in_every_file(vae_folders, tmp_path):
    """Figures of a checkpoint that are refused for its shared file in float16; other weights that pass for the same."""
    pipeline = make_pipeline(vae_folders["kl4"], vae_folders["kl16"])
    digest = weights_digest(PipelineWithVAEs.from_checkpoint(save(pipeline, tmp_path)).module)
    shared = AlignPipeline(pipeline.module).to(torch.float16).save_pretrained(tmp_path / "shared.safetensors")
    assert digest == weights_digest(AlignPipeline.from_checkpoint(shared).module)
    assert digest != weights_digest(make_pipeline(vae_folders["kl4"], vae_folders["kl16"], seed=1).module)


def test_a_pipeline_of_objects_says_that_it_does_not_know_where_they_are(tmp_path):
    """The path None looked up as a folder of that name."""
    spaces = [Codec(make_kl_vae(4)), Codec(make_kl_vae(16))]
    path = save(PipelineWithVAEs(align_module(AlignConfig(hidden_channels=8)), *spaces), tmp_path)
    refusal(lambda: PipelineWithVAEs.from_checkpoint(path).codec2, "VAE2", "does not say")


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
    refusal(lambda: PipelineWithVAEs.from_checkpoint(path), path, "code")
    assert not target.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Names and appearance


def test_a_folder_stands_for_its_newest_checkpoint(saved, path):
    """The oldest one, or a renamed copy: `align_pipeline_best.pth` sorts after every date."""
    shutil.copy(path, path.with_name("align_pipeline_best.pth"))
    latest = save(saved[0], path.parent, step=8)
    os.utime(path)  # touched later, but not newer
    assert read_checkpoint(path.parent)["step"] == 8
    assert PipelineWithVAEs.from_checkpoint(latest.parent).progress["step"] == 8


def test_a_folder_of_other_files_says_which_one_to_name(saved, tmp_path):
    """A renamed copy, in a folder that is said to hold nothing; a run's checkpoints, of which nobody says how to use them."""
    refusal(lambda: AlignPipeline.from_pretrained(saved[1].parent), "no such file", "save_pretrained")
    shutil.copy(saved[1], tmp_path / "good.pth")
    with pytest.raises(AlignError, match=r"in this folder; to use good.pth name the file$"):
        read_checkpoint(tmp_path)


def test_saves_at_once_never_overwrite(saved, tmp_path):
    """A name that is looked up and taken in two steps, with another process in between."""
    with ThreadPoolExecutor(8) as pool:  # the file system tells no thread from a process
        written = list(pool.map(lambda step: save(saved[0], tmp_path / "together", step=step), range(16)))
    assert set((tmp_path / "together").iterdir()) == set(written)
    assert [read_checkpoint(path)["step"] for path in written] == list(range(16))


# ----------------------------------------------------------------------------------------------------------------------
# From a hostile hand or a dying disk: each loads as it was saved, or is refused in one line, and runs no code


def rewrite(path, change):
    """Load the checkpoint, `change` its dict, and save it as torch does, checksums and all."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def compress(path):
    """Compress the parts of the zip, with sound checksums."""
    with zipfile.ZipFile(path) as parts:
        contents = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        for name, content in contents.items():
            parts.writestr(name, content)


def setting(part, **values):
    return lambda path: rewrite(path, lambda content: content[part].update(values))


def top(**values):
    return lambda path: rewrite(path, lambda content: content.update(values))


def without(*names):
    def drop(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return lambda path: rewrite(path, drop)


def cut_to(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def nested(depth):
    return [] if not depth else [nested(depth - 1)]


BIAS, TOO_MUCH = "out.bias", "far more than the file holds"
KINDS = {  # kind: (what makes it of a good one, what the message says)
    "cut in half": (lambda path: cut_to(path, 0.5), "damaged"),
    "one bit of a weight flipped": (flip_bit, "does not match its checksum"),
    "of noise": (lambda path: path.write_bytes(random.Random(0).randbytes(4096)), "checkpoint"),
    "zip that compresses": (compress, "compresses"),
    "another tool's": (top(format="other"), "not a checkpoint"),
    "a weight missing": (without("state_dict", BIAS), "out.bias"),
    "a weight too many": (setting("state_dict", extra=torch.zeros(1)), "extra"),
    "a weight of another shape": (setting("state_dict", **{BIAS: torch.zeros(3)}), "out.bias"),
    "a weight that is a number": (setting("state_dict", **{BIAS: 3.0}), "out.bias"),
    "a weight of whole numbers": (setting("state_dict", **{BIAS: torch.zeros(16, dtype=torch.int64)}), "out.bias"),
    "a weight without memory": (setting("state_dict", **{BIAS: torch.zeros(16, device="meta")}), "out.bias"),
    "a weight that is NaN": (setting("state_dict", **{BIAS: torch.full((16,), math.nan)}), "not finite"),
    "a billion channels": (setting("align_config", hidden_channels=10**9), "hidden_channels 1000000000"),
    "strides that share no grid": (setting("align_config", latent_stride=3), "strides"),
    "an input of another kind": (setting("align_config", input_types=["sound"]), "input_types"),
    "no architecture": (without("align_config"), "incomplete"),
    "a VAE of another space": (setting("vae1", channels=16), "contradicts"),
    "a VAE whose path is a number": (setting("vae1", path=3), "incomplete"),
    "a step before the first": (top(step=-1), "step"),
    "an epoch in words": (top(epoch="one"), "incomplete"),
    "a config that is text": (top(config="{}"), "incomplete"),
    "a number as a tensor of any shape": (top(metrics={"psnr": torch.zeros(1).expand(10**5, 10**6)}), TOO_MUCH),
    "parts of one tensor, each a whole": (top(metrics=dict.fromkeys(range(10**5), torch.zeros(10**4))), TOO_MUCH),
    "lists in lists": (top(metrics={"psnr": nested(300)}), "nested too deep"),
    "a seed in words": (setting("config", seed="one"), "seed"),
    "a precision that is a list": (setting("config", precision=["float32"]), "incomplete"),
    "a device that is a list": (top(trained_on={"device": ["cpu"], "precision": "float32"}), "incomplete"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_checkpoint_is_one_line(path, kind):
    """A traceback far from where the file was read; memory taken for a billion channels; NaN that trains on."""
    make, said = KINDS[kind]
    make(path)
    refusal(lambda: read_checkpoint(path), path, said)
    refusal(lambda: PipelineWithVAEs.from_checkpoint(path), path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None], ids=["empty folder", "pipe", "nothing"])
def test_a_checkpoint_that_is_no_file_is_one_line(tmp_path, make):
    """Waiting for someone to write into a pipe; an error of the system's in place of a message."""
    make(tmp_path / "wanted")
    refusal(lambda: read_checkpoint(tmp_path / "wanted"), tmp_path / "wanted")
    refusal(lambda: read_checkpoint("a\0b"))


def test_what_is_damaged_is_passed_over_in_a_folder(path, caplog):
    """A folder whose newest file a full disk cut short, or a pipe, that counts as holding none."""
    newer = path.with_name("align_pipeline_20260102_000000.pth")
    shutil.copy(path, newer)
    cut_to(newer, 0.9)
    os.mkfifo(path.with_name("align_pipeline_20260103_000000.pth"))
    with no_hang():
        assert read_checkpoint(path.parent)["step"] == 7
    assert caplog.text.count("trying the one before it") == 2


def test_the_programs_refuse_a_hostile_checkpoint_at_once(flags, path, tmp_path, monkeypatch):
    """A flag of one of the programs that reads checkpoints past the checks above."""
    monkeypatch.chdir(tmp_path)
    setting("state_dict", **{BIAS: torch.zeros(3)})(path)
    refusal(lambda: train_script.main(as_argv(flags | {"load_checkpoint": path})), path, BIAS)
    refusal(lambda: judge(path, flags["eval_data_dir"], tmp_path), path, BIAS)


def test_a_module_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    """A process that the system ends without a word; a billion parameters started at random first."""
    monkeypatch.setattr("vaes.pipeline.physical_memory", lambda: 4 * 100_000)
    refusal(lambda: require_memory_for(AlignConfig(hidden_channels=64)), "hidden_channels 64", "num_blocks 2")
    require_memory_for(AlignConfig(hidden_channels=8, num_blocks=0))


STATES = {  # what is set in the state of the training, or beside it
    "a list": {"training": [1]},
    "an epoch of no steps": {"order": {"images": 10, "steps in an epoch": 0, "processes": 1}},
    "checkpoints of its own that are elsewhere": {"own": ["../precious.pth"]},
    "a name that is a path": {"run": "../../align_20260101_000000"},
    "half a bad step": {"bad_steps": 0.5},
    "VAEs in a list": {"vaes": ["seen_through"]},
    "a colour of one channel": {"colours": {"vae2_bias": torch.zeros(1, 8, 8), "shift": torch.zeros(3, 8, 8)}},
    "another optimizer": {"optimizer": {"state": {}, "param_groups": []}},
    "moments of another shape": {"optimizer": "moments"},
    "a scheduler that is none": {"scheduler": None},
}


@pytest.fixture(scope="module")
def stopped(vae_folders, photo_folders, tmp_path_factory):
    """(flags of a short run, its checkpoint)."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = tiny_flags(vae_folders, photo_folders, folder)
    return flags, train(flags, folder, **QUIET, max_train_steps=1).checkpoints[-1]


@pytest.mark.parametrize("kind", STATES)
def test_a_hostile_state_of_a_training_is_one_line(stopped, tmp_path, kind):
    """A traceback; a name in the file by which --keep_last deletes, or TensorBoard writes, whatever its author likes."""
    flags, path = stopped

    def change(content):
        training = content["training"]
        for name, value in STATES[kind].items():
            if value == "moments":
                for moments in training["state"]["optimizer"]["state"].values():
                    moments["exp_avg"] = torch.zeros(3)
                continue
            place = content if name in ("training", "run") else training if name in training else training["state"]
            place[name] = value

    path = shutil.copy(path, tmp_path / path.name)
    rewrite(path, change)
    changes = {**QUIET, "resume": path, "max_train_steps": 2}
    text = refusal(lambda: train(flags, tmp_path, **changes))
    assert "state of its training" in text, text
