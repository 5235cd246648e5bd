"""Modules, latent spaces and `translate`: shapes, gradients, locality, exports, and inputs that are refused."""

import json

import pytest
import torch
from hostile import refusal

import vae_align
from runtime.cli import MISTAKES
from train_align_with_args import create_align_pipeline, load_vae_model, parse_args
from vae_align import AlignConfig, AlignPipeline, LatentSpace, _per_channel, align_module
from vaes.codec import SPACES

INPUT_TYPES = (("latent",), ("image",), ("image", "latent"))
IDS = "-".join


def make_module(seed=0, **options):
    torch.manual_seed(seed)
    return align_module(AlignConfig(**{"hidden_channels": 8, "num_blocks": 1, **options})).eval()


def make_inputs(config, height=72, width=40, batch=2):
    """Keyword arguments of `AlignModule.forward` for images of that size."""
    generator = torch.Generator().manual_seed(5)
    inputs = {}
    if "image" in config.input_types:
        inputs["image"] = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    if "latent" in config.input_types:
        grid = (height // config.latent_stride, width // config.latent_stride)
        inputs["latents"] = torch.randn(batch, config.latent_channels, *grid, generator=generator)
    return inputs


def bare_pipeline(**options):
    """A pipeline without VAEs."""
    return AlignPipeline(make_module(**options))


@pytest.mark.parametrize("strides", [(8, 8), (4, 8), (8, 4), (4, 4), (16, 4), (4, 16)], ids=str)
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_output_lies_on_vae2s_grid(input_types, strides):
    """A stride of 8 taken for granted, or an output on VAE1's grid; a width or depth of which something is subtracted."""
    smallest = {"hidden_channels": 1, "num_blocks": 0, "latent_channels": 1}
    module = make_module(input_types=input_types, latent_stride=strides[0], out_stride=strides[1], **smallest)
    height, width = (80, 48) if 16 in strides else (72, 40)
    with torch.no_grad():
        out = module(**make_inputs(module.config, height, width))
    assert out.shape == (2, 16, height // strides[1], width // strides[1])


@pytest.mark.parametrize("size", [(72, 40), (8, 8), (64, 128), (8, 200)], ids=str)
@pytest.mark.parametrize("downsample_times", range(6))
def test_image_features_reach_vae2s_grid_however_often_they_are_halved(downsample_times, size):
    """Sides that round up at each halving (9x5 latents), or that a deep branch halves away altogether."""
    for input_types in (("image",), ("image", "latent")):
        module = make_module(input_types=input_types, downsample_times=downsample_times)
        with torch.no_grad():
            out = module(**make_inputs(module.config, *size))
        assert out.shape == (2, 16, size[0] // 8, size[1] // 8)
        assert out.isfinite().all()


@pytest.mark.parametrize("strides", [(8, 8), (4, 8), (8, 4)], ids=str)
@pytest.mark.parametrize("downsample_times", [0, 3, 4])
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_gradients_reach_every_trainable_parameter(input_types, downsample_times, strides):
    """A layer that forward skips, a detach, or a branch that is built though its input is never given."""
    module = make_module(
        input_types=input_types, downsample_times=downsample_times, latent_stride=strides[0], out_stride=strides[1]
    )
    out = module(**make_inputs(module.config))
    (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(6))).square().mean().backward()
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@pytest.mark.parametrize("downsample_times", range(5))
def test_every_pixel_of_the_image_counts(downsample_times):
    """Features brought to a coarser grid by picking a few of them: most pixels would be ignored."""
    module = make_module(input_types=("image",), downsample_times=downsample_times, num_blocks=0)
    image = make_inputs(module.config, 64, 40)["image"].requires_grad_()
    module(image=image).square().sum().backward()
    ignored = (image.grad.abs().amax(dim=(0, 1)) == 0).float().mean().item()
    assert ignored == 0, f"{ignored:.0%} of the pixels have no influence"


# ----------------------------------------------------------------------------------------------------------------------
# Any size, the same everywhere, the same in training and in use


@pytest.mark.parametrize("architecture, reach", [("plain", 10), ("tiny", 38), ("whole", 38)])
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_the_middle_of_a_crop_is_the_middle_of_the_picture(input_types, architecture, reach):
    """Image and latents out of register; a whole picture's statistics; a neighbour seen beyond `reach` latents."""
    module = make_module(input_types=input_types, downsample_times=3, architecture=architecture)
    whole = make_inputs(module.config, 32, 6 * 8 * reach, batch=1)
    crop = {name: tensor[..., tensor.shape[3] // 3 :] for name, tensor in whole.items()}
    with torch.no_grad():
        middle = module(**whole)[..., 3 * reach : 5 * reach]
        torch.testing.assert_close(module(**crop)[..., reach : 3 * reach], middle, rtol=1e-4, atol=1e-5)


def test_one_image_of_a_batch_does_not_change_the_others():
    """Batch statistics or dropout: better in training than in use."""
    module = make_module().train()
    inputs = make_inputs(module.config)
    with torch.no_grad():
        together = module(**inputs)
        alone = module(**{name: tensor[:1] for name, tensor in inputs.items()})
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# translate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_translate_keeps_the_dtype_and_computes_in_float32(input_types, dtype):
    """Half-precision latents that meet float32 weights, or that come back as float32 into a half-precision pipeline."""
    pipeline = bare_pipeline(input_types=input_types)
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(pipeline.config).items()}
    out = pipeline.translate(inputs.get("latents"), inputs.get("image"))
    assert out.dtype == dtype
    assert not out.requires_grad
    with torch.no_grad():
        exact = pipeline.module(**{name: tensor.float() for name, tensor in inputs.items()})
    assert torch.equal(out, exact.to(dtype))


LATENTS, IMAGE = torch.zeros(1, 4, 9, 5), torch.zeros(1, 3, 72, 40)
UNFIT = {  # (inputs of the module, latents, image, what the message says)
    "no image": (("image", "latent"), LATENTS, None, "image="),
    "no latents": (("image", "latent"), None, IMAGE, "latents="),
    "the other space's latents": (("latent",), torch.zeros(1, 16, 8, 8), None, "look like latents of flux1"),
    "another space's latents": (("latent",), torch.zeros(1, 128, 8, 8), None, "latents of flux2"),
    "an image with alpha": (("image", "latent"), LATENTS, torch.zeros(1, 4, 72, 40), "(1, 4, 72, 40)"),
    "an image of another size": (("image", "latent"), LATENTS, torch.zeros(1, 3, 72, 48), "72x48"),
    "an image off the grid": (("image",), None, torch.zeros(1, 3, 70, 40), "multiple"),
    "latents of two dimensions": (("latent",), torch.zeros(4, 4), None, "(4, 4)"),
    "another space's packed latents": (("latent",), torch.zeros(1, 16, 64), None, "(1, 16, 64): tokens of"),
    "8-bit levels": (("image", "latent"), LATENTS, IMAGE + 200, "up to 200"),
    "batches that differ": (("image", "latent"), LATENTS, torch.zeros(2, 3, 72, 40), "2 images"),
    "whole numbers": (("latent",), torch.zeros(1, 4, 4, 4, dtype=torch.int64), None, "int64"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_inputs_that_do_not_fit_are_refused_in_one_line(case):
    """An error from inside a convolution, or (batches that differ) a result that nobody asked for."""
    input_types, latents, image, said = UNFIT[case]
    pipeline = AlignPipeline(make_module(input_types=input_types), SPACES["sd15"], SPACES["flux1"])
    refusal(lambda: pipeline.translate(latents, image), said)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_one_picture_needs_no_batch_axis(input_types, raw):
    """A latent (C, h, w) taken for packed tokens; an image without batch axis that fails; a batch axis in the result."""
    pipeline = AlignPipeline(make_module(input_types=input_types), SPACES["sd15"], SPACES["flux1"])
    inputs = make_inputs(pipeline.config, 64, 32)
    single = pipeline.translate(**{name: each[0] for name, each in inputs.items()}, raw=raw)
    torch.testing.assert_close(single, pipeline.translate(**inputs, raw=raw)[0])
    flux1, size = SPACES["flux1"], (64, 64)
    assert flux1.are_packed(torch.empty(2, 4, 64)) and flux1.are_packed(torch.empty(16, 4, 64), size)
    assert not flux1.are_packed(torch.empty(16, 4, 64)) and not flux1.are_packed(torch.empty(16, 4, 8), size)


def test_an_image_without_negative_values_is_mentioned_once(caplog):
    """An image in [0, 1], which gives a pale picture and no word; a word for every batch, for white, for a bright picture."""
    pipeline, image = bare_pipeline(input_types=("image",)), torch.rand(1, 3, 72, 40)
    white, black = torch.ones_like(image), torch.zeros_like(image)
    for given, lines in ((image * 2 - 1, 0), (white, 0), (black, 0), (image / 2 + 0.5, 0), (image, 1), (image, 1)):
        pipeline.translate(image=given)
        assert caplog.text.count("in [0, 1] by * 2 - 1") == len(caplog.records) == lines


def test_a_finer_vae1_grid_that_ends_within_a_latent_of_vae2_is_refused():
    """9 latents of stride 4 are 36 px, which VAE2 (stride 8) cannot have."""
    with pytest.raises(MISTAKES, match="multiple"):
        bare_pipeline(input_types=("latent",), latent_stride=4).translate(torch.zeros(1, 4, 9, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"input_types": ()}, {"input_types": ("latents",)}, {"hidden_channels": 0}, {"num_blocks": -1}, {"latent_fold": 2},
        {"out_fold": 3, "architecture": "tiny"}, {"pooled_decoder": 1}, {"downsample_times": 0, "architecture": "tiny"},
        {"latent_stride": 12, "out_stride": 12, "architecture": "tiny", "input_types": ("latent",)},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_module_is_refused(options):
    """A typing error that becomes a module without inputs, or a traceback; grids that no halving or doubling leads to."""
    with pytest.raises(MISTAKES, match=next(iter(options))):
        AlignConfig(**options)


def test_a_config_that_needs_nothing_new_stays_readable():
    """A plain module's file with keys that older versions refuse; a folded one's without them."""
    assert "out_fold" not in AlignConfig().to_dict()
    config = AlignConfig(("latent",), 4, 128, out_stride=16, architecture="tiny", out_fold=2)
    assert AlignConfig.from_dict(config.to_dict()) == config


def test_order_and_repetition_of_input_types_do_not_matter():
    """A checkpoint that is refused because the same inputs were typed the other way round."""
    assert AlignConfig(input_types=("latent", "image", "latent")) == AlignConfig(input_types=["image", "latent"])


@pytest.mark.parametrize("how", [(torch.float16,), ("cpu", torch.bfloat16), (torch.float64,)], ids=str)
def test_a_pipeline_in_another_dtype_translates(how):
    """A `.to(dtype)` that is accepted and breaks the next call."""
    pipeline = bare_pipeline(input_types=("latent",))
    latents = torch.randn(1, 4, 6, 6)
    expected = pipeline.translate(latents)
    pipeline.to(*how)
    assert pipeline.module.out.weight.dtype == how[-1]
    assert torch.allclose(pipeline.translate(latents), expected, atol=0.05)
    assert pipeline.translate(latents.half()).dtype == torch.float16


def test_a_dtype_may_be_a_name_and_a_missing_device_is_one_line(tmp_path):
    """diffusers' `torch_dtype="float16"` as torch's traceback, a device that is not there likewise; "auto" taken for a name."""
    path = bare_pipeline(input_types=("latent",)).to("cpu", "bfloat16").save_pretrained(tmp_path / "module.safetensors")
    for given, expected in (("float16", torch.float16), ("torch.float64", torch.float64), ("auto", torch.bfloat16)):
        assert AlignPipeline.from_pretrained(path, torch_dtype=given).module.out.weight.dtype == expected
    refusal(lambda: AlignPipeline.from_pretrained(path, dtype="int8"), "dtype int8", "torch.bfloat16")
    refusal(lambda: AlignPipeline.from_pretrained(path, dtype="half precision"), "half precision")
    refusal(lambda: AlignPipeline.from_pretrained(path, device="cuda:77"), "cuda:77")
    refusal(lambda: AlignPipeline.from_pretrained(path, device="gpu"), "gpu")


@pytest.mark.parametrize("input_types", INPUT_TYPES, ids=IDS)
def test_a_batch_is_translated_in_pieces(input_types, monkeypatch):
    """Memory for all frames at once, or that runs out where half would fit; pictures mixed up; endless attempts."""
    pipeline, sizes, most = bare_pipeline(input_types=input_types), [], 3
    inputs = make_inputs(pipeline.config, batch=7)
    whole = pipeline.module(**inputs)

    def limited(module, args, given):
        sizes.append(len(next(iter(given.values()))))
        if sizes[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    pipeline.module.register_forward_pre_hook(limited, with_kwargs=True)
    monkeypatch.setitem(vae_align.PIXELS_AT_ONCE, "cpu", 5 * 72 * 40)
    torch.testing.assert_close(pipeline.translate(inputs.get("latents"), inputs.get("image")), whole)
    assert sizes == [5, 2, 2, 2, 1]
    most, sizes[:] = 0, []
    with pytest.raises(RuntimeError, match="allocate"):
        pipeline.translate(inputs.get("latents"), inputs.get("image"))
    assert sizes == [5, 2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Latent spaces


OTHER = LatentSpace("other", 16, 8, tuple(range(16)), tuple(range(1, 17)))


def test_scaled_latents_are_what_the_formula_says():
    """Mean and deviation swapped, one number for all channels, or the scale taken for its inverse."""
    raw = torch.randn(2, 16, 3, 5)
    scaled = OTHER.to_scaled(raw)
    for channel in range(16):
        torch.testing.assert_close(scaled[:, channel], (raw[:, channel] - channel) / (channel + 1))
    shifted = LatentSpace.from_scale("flux1", 16, 8, 0.3611, 0.1159)
    torch.testing.assert_close(shifted.to_scaled(raw), (raw - 0.1159) * 0.3611)


@pytest.mark.parametrize("fold", [1, 2])
def test_a_space_undoes_its_own_map(fold):
    """The inverse in the wrong order, or latents unfolded in another order than they were folded."""
    space = LatentSpace("folded", 16 * fold**2, 8 * fold, tuple(range(16 * fold**2)), (0.5,) * 16 * fold**2, fold)
    raw = torch.randn(2, 16, 4, 6)
    scaled = space.to_scaled(raw)
    assert scaled.shape == (2, space.channels, 4 // fold, 6 // fold)
    torch.testing.assert_close(space.to_raw(scaled), raw)
    assert LatentSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_only_an_unnamed_space_that_maps_nothing_is_unknown():
    """A tiny autoencoder's scale of 1 taken for the raw map of its space; a named space with that map refused."""
    assert not LatentSpace.from_scale(None, 4, 8).map_is_known
    assert LatentSpace.from_scale("flux2", 4, 8).map_is_known
    assert LatentSpace.from_scale(None, 4, 8, 0.5).map_is_known
    assert LatentSpace.from_scale(None, 4, 8, 1.0, 0.1).map_is_known


def test_the_map_is_built_once_and_serves_a_backward_pass_after_inference():
    """A copy to the GPU in each call, for which the GPU is waited for; a tensor of inference mode, which autograd refuses."""
    space = LatentSpace("mapped", 4, 8, (0.25,) * 4, (2.0,) * 4)
    latents = torch.ones(1, 4, 2, 2, requires_grad=True)
    with torch.inference_mode():
        space.to_raw(latents)
    built = _per_channel.cache_info().misses
    (space.to_raw(latents) + space.to_scaled(latents)).sum().backward()
    assert _per_channel.cache_info().misses == built
    assert latents.grad.unique().item() == 2.5
    assert space.to_raw(latents.half()).dtype == torch.float16


# ----------------------------------------------------------------------------------------------------------------------
# create_align_pipeline


def load_vaes(vae_folders, *names):
    return [load_vae_model(vae_folders[name], "vae", None, "cpu", torch.float32) for name in names]


@pytest.mark.parametrize(
    "names, out_channels", [(("kl4", "kl16"), 16), (("kl16", "kl4"), 4), (("kl4_stride4", "tiny4"), 4), (("kl4", "nested"), 16)]
)
def test_channels_and_strides_follow_the_vaes(vae_folders, names, out_channels):
    """The documented default of 16 output channels, or a stride of 8, kept against what VAE2 has."""
    args = parse_args(["--hidden_channels", "8", "--num_blocks", "3", "--downsample_times", "4"])
    pipeline = create_align_pipeline(*load_vaes(vae_folders, *names), args)
    config = pipeline.config
    assert config.out_channels == pipeline.codec2.channels == out_channels
    assert (config.latent_channels, config.latent_stride) == (pipeline.codec1.channels, pipeline.codec1.stride)
    assert config.out_stride == pipeline.codec2.stride
    assert (config.hidden_channels, config.num_blocks, config.downsample_times) == (8, 3, 4)
    inputs, target, _ = pipeline.encode_batch({"pixel_values": torch.zeros(1, 3, 32, 24)})
    assert pipeline.module(**inputs).shape == target.shape


def test_typed_out_channels_that_contradict_vae2_are_refused(vae_folders):
    """A flag that is silently overruled, or that is refused though it was not typed or is right."""
    vaes = load_vaes(vae_folders, "kl4", "kl16")
    assert create_align_pipeline(*vaes, parse_args(["--out_channels", "16"])).config.out_channels == 16
    with pytest.raises(MISTAKES, match=r"--out_channels 8: .*16"):
        create_align_pipeline(*vaes, parse_args(["--out_channels", "8"]))
