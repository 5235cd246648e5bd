"""What a CUDA device would see, without one: fake tensors have a device and a shape and no values."""

import importlib
import json
import sys
import time
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, make_kl_vae, make_tiny_vae, run_script
from families import EVERY_CLASS, save_class
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.functional.image.lpips import _LPIPS

import eval_align
import train_align_with_args as train_script
import vae_align
from cache.build import CacheOptions, LatentEncoder
from cache.read import CachedDataset
from dataloader import ImageDataset, list_images, widened
from evaluation import metrics
from evaluation.judge import judge
from evaluation.ladder import Ladder, untrained_module
from evaluation.metrics import CHOICES, MS_SSIM_SIDE, Measures
from losses import (
    KINDS,
    LOSSES,
    NETWORKS,
    DecodedImageLoss,
    Objective,
    PerceptualDistance,
    Reencoded,
    channel_moments,
    decoder_difference,
    picture_distance,
    pixel_difference,
)
from tools import translate
from train_align_with_args import parse_args, setup_optimizer, train_step
from training.optimizer import BadSteps
from training.starts import RidgeRegression
from vae_align import ARCHITECTURES, AlignConfig, AlignPipeline, align_module, pack
from vaes.codec import SPACES, Codec, SeenThrough, reencode
from vaes.loading import FrozenVAE, load_vae_model
from vaes.pipeline import PipelineWithVAEs

CUDA = torch.device("cuda", 0)
ATEN = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts where the project waits for the device, by function: `read` from it, `sent` to it out of memory that is not
    pinned, `sized` by what it holds. Each number that is read is `answer`."""

    def __init__(self, answer=1):
        super().__init__()
        self.found, self._answer, self._reading = Counter(), answer, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in given}
        on_device = "cuda" in places
        if func in (ATEN.item.default, ATEN._local_scalar_dense.default):  # the former in inference mode
            self._note("read", on_device)
            return {torch.bool: bool, torch.int64: int}.get(args[0].dtype, float)(self._answer)
        if func is ATEN.nonzero.default:
            self._note("sized", on_device)
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.int64)
        if func is ATEN.index.Tensor:
            self._note("sent", places == {"cpu", "cuda"})
            indices = []
            for index in args[1]:
                masked = index is not None and index.dtype == torch.bool
                self._note("sized", masked)
                indices += [index.new_zeros(1, dtype=torch.int64)] * index.ndim if masked else [index]
            return func(args[0], indices)
        if func in (ATEN._to_copy.default, ATEN.copy_.default) and not kwargs.get("non_blocking"):
            target = args[0].device if func is ATEN.copy_.default else kwargs.get("device")
            source = args[func is ATEN.copy_.default].device
            self._note("read", source == CUDA and target is not None and target.type == "cpu")
            self._note("sent", source.type == "cpu" and target is not None and target.type == "cuda")
        self._note("read", func is ATEN._linalg_check_errors.default and on_device)  # and a list that was read has ended
        return func(*args, **kwargs)

    def _note(self, kind, waits):
        frame, before, self._reading = sys._getframe(), self._reading, None
        while frame and (
            not frame.f_code.co_filename.startswith(str(ROOT))
            or "site-packages" in frame.f_code.co_filename  # of a virtual environment in the repository
            or frame.f_code.co_filename == __file__
            or frame.f_code.co_name.startswith("<")  # a comprehension, which some Pythons inline
        ):
            frame = frame.f_back
        if waits and frame:
            self._reading = (frame, frame.f_lasti) if kind == "read" else None  # the numbers of a list are read at once
            self.found[f"{frame.f_code.co_name} {kind}"] += self._reading is None or self._reading != before


def move(module):
    """Give a module fake weights and buffers on the device, in place, as `Module.to` would: nothing else is moved."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    keep = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved, requires_grad=tensor.requires_grad) if keep else moved
    return module


MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: diffusers keeps some tensors from call to call
SIDE = 64


@pytest.fixture(autouse=True)
def fake_device():
    """Within a test every new tensor is fake. What the project keeps for each device is forgotten before and after."""
    kept = (vae_align._per_channel, vae_align.moments_of, vae_align.inverse_moments_of)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


def on_device(*shape):
    return torch.zeros(shape, device=CUDA)


def waits_of(call, times=2, answer=1):
    """(the results' tensors, waits of the last call): the first one may make what later ones keep."""
    for _ in range(times):
        no_generator = mock.patch.object(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
        with no_generator, Waits(answer) as waits:  # there is none without the device
            results = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]
    return results, dict(waits.found)


def assert_on_device(call, waits=None, **options):
    """Its results are on the device, and it waits exactly so, by default never."""
    results, found = waits_of(call, **options)
    assert results and all(result.device == CUDA for result in results)
    assert found == (waits or {})


def codec_of(model):
    """The codec of a real model, whose weights are then on the device."""
    codec = Codec(model)
    _ = codec.vae.model, codec._map  # which some read off their weights, once
    codec.vae.device = CUDA
    with MODE:
        move(codec.vae.model)
    return codec


def pipeline_of(config, codecs=None):
    """A pipeline on the device: an `AlignPipeline` from sd15 to flux1, or one with these two codecs."""
    module = align_module(config)
    pipeline = PipelineWithVAEs(module, *codecs) if codecs else AlignPipeline(module, SPACES["sd15"], SPACES["flux1"])
    with mock.patch.object(FrozenVAE, "to"):
        _ = codecs and (pipeline.codec1, pipeline.codec2)
    with MODE:
        move(module)
    return pipeline


def test_mixed_devices_and_waits_are_noticed():
    """Proofs that hold for anything: a mixture of devices that passes, a wait that is not counted or counted elsewhere."""
    pipeline = pipeline_of(AlignConfig(("latent",)))
    with MODE:
        with pytest.raises(RuntimeError, match="same device"):
            pipeline.module(torch.zeros(1, 4, 8, 8))
        assert waits_of(lambda: pipeline.translate(torch.zeros(1, 4, 8, 8)))[1] == {"_in_pieces sent": 1, "_in_pieces read": 1}
        assert waits_of(lambda: pipeline.module.has_ridge)[1] == {"has_ridge read": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Encoding, decoding, spaces


@pytest.mark.parametrize("name", EVERY_CLASS)
def test_each_class_of_vaes_encodes_and_decodes_on_the_device(name, tmp_path):
    """A constant of the convention left on the CPU; a statistic that is read or sent at each call; a sample drawn elsewhere."""
    save_class(name, tmp_path / "vae")
    codec = codec_of(load_vae_model(tmp_path / "vae", "", None, "cpu", torch.float32))
    with MODE:
        images, latents = on_device(2, 3, 2 * codec.stride, 2 * codec.stride), on_device(2, codec.channels, 2, 2)
        assert_on_device(lambda: codec.encode(images))
        assert_on_device(lambda: codec.encode(images, sample=True), times=1)
        results, waits = waits_of(lambda: codec.decode_with_features(latents), times=1)
        assert all(result.device == CUDA for result in results)
        assert not waits or name == "ConsistencyDecoderVAE"  # in which diffusers' own steps read their schedule


def test_what_one_of_several_vaes_shows_is_on_the_device():
    """Pictures decoded elsewhere; more than the one wait for each VAE, which decides whether it is asked at all."""
    codecs = [codec_of(make_kl_vae(4)), codec_of(make_tiny_vae(4))]
    with MODE:
        images = on_device(2, 3, SIDE, SIDE)
        assert_on_device(lambda: SeenThrough(codecs)(images), {"__call__ sized": 2})
        assert_on_device(lambda: reencode(codecs[0].encode(images), *codecs))


@pytest.mark.parametrize("name", SPACES)
def test_each_space_maps_and_folds_on_the_device(name):
    """Means and deviations sent to the device at each call."""
    space = SPACES[name]
    with MODE:
        scaled = on_device(2, space.channels, 4, 4)
        assert_on_device(lambda: space.to_scaled(space.to_raw(scaled)))
        assert_on_device(lambda: space.from_pipeline(pack(scaled), size=(4 * space.stride, 4 * space.stride)))
        assert_on_device(lambda: space.from_pipeline(scaled.unsqueeze(2)))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("inputs", [("latent",), ("image",), ("image", "latent")], ids="-".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_translating_waits_for_its_checks_alone(architecture, inputs, raw):
    """A copy or a wait at each call beside those of the image's range and of the latents' space."""
    pipeline = pipeline_of(AlignConfig(inputs, hidden_channels=8, num_blocks=1, architecture=architecture))
    given = {"latents": (2, 4, SIDE // 8, SIDE // 8), "image": (2, 3, SIDE, SIDE)}
    waits = {"translate read": 1} if "image" in inputs else {}
    if "latent" in inputs:
        waits |= {"detect_wrong_space read": 1}
    with MODE:
        given = {name: on_device(*shape) for name, shape in given.items() if name.removesuffix("s") in inputs}
        assert_on_device(lambda: pipeline.module(**given), times=1)
        assert_on_device(lambda: pipeline.translate(**given, raw=raw), waits, answer=0)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def codecs():
    return codec_of(make_kl_vae(4)), codec_of(make_kl_vae(16))


@pytest.fixture(scope="module")
def batch():
    """A batch of the latent cache, on the device."""
    with MODE:
        names = {"pixel_values": (3, SIDE), "decoded": (3, SIDE), "latents1": (4, SIDE // 8), "latents2": (16, SIDE // 8)}
        names["reencoded"] = names["latents2"]
        return {name: on_device(4, channels, side, side) for name, (channels, side) in names.items()}


TERMS = {
    **{kind: (pixel_difference(kind), None) for kind in KINDS},
    "decoder": (decoder_difference, None),
    "lpips": (None, "alex"),
    **{f"ST-LPIPS {network}": (None, network) for network in NETWORKS},
}


@pytest.mark.parametrize("reference", ["original", "vae2"])
@pytest.mark.parametrize("name", TERMS)
def test_each_loss_on_decoded_images_is_computed_on_the_device(codecs, batch, name, reference):
    """A term that reads its value, or a window, reference or filter made on the CPU."""
    term, network = TERMS[name]
    eyes = _LPIPS(pretrained=False, pnet_rand=True).eval() if name == "lpips" else network and PerceptualDistance(network)
    with MODE:
        _ = eyes and move(eyes)
        loss = DecodedImageLoss(codecs[1], 2, 6, reference, 0, terms=[(1.0, term or picture_distance(eyes))])
        target = batch["latents2"]
        for reencoded in (None, Reencoded(batch["reencoded"], batch["decoded"], 0.5)):
            assert_on_device(lambda: loss(target + 1, target, batch["pixel_values"], 3, reencoded)[0])  # noqa: B023


@pytest.mark.parametrize("name", [*LOSSES, "moments"])
def test_each_loss_on_latents_is_computed_on_the_device(batch, name):
    """A weight or moment that is read from the device."""
    with MODE:
        loss = LOSSES.get(name, channel_moments)
        assert_on_device(lambda: loss(batch["latents1"] + 1, batch["latents1"]))


class OneProcess(SimpleNamespace):
    """What a step asks of Accelerate. Fake tensors have no backward pass: each gradient is the weight itself."""

    num_processes, process_index, scaler, device = 1, 0, None, CUDA
    clip_grad_norm_ = staticmethod(torch.nn.utils.clip_grad_norm_)

    def backward(self, loss):
        for weight in self.weights:
            weight.grad = weight.detach().clone() if weight.requires_grad else None

    def reduce(self, tensor, how):
        return tensor


@pytest.mark.parametrize(
    ("architecture", "inputs", "optimizer"),
    [("plain", "latent", "muon"), ("plain", "image", "adamw"), ("tiny", "latent", "adamw"), ("whole", "image latent", "muon")],
)
def test_a_step_waits_for_nothing(codecs, batch, architecture, inputs, optimizer):
    """A wait in encoding, module, losses, optimizer, average or colours: the device idles at every step."""
    config = AlignConfig(tuple(inputs.split()), hidden_channels=8, num_blocks=1, architecture=architecture)
    pipeline, average = pipeline_of(config, codecs), align_module(config)
    args = parse_args(["--optimizer", optimizer, "--ema_decay", "0.9"])
    with MODE:
        terms = [(1.0, pixel_difference("mse")), (1.0, decoder_difference)]
        decoded = DecodedImageLoss(codecs[1], 2, 6, "original", 0, terms=terms)
        objective = Objective(pipeline, "weighted_l1", 1.0, 1.0, 0.5 * pipeline.uses_latents, decoded)
        accelerator = OneProcess(weights=list(pipeline.module.parameters()))
        own = setup_optimizer(pipeline, args)
        run = SimpleNamespace(
            pipeline=pipeline, module=pipeline.module, average=move(average), objective=objective, step=0,
            optimizer=SimpleNamespace(optimizer=own, zero_grad=own.zero_grad, step=own.step),
            scheduler=SimpleNamespace(step=lambda: None), bad_steps=BadSteps(10, accelerator), accelerator=accelerator,
        )  # fmt: skip

        def step(batch):
            loss, norm, ok = train_step(args, run, objective.encode(batch, args.sample_posterior), 1.0)
            run.bad_steps.note(ok, run.step, [])
            return loss, norm, ok

        pixels = {"pixel_values": batch["pixel_values"]}
        host = {name: tensor.cpu() for name, tensor in batch.items()}
        assert_on_device(lambda: step(pixels))
        for given in (batch, host, {name: host[name] for name in host if name != "reencoded"}):
            assert_on_device(lambda: step(given), times=1)  # noqa: B023
        assert waits_of(run.bad_steps.read, times=1)[1] == {"read read": 1}


@pytest.mark.parametrize("kind", ["images", "cache"])
def test_training_batches_come_to_the_device_as_they_are_stored(kind, flags, monkeypatch):
    """Batches widened before they are sent, from memory that is not pinned; a CUDA context in a run on the CPU."""
    cached = CachedDataset(SimpleNamespace(), None, np.arange(8), np.zeros((8, 1), int))
    monkeypatch.setattr(train_script, "cache_latents", lambda *_: cached)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vaes = [FrozenVAE.of_model(make_kl_vae(channels)) for channels in (4, 16)] if kind == "cache" else [None, None]
    args = parse_args(as_argv(flags | {"num_workers": 1}))
    datasets = train_script.open_datasets(args)
    for device in (torch.device("cpu"), CUDA):
        accelerator = SimpleNamespace(process_index=0, num_processes=1, device=device)
        with MODE:
            loader, _ = train_script.create_data_loaders(args, *vaes, accelerator, datasets)
        assert loader.device == device and loader.num_workers == (device == CUDA or kind == "images")
    with MODE:
        stored = {"pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "latents1": torch.zeros(2, 4, 1, 1).half()}
        assert_on_device(lambda: list(widened(dict(stored), CUDA).values()))


def test_the_cache_encodes_without_waiting_in_batches_that_fit_the_device(codecs, photo_folders, tmp_path, monkeypatch):
    """A device that idles while rows are written; batches too small or too large for it; draws that depend on it."""
    for number, codec in enumerate(codecs):
        codec.fingerprint = str(number)  # fake weights have no digest
    dataset = ImageDataset(list_images(photo_folders[0]), SIDE, True, True, 0)
    content, sizes = b"0" * 16, []
    for sample, free in ((False, 64 << 20), (False, 1 << 30), (False, 1 << 40), (True, 1 << 40)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))  # noqa: B023
        options = CacheOptions(tmp_path, 2, with_images=True, reencoded=True, decoded=True, sample=sample)
        encoder = LatentEncoder(dataset, *codecs, options, 0, [content], {})
        sizes.append(encoder._batch_size())
        with MODE:
            item = (0, [0, 1], content, torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8))
            results, waits = waits_of(lambda: encoder._encode_batch([item]))  # noqa: B023
        assert waits == {"_encode_batch sent": 1} and all(result.device == CUDA for result in results[:-1])  # and the pixels
    assert sizes == [16, 64, 128, 16]


def test_the_linear_start_is_fitted_exactly():
    """Normal equations in TF32, whose 10 bits the inverse multiplies."""
    dtypes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dtypes.extend(args[0].dtype for _ in [0] if func is ATEN.mm.default)
            return func(*args, **(kwargs or {}))

    with MODE, Products():
        RidgeRegression(4, 16).add(on_device(2, 4, 8, 8), on_device(2, 16, 8, 8))
    assert dtypes == [torch.float64] * 2


def test_the_cpu_waits_once_a_batch(codecs, monkeypatch):
    """A wait for each figure of each rung; tensors of two devices in one operation, which ends the evaluation."""
    pipeline = pipeline_of(AlignConfig(hidden_channels=8, num_blocks=1), codecs)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: move(module))
    monkeypatch.setattr(metrics, "st_lpips", lambda network, device: move(PerceptualDistance(network)))
    monkeypatch.setattr(metrics, "lpips_network", lambda device: move(_LPIPS(pretrained=False, pnet_rand=True)))
    monkeypatch.setattr(metrics, "inception_network", lambda device: lambda levels: levels.flatten(1)[:, :8].float())
    waits, so_far = Waits(), []

    def batches():
        for count in (1, 1, 0):
            so_far.append(waits.found.copy())
            images = on_device(count, 3, MS_SSIM_SIDE, MS_SSIM_SIDE)
            yield {"pixel_values": images, "index": torch.arange(count), "path": ["a photo"] * count, "unreadable": []}

    with MODE, waits:
        ladder = Ladder(pipeline, torch.float32)
        judged = judge(ladder, batches(), Measures(CHOICES, MS_SSIM_SIDE, CUDA), MS_SSIM_SIDE)
    assert list(judged["ladder"]) == ["vae1", "vae2", "reencode", "linear", "untrained", "aligned"]
    assert judged["left_out_metrics"] == {} and judged["images"] == 2
    # the first batch may make what later ones keep; torchmetrics sends the weights of its scales to the device
    assert so_far[2] - so_far[1] == {"summed read": 1, "ms_ssim sent": 6}
    assert waits.found - so_far[2] == {"summed read": 10, "_cost read": 15}  # a figure's sums at once; times


# ----------------------------------------------------------------------------------------------------------------------
# What a machine with a GPU is asked to run


def test_the_check_of_a_gpu_runs_to_its_end_without_one(tmp_path):
    """A check that stops on somebody's rented GPU: at the first row that it cannot measure, or for want of a network."""
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    run_script("benchmarks/gpu_check.py", "--small", "--output", tmp_path / "found.json", env=offline, cwd=tmp_path)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    of_small = {name: row for name, row in rows.items() if row.get("note") != "not among the small rows"}
    seen = [name for name in of_small if "ST-LPIPS" in name]  # its weights are in a package
    assert of_small.keys() == {"tests", "translate tiny 64 px", "train tiny float32", *seen} and seen
    assert of_small["tests"]["exit code"] == 0 and "note" not in of_small["translate tiny 64 px"]
    assert all(of_small["train tiny float32"][name] > 0 for name in ("bare", "cached", "online", "encoders", "building"))
    assert of_small["train tiny float32"]["sent online"] == 3 * 64 * 64
    table = (tmp_path / "found.md").read_text()
    assert all(name in table for name in rows)


def test_what_the_check_of_a_gpu_has_measured_outlives_its_end(tmp_path, monkeypatch):
    """A row that runs out of memory or time and ends all others; a kill that takes with it what was measured."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_check = importlib.import_module("gpu_check")

    def row(number, end):
        return lambda options, row: (row.update(value=number), end())

    ends = (mock.Mock(side_effect=MemoryError), lambda: time.sleep(60), mock.Mock(side_effect=KeyboardInterrupt))
    rows = {name: row(number, end) for number, (name, end) in enumerate(zip(("memory", "time", "kill"), ends))}
    monkeypatch.setattr(gpu_check, "rows_of", lambda options: rows)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "found.json"), "--row_seconds", "1.1"])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main()
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    notes = {name: (row["value"], row["note"]) for name, row in found.items()}
    assert notes == {"memory": (0, "out of memory"), "time": (1, "took more than 1 s")}


def test_the_untrained_rung_touches_no_gpu(monkeypatch):
    """Generators of eight GPUs that are read and set again, with a context and a warning each, for a module on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", mock.Mock(side_effect=AssertionError))
    pipeline = SimpleNamespace(config=AlignConfig(("latent",)), device="cpu", progress={"config": {"seed": 1}})
    before = torch.get_rng_state()
    first, second = (untrained_module(pipeline).out.weight for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("program", [train_script, eval_align, translate])
def test_each_program_says_how_its_gpu_computes_float32(program, flags, tmp_path, monkeypatch):
    """A program that computes in whatever torch's default is: TF32 in cuDNN."""

    class Asked(Exception):
        pass

    monkeypatch.setattr(program, "resolve_device", lambda *_: CUDA)
    monkeypatch.setattr(program, "compute_policy", mock.Mock(side_effect=Asked))
    given = {train_script: flags, eval_align: {"checkpoint": "x", "eval_data_dir": tmp_path}}.get(program, {})
    monkeypatch.setattr(
        sys, "argv", ["program", *as_argv(given), *["module", "image", "--output_dir", "x"] * (program is translate)]
    )
    with pytest.raises(Asked):
        program.main()
    assert program.compute_policy.call_args.args == ((CUDA, "float32") if program is train_script else (CUDA,))
