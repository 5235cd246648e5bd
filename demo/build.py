"""Build a page that runs a module in a browser: one HTML file that needs no server and no network.

    make page
    python demo/build.py --checkpoint demo_output/ckpt_align --output demo_output/page.html

The file holds onnxruntime-web (from npm, `npm ci --prefix demo`), both VAEs and the module as ONNX, and a sample photo.
Needs the packages onnx and onnxscript.
"""

import argparse
import base64
import gzip
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from runtime.cli import alone_in, claim_writable_folder, run
from tools.export_onnx import export_graph, export_pipeline
from utils import UserError, atomic_file
from vaes.codec import Codec
from vaes.pipeline import PipelineWithVAEs

DEMO = Path(__file__).resolve().parent
RUNTIME = DEMO / "node_modules" / "onnxruntime-web" / "dist"
SAMPLE = DEMO.parent / "assets" / "photos" / "eval" / "skimage_coffee.jpg"


class Half(torch.nn.Module):
    """The encoder or decoder of a VAE as plain tensor operations, which an exporter can follow.

    For an AutoencoderKL or AutoencoderTiny whose scaled latents are `(raw - shift) * scale`.
    """

    def __init__(self, codec: Codec, decodes: bool):
        super().__init__()
        self.model, self.decodes = codec.vae.model, decodes
        self.scale = codec.vae.config.get("scaling_factor") or 1.0
        self.shift = codec.vae.config.get("shift_factor") or 0.0

    def forward(self, given):
        if self.decodes:
            return self.model.decode(given / self.scale + self.shift).sample
        encoded = self.model.encode(given)
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (raw - self.shift) * self.scale


@torch.no_grad()
def export_vae(codec: Codec, name: str, folder: Path) -> None:
    """Write `{name}_encoder.onnx` and `{name}_decoder.onnx`. UserError for a VAE that `Half` does not reproduce."""
    encoder, decoder = Half(codec, False).eval(), Half(codec, True).eval()
    image = torch.rand(2, 3, 3 * codec.stride, 5 * codec.stride) * 2 - 1
    latents = codec.encode(image)
    try:
        torch.testing.assert_close(encoder(image), latents, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(decoder(latents), codec.decode(latents), atol=1e-3, rtol=1e-5)
    except Exception:  # a VAE of video, or one whose encode returns a class of its own
        raise UserError(
            f"{codec.vae.where}: the page cannot hold this kind of VAE; take an AutoencoderKL or AutoencoderTiny"
        ) from None
    batch, rows, columns = (torch.export.Dim(side, min=1, max=1 << 12) for side in ("batch", "rows", "columns"))
    grid = {0: batch, 2: rows, 3: columns}
    pixels = {0: batch, 2: codec.stride * rows, 3: codec.stride * columns}
    export_graph(encoder, {"given": image}, {"given": pixels}, folder / f"{name}_encoder.onnx", "latents", {}, ["image"])
    export_graph(decoder, {"given": latents}, {"given": grid}, folder / f"{name}_decoder.onnx", "image", {}, ["latents"])


def page_of(parts: list[Path], picture: Path) -> str:
    """The page's HTML, with the five .onnx files `parts` in it."""
    runtime = {"runtime": RUNTIME / "ort.wasm.bundle.min.mjs", "wasm": RUNTIME / "ort-wasm-simd-threaded.wasm"}
    files = runtime | {"picture": picture} | {part.stem: part for part in parts}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file}: no such file; run npm ci --prefix demo")
    data = []
    for name, file in files.items():
        packed = base64.b64encode(gzip.compress(file.read_bytes(), mtime=0)).decode()
        data.append(f'<script type="text/plain" id="{name}">{packed}</script>')
    page = (DEMO / "page.html").read_text(encoding="utf-8")
    script = (DEMO / "page.js").read_text(encoding="utf-8")
    return page.replace("<!-- data -->", "\n".join(data)).replace("/* script */", script)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="file (.pth or .safetensors), or a folder: its best module")
    parser.add_argument("--output", required=True, help="the .html file to write")
    parser.add_argument("--picture", type=Path, default=SAMPLE, help="the sample photo")
    parser.add_argument("--parts", help="folder that keeps the five .onnx files, for a page that is built already")
    for number in (1, 2):
        parser.add_argument(f"--vae{number}_path", help=f"hub id or folder of VAE{number} (default: what the checkpoint names)")
        parser.add_argument(f"--vae{number}_subfolder", help="folder in it that holds the VAE")
    args = parser.parse_args()
    pipeline = PipelineWithVAEs.from_checkpoint(
        args.checkpoint, args.vae1_path, args.vae2_path,
        vae1_subfolder=args.vae1_subfolder, vae2_subfolder=args.vae2_subfolder, labels=("--vae1_path", "--vae2_path"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_vae(pipeline.codec1, "vae1", folder)
        export_vae(pipeline.codec2, "vae2", folder)
        export_pipeline(pipeline, folder / "module.onnx")
        if args.parts:
            with alone_in(claim_writable_folder(args.parts, "--parts"), "--parts", "building"):
                for part in folder.iterdir():
                    with atomic_file(Path(args.parts, part.name)) as file:
                        file.write(part.read_bytes())
        page = page_of(sorted(folder.glob("*.onnx")), args.picture)
    with atomic_file(args.output, "w", encoding="utf-8") as file:
        file.write(page)
    print(f"{args.output}: {len(page) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run(main)
