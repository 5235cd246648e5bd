"""Evaluation on a CUDA device, without one: fake tensors have a device and a shape and no values. They refuse two devices in
one operation, and each wait of the CPU for the device is counted."""

import sys
from collections import Counter

import torch
from conftest import ROOT, make_kl_vae
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchmetrics.functional.image.lpips import _LPIPS

from evaluation import metrics
from evaluation.judge import judge
from evaluation.ladder import Ladder
from evaluation.metrics import CHOICES, MS_SSIM_SIDE, Measures
from losses import PerceptualDistance
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.pipeline import PipelineWithVAEs


class Waits(TorchDispatchMode):
    """Counts, as {"function of the project: what it waits for"}, the numbers read from a CUDA device and the copies to and from
    it. A number is 1 where a fake tensor has none."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, given=(), options=None):
        read = function in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
        made = (1.0 if given[0].is_floating_point() else 1) if read else function(*given, **(options or {}))
        before, after = (
            sorted({each.device.type for each in tree_iter(side) if isinstance(each, torch.Tensor)})
            for side in ((given, options), made)
        )
        if "cuda" in before if read else before and after and before != after:
            frame = sys._getframe()
            while (
                not frame.f_code.co_filename.startswith(str(ROOT))
                or "site-packages" in frame.f_code.co_filename  # of a virtual environment in the repository
                or frame.f_code.co_filename == __file__
            ):
                frame = frame.f_back
            self.found[f"{frame.f_code.co_name}: {'a number' if read else ' to '.join([*before, *after])}"] += 1
        return made


def moved(module, *places, memory_format=None, **options):
    """In place of `Module.to`, which cannot put other fake weights into a module."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held |= {name: each.detach().to(*places, **options) for name, each in held.items() if each is not None}
    return module


def test_the_cpu_waits_once_a_batch(monkeypatch):
    """A device without work while the CPU computes what the device could, or waits for each figure of each rung; tensors of two
    devices in one operation, at which evaluation on a GPU ends."""
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(metrics, "st_lpips", lambda network, device: PerceptualDistance(network).to(device))
    monkeypatch.setattr(metrics, "lpips_network", lambda device: _LPIPS(pretrained=False, pnet_rand=True).to(device))
    monkeypatch.setattr(metrics, "inception_network", lambda device: lambda levels: levels.flatten(1)[:, :8].float())
    waits, so_far = Waits(), []

    def batches():
        for count in (1, 1, 0):
            so_far.append(waits.found.copy())
            images = torch.zeros(count, 3, MS_SSIM_SIDE, MS_SSIM_SIDE, device="cuda")
            yield {"pixel_values": images, "index": torch.arange(count), "path": ["a photo"] * count, "unreadable": []}

    with FakeTensorMode(), waits:
        codecs = [Codec(make_kl_vae(channels, scaling_factor=0.5)) for channels in (4, 16)]
        module = align_module(AlignConfig(hidden_channels=8, num_blocks=1))
        ladder = Ladder(PipelineWithVAEs(module, *codecs).to("cuda"), torch.float32)
        judged = judge(ladder, batches(), Measures(CHOICES, MS_SSIM_SIDE, "cuda"), MS_SSIM_SIDE)
    assert list(judged["ladder"]) == ["vae1", "vae2", "reencode", "linear", "untrained", "aligned"]
    assert judged["left_out_metrics"] == {} and judged["images"] == 2
    # the first batch may make what later ones keep; torchmetrics sends the weights of its scales to the device
    assert so_far[2] - so_far[1] == {"summed: cuda to cpu": 1, "ms_ssim: cpu to cuda": 6}
    assert waits.found - so_far[2] == {"summed: cuda to cpu": 10, "_cost: a number": 15}  # a figure's sums at once; times
