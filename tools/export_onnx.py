"""Write a module as one .onnx file, for onnxruntime and other readers of ONNX.

    python tools/export_onnx.py assets/pretrained/taesd_to_taef1_latent.safetensors sd15_to_flux1.onnx

Inputs are `latents` (scaled, float32), `image` (NCHW in [-1, 1]), or both, as the module takes them; the output is `aligned`
(scaled). Batch, height and width are open. The file's metadata holds both latent spaces under `vae_align`, as JSON. Needs the
packages onnx and onnxscript; with onnxruntime the program also runs the file beside torch and prints the largest difference.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from runtime.cli import run
from utils import UserError, one_line
from vae_align import AlignConfig, AlignModule, AlignPipeline
from vaes.pipeline import PipelineWithVAEs

OPSET = 20
TOLERANCE = 1e-4  # of scaled latents
DEVIATION = 0.7  # of a photo's scaled latents; a module's rounding errors on stronger ones say nothing


def grids(config: AlignConfig) -> list[tuple[str, int, int]]:
    """(input, its channels, its places along one latent of the coarser of both spaces' grids) of each input."""
    unit = max(config.latent_stride, config.out_stride)
    latents = ("latents", config.latent_channels, unit // config.latent_stride)
    return [latents] * config.uses_latents + [("image", 3, unit)] * config.uses_image


def example_inputs(module: AlignModule, rows: int, columns: int, batch: int = 2) -> dict[str, torch.Tensor]:
    """Random inputs of `forward`; one row and column of them is a latent of the coarser of the two grids."""
    sizes = {name: (batch, channels, factor * rows, factor * columns) for name, channels, factor in grids(module.config)}
    return {
        name: torch.rand(size) * 2 - 1 if name == "image" else torch.randn(size) * DEVIATION for name, size in sizes.items()
    }


def open_sizes(module: AlignModule) -> dict[str, dict]:
    """{input: its open sizes, as multiples of the sizes that both inputs share}."""
    batch, rows, columns = (torch.export.Dim(name, min=1, max=1 << 14) for name in ("batch", "rows", "columns"))
    sizes = {}
    for name, _, factor in grids(module.config):
        height, width = (rows, columns) if factor == 1 else (factor * rows, factor * columns)
        sizes[name] = {0: batch, 2: height, 3: width}
    return sizes


def export_graph(
    model: torch.nn.Module, inputs: dict, sizes: dict, output: str | Path, output_name: str, metadata: dict, input_names=None
) -> None:
    """Write `model(**inputs)` as one ONNX file, weights included, with open sizes.

    Args:
        sizes: torch.export's `dynamic_shapes`. metadata: {key: text}. input_names: the graph's, by default those of `inputs`.
    """
    for chatty in ("onnxscript", "onnx_ir"):  # a line for every node they simplify
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with warnings.catch_warnings():  # torch warns that the two inputs share their sizes
        warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=sizes, opset_version=OPSET, dynamo=True, verbose=False,
            input_names=input_names or list(inputs), output_names=[output_name],
        )  # fmt: skip
    program.model.metadata_props.update(metadata)
    output = Path(output)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        program.save(written, external_data=False)
        os.replace(written, output)


def export_pipeline(pipeline: AlignPipeline, output: str | Path) -> None:
    """Write a pipeline's module as ONNX, in float32, with its spaces in the metadata."""
    module = pipeline.module.float().cpu().eval()
    module.to(memory_format=torch.contiguous_format)
    description = {"align_config": pipeline.config, "space1": pipeline.space1, "space2": pipeline.space2}
    metadata = {"vae_align": json.dumps({name: part.to_dict() for name, part in description.items()})}
    torch.manual_seed(0)
    export_graph(module, example_inputs(module, 3, 5), open_sizes(module), output, "aligned", metadata)


@torch.no_grad()
def largest_difference(module: AlignModule, session, rows: int, columns: int, batch: int) -> float:
    """The largest difference between onnxruntime's and torch's output for random inputs of that size."""
    inputs = example_inputs(module, rows, columns, batch)
    (aligned,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return (torch.from_numpy(aligned) - module(**inputs)).abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file (.safetensors or .pth), folder (its best module), pair such as sd15:flux1")
    parser.add_argument("output", help="the .onnx file to write; one that is there is replaced")
    args = parser.parse_args()
    output = Path(args.output)
    if output.suffix != ".onnx" or not output.parent.is_dir():
        raise UserError(f"{output}: name a file that ends in .onnx, in a folder that exists")
    pipeline = PipelineWithVAEs.from_checkpoint(args.checkpoint)
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it, and names it in many lines

        export_pipeline(pipeline, output)
    except ImportError as error:
        raise UserError(f"{output}: needs the package {error.name}; pip install onnx onnxscript onnxruntime") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({one_line(error)}); name another place") from None
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, opset {OPSET}, inputs {', '.join(open_sizes(pipeline.module))}")
    try:
        import onnxruntime
    except ImportError:
        print("not run: the package onnxruntime is not installed")
        return
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    difference = max(largest_difference(pipeline.module, session, *size) for size in ((8, 12, 1), (17, 9, 3)))
    if difference > TOLERANCE:
        raise UserError(f"{output}: onnxruntime differs from torch by {difference:.1e}; do not use this file")
    print(f"onnxruntime {onnxruntime.__version__} differs from torch by at most {difference:.1e}")


if __name__ == "__main__":
    run(main)
