"""The exported .onnx file: one file, run by onnxruntime at sizes it was not exported with."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_script
from hostile import is_one_line, refusal

from tools import export_onnx
from tools.export_onnx import export_pipeline, largest_difference
from vae_align import AlignConfig, AlignPipeline, LatentSpace, align_module
from vaes.codec import SPACES

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
SIZES = ((1, 4, 4), (1, 24, 40), (2, 17, 9), (3, 1, 2), (1, 32, 32))  # batch, rows and columns of the coarser grid
PRETRAINED = sorted((ROOT / "assets" / "pretrained").glob("*.safetensors"))


def difference_of(path, module):
    """The largest difference between the file's and the module's output at all sizes, and the file's session."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return max(largest_difference(module, session, rows, columns, batch) for batch, rows, columns in SIZES), session


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_a_shipped_module_is_one_file_that_computes_the_same(path, tmp_path):
    """Weights in a second file that stays behind, a graph of one size only, an input that is lost, another result."""
    output = tmp_path / "module.onnx"
    told = run_script("tools/export_onnx.py", str(path), str(output))
    assert "differs from torch by at most" in told.stdout and not told.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["module.onnx"]
    pipeline = AlignPipeline.from_pretrained(path)
    difference, session = difference_of(output, pipeline.module)
    assert difference < 1e-4
    inputs = ["latents"] * pipeline.uses_latents + ["image"] * pipeline.uses_image
    assert [entry.name for entry in session.get_inputs()] == inputs
    assert [entry.name for entry in session.get_outputs()] == ["aligned"]
    model = onnx.load(output)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [20]
    described = json.loads({entry.key: entry.value for entry in model.metadata_props}["vae_align"])
    assert LatentSpace.from_dict(described["space2"]) == SPACES["flux1"]


@pytest.mark.parametrize("strides", [(8, 16), (16, 8)], ids=str)
@pytest.mark.parametrize("input_types", [("latent",), ("image",), ("image", "latent")], ids="-".join)
def test_other_grids_leave_their_sizes_open_too(input_types, strides, tmp_path):
    """A grid that is folded or repeated, whose size the exporter takes for a constant."""
    torch.manual_seed(0)
    downsample_times = {8: 3, 16: 4}[strides[1]]
    config = AlignConfig(input_types, 4, 16, 8, 1, downsample_times, *strides)
    pipeline = AlignPipeline(align_module(config).eval())
    export_pipeline(pipeline, tmp_path / "module.onnx")
    assert difference_of(tmp_path / "module.onnx", pipeline.module)[0] < 1e-4


def test_another_ending_or_place_is_one_line(tmp_path, monkeypatch):
    """Minutes of work for a file that cannot be written, or torch's traceback."""
    output = tmp_path / "nowhere" / "module.onnx"
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(PRETRAINED[0]), str(output)])
    refusal(export_onnx.main, output, "ends in .onnx")
    ended = run_script("tools/export_onnx.py", str(PRETRAINED[0]), str(tmp_path / "module.txt"), check=False)
    assert ended.returncode == 1 and is_one_line(ended.stderr.strip()) and "ends in .onnx" in ended.stderr
