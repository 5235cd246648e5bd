"""The page to try a module, in a real Chromium: its pictures are Python's; a photo is dropped, the keyboard is enough."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from conftest import ROOT, run_script
from PIL import Image
from pipelines import make_pipeline, save

from tools.export_onnx import export_pipeline

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
DROP = """(async () => {
  const bytes = Uint8Array.from(atob(%s), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "photo.png", { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data }));
})()"""
SETTLED = """new Promise((resolve) => {
  const look = () => (["%s", "failed"].includes(document.body.dataset.state) ? resolve() : setTimeout(look, 50));
  look();
}).then(() => document.getElementById("status").textContent)"""


@pytest.fixture(scope="module")
def page(vae_folders, tmp_path_factory):
    """(page of an untrained module between tiny VAEs, open in Chromium; the same pipeline in Python; folder of its parts)."""
    if not (ROOT / "demo" / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: npm ci --prefix demo")
    if not find_chromium():
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("page")
    pipeline = make_pipeline(vae_folders["kl4"], vae_folders["kl16"], input_types=("image", "latent"))
    checkpoint = save(pipeline, folder / "ckpt")
    built = ["--checkpoint", str(checkpoint), "--output", str(folder / "page.html"), "--parts", str(folder / "parts")]
    run_script("demo/build.py", *built)
    with Browser(find_chromium(), timeout=300) as browser:
        browser.open(folder / "page.html")
        assert browser.run(SETTLED % "ready") == "Ready."
        yield browser, pipeline, folder


def shown(browser, name):
    """The levels of a canvas, (H, W, 3)."""
    url = browser.run(f'document.getElementById("{name}").toDataURL("image/png")')
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def levels(image):
    return ((image[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy().astype(int)


@torch.no_grad()
def pictures(pipeline, photo):
    """{canvas: what Python makes of the photo}."""
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    codec1, codec2 = pipeline.codec1, pipeline.codec2
    latents = codec1.encode(image)
    decoded = codec1.decode(latents)
    return {
        "original": levels(image),
        "vae1": levels(decoded),
        "vae2": levels(codec2.decode(codec2.encode(image))),
        "reencode": levels(codec2.decode(codec2.encode(decoded.clamp(-1, 1)))),
        "aligned": levels(codec2.decode(pipeline.translate(latents, image))),
    }


def test_a_dropped_photo_gives_pythons_pictures(page, photo_folders):
    """A part that is exported wrong, a range or an order of channels mixed up, a picture under the wrong name."""
    browser, pipeline, folder = page
    photo = Image.open(sorted(photo_folders[1].glob("*.jpg"))[0]).convert("RGB").resize((128, 128))
    photo.save(folder / "photo.png")
    encoded = base64.b64encode((folder / "photo.png").read_bytes()).decode()
    browser.run('document.getElementById("size").value = "128"')
    browser.run(DROP % json.dumps(encoded))
    assert browser.run(SETTLED % "done") == "Done."
    for name, expected in pictures(pipeline, photo).items():
        assert abs(shown(browser, name) - expected).max() <= 2, name
    captions = browser.run('[...document.querySelectorAll("figcaption span")].slice(1).map((span) => span.textContent)')
    assert all(" ms, " in caption and caption.endswith(" dB") for caption in captions)


def test_the_keyboard_is_enough_and_nothing_is_asked_for(page):
    """A control that only a mouse reaches; a request to a server; an error in the console; a page wider than a phone."""
    browser = page[0]
    browser.run('document.body.dataset.state = "fresh"; document.activeElement.blur()')
    for _ in range(5):
        browser.press("Tab")
        if browser.run("document.activeElement.id") == "sample":
            break
    browser.press("Enter")
    assert browser.run(SETTLED % "done") == "Done."
    assert shown(browser, "aligned").shape == (128, 128, 3)
    browser.resize(390, dark=True)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 27)"
    assert not [url for url in browser.requests() if not url.startswith(("file:", "blob:", "data:"))]
    assert not browser.complaints()


def test_another_module_is_taken_from_a_file(page):
    """A file that is loaded and not used, or that takes the place of a VAE."""
    browser, pipeline, folder = page
    target = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=target, selector="#models")["nodeId"]
    torch.nn.init.zeros_(pipeline.module.out.weight)
    torch.nn.init.zeros_(pipeline.module.linear.weight)
    export_pipeline(pipeline, folder / "other.onnx")
    before = shown(browser, "aligned")
    browser.run('document.body.dataset.state = "fresh"')
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(folder / "other.onnx")])
    assert browser.run(SETTLED % "done") == "Done."
    assert abs(shown(browser, "aligned") - before).max() > 2
