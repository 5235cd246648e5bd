"""The inference file by itself: copied, installed, exported, in another dtype, between raw latents."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.export import Dim

from runtime.cli import MISTAKES
from vae_align import AlignConfig, AlignModule, AlignPipeline
from vaes.codec import SPACES

SHIPPED = ROOT / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors"
INPUT_TYPES = (("latent",), ("image",), ("image", "latent"))
HOST = """
import sys
import torch
for name in ("numpy", "diffusers", "huggingface_hub", "accelerate", "PIL", *sys.argv[2:]):
    sys.modules[name] = None  # importing it raises
import utils, device, metrics
assert utils.OWNER == device.OWNER == metrics.OWNER == "the host"
{imported}
torch.set_num_threads(1)
latents = torch.linspace(-2, 2, 4 * 12 * 10).view(1, 4, 12, 10)
torch.save(AlignPipeline.from_checkpoint(sys.argv[1]).translate(latents), "translated.pt")
"""


def make_module(**options):
    torch.manual_seed(0)
    return AlignModule(AlignConfig(**{"hidden_channels": 8, "num_blocks": 1, **options})).eval()


def make_inputs(config, rows, columns, batch=2):
    """Keyword arguments of `forward` whose output has that many rows and columns."""
    height, width = rows * config.out_stride, columns * config.out_stride
    inputs = {}
    if "latent" in config.input_types:
        grid = (height // config.latent_stride, width // config.latent_stride)
        inputs["latents"] = torch.randn(batch, config.latent_channels, *grid)
    if "image" in config.input_types:
        inputs["image"] = torch.rand(batch, 3, height, width)
    return inputs


# ----------------------------------------------------------------------------------------------------------------------
# Copied and installed


@pytest.mark.parametrize("form", ["file", "module of a package", "checkpoint without safetensors"])
def test_a_copy_works_in_a_foreign_host(tmp_path, form):
    """An import of ours, of numpy or diffusers, or a top-level name that a host such as ComfyUI owns; other results there."""
    (tmp_path / "utils").mkdir()
    for name in ("utils/__init__.py", "device.py", "metrics.py"):
        (tmp_path / name).write_text("OWNER = 'the host'\n")
    place = tmp_path / "pack" if form == "module of a package" else tmp_path
    place.mkdir(exist_ok=True)
    shutil.copy(ROOT / "vae_align.py", place)
    imported = "from vae_align import AlignPipeline"
    if form == "module of a package":
        (place / "__init__.py").write_text("from .vae_align import AlignPipeline\n")
        imported = "from pack import AlignPipeline"
    checkpoint, blocked = SHIPPED, []
    if form == "checkpoint without safetensors":
        pipeline = AlignPipeline.from_pretrained(SHIPPED)
        checkpoint = tmp_path / "module.pth"
        content = {"format": "vae-align", "align_config": pipeline.config.to_dict(), "state_dict": pipeline.module.state_dict()}
        vaes = {f"vae{n}": {"path": None, "subfolder": None, "channels": c, "stride": 8} for n, c in ((1, 4), (2, 16))}
        torch.save(content | vaes | {"config": {}, "step": 0, "epoch": 0, "metrics": {}}, checkpoint)
        blocked = ["safetensors"]
    (tmp_path / "host.py").write_text(HOST.format(imported=imported))
    command = [sys.executable, "host.py", str(checkpoint), *blocked]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    latents = torch.linspace(-2, 2, 4 * 12 * 10).view(1, 4, 12, 10)
    expected = AlignPipeline.from_pretrained(SHIPPED).translate(latents)
    assert torch.equal(torch.load(tmp_path / "translated.pt"), expected)


def test_what_is_installed_is_the_inference_file():
    """`pip install .` that ships the workshop, or that pulls in what training needs."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"] == {"py-modules": ["vae_align"], "packages": []}
    needed = {line.partition(">")[0] for line in settings["project"]["dependencies"]}
    assert needed == {"torch", "safetensors"}
    listed = {
        line.partition(">")[0] for line in (ROOT / "requirements.txt").read_text().split("# tests")[0].splitlines() if line
    }
    extras = {line.partition(">")[0] for line in settings["project"]["optional-dependencies"]["train"]}
    assert needed | extras == listed


# ----------------------------------------------------------------------------------------------------------------------
# Exported


@pytest.mark.parametrize("strides", [(8, 8), (8, 16), (16, 8)], ids=str)
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids="-".join)
def test_exports_leave_sizes_open(input_types, strides):
    """A graph for one size only, or a check in `forward` that a tracer cannot follow."""
    module = make_module(input_types=input_types, latent_stride=strides[0], out_stride=strides[1])
    config = module.config
    example, other = make_inputs(config, 4, 6), make_inputs(config, 10, 8, batch=3)
    expected = module(**other)
    traced = torch.jit.trace(module, example_kwarg_inputs=example, check_trace=False)
    assert torch.allclose(traced(**other), expected, atol=1e-5)

    batch, rows, columns = Dim("batch"), Dim("rows", min=2, max=512), Dim("columns", min=2, max=512)

    def open_sizes(name):
        unit = config.out_stride if name == "image" else max(1, config.out_stride // config.latent_stride)
        scaled = [unit * side if unit > 1 else side for side in (rows, columns)]
        if name == "latents" and config.latent_stride > config.out_stride:  # a latent stands for several rows of the output
            return {0: batch, 2: Dim("latent_rows", min=2, max=256), 3: Dim("latent_columns", min=2, max=256)}
        return {0: batch, 2: scaled[0], 3: scaled[1]}

    if len(input_types) == 2 and strides == (16, 8):
        return  # the image's sides are multiples of the latents', which torch.export cannot say of two inputs
    sizes = {name: open_sizes(name) for name in example}
    exported = torch.export.export(module, (), example, dynamic_shapes=sizes)
    assert torch.allclose(exported.module()(**other), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes, raw latents, the file


@pytest.mark.parametrize("how", [(torch.float16,), (torch.bfloat16,), ("cpu", torch.float16), (torch.float64,)], ids=str)
def test_a_pipeline_in_another_dtype_translates(how):
    """A `.to(dtype)` that is accepted and breaks the next call."""
    pipeline = AlignPipeline(make_module(input_types=("latent",)))
    latents = torch.randn(1, 4, 6, 6)
    expected = pipeline.translate(latents)
    pipeline.to(*how)
    assert pipeline.module.out.weight.dtype == how[-1]
    assert torch.allclose(pipeline.translate(latents), expected, atol=0.05)
    assert pipeline.translate(latents.half()).dtype == torch.float16


def test_a_dtype_that_computes_nothing_is_refused():
    """A module in whole numbers, which fails inside a convolution."""
    with pytest.raises(MISTAKES, match=r"torch\.int8"):
        AlignPipeline(make_module()).to(torch.int8)


def test_raw_latents_go_through_both_spaces_maps():
    """The maps of the two spaces mixed up, or one of them left out: latents that a raw host shows as noise."""
    pipeline = AlignPipeline.from_pretrained(SHIPPED)
    scaled = torch.randn(1, 4, 8, 8)
    raw = pipeline.translate(scaled / 0.18215, raw=True)  # Stable Diffusion's scale, FLUX.1's scale and shift
    assert torch.allclose(raw, pipeline.translate(scaled) / 0.3611 + 0.1159, atol=1e-4)


def test_raw_latents_of_a_space_without_a_name_are_refused():
    """A guess that a tiny autoencoder's scale of 1 is its space's."""
    pipeline = AlignPipeline(make_module(input_types=("latent",)), SPACES["sd15"])
    with pytest.raises(MISTAKES, match="does not name VAE2's latent space"):
        pipeline.translate(torch.randn(1, 4, 8, 8), raw=True)


def test_latents_of_the_other_space_are_named():
    """A number of channels that says nothing to who chose the wrong module."""
    with pytest.raises(MISTAKES, match=r"these look like latents of flux1"):
        AlignPipeline.from_pretrained(SHIPPED).translate(torch.randn(1, 16, 8, 8))


@pytest.mark.parametrize("place", ["folder", "file.safetensors"])
def test_a_saved_pipeline_comes_back(tmp_path, place):
    """A space, a figure or a digit that the file forgets."""
    pipeline = AlignPipeline(make_module(input_types=("latent",)), SPACES["sd15"], SPACES["flux1"], {"aligned": {"psnr": 20.5}})
    pipeline.save_pretrained(tmp_path / place)
    again = AlignPipeline.from_pretrained(tmp_path / place)
    assert (again.config, again.space1, again.space2) == (pipeline.config, pipeline.space1, pipeline.space2)
    assert again.figures == pipeline.figures
    latents = torch.randn(1, 4, 5, 7)
    assert torch.equal(again.translate(latents), pipeline.translate(latents))


def test_a_damaged_file_is_one_line(tmp_path):
    """Weights with a flipped bit: .safetensors holds no checksum of its own."""
    path = AlignPipeline(make_module()).save_pretrained(tmp_path / "module.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(MISTAKES, match=r"module\.safetensors: damaged"):
        AlignPipeline.from_pretrained(path)


def test_an_architecture_of_another_version_is_refused():
    """A key that is dropped, and a module that computes something else than it was trained for."""
    with pytest.raises(MISTAKES, match="unknown key 'activation' in its architecture"):
        AlignConfig.from_dict({"activation": "gelu"})
