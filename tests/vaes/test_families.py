"""Each family's tiny model, encoded and decoded by us and by the formula of its own diffusers pipeline."""

import __future__

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ROOT
from families import EVERY_CLASS, RECIPES, make_family, save_class
from hostile import refusal
from pipelines import untrained

from vae_align import CHANNELS, pack
from vaes.codec import Codec
from vaes.conventions import CONVENTIONS
from vaes.families import FAMILIES, SPACES, family_of, named_space
from vaes.loading import load_vae_model

SPACE_OF = {"qwen-image": "wan21", "asymmetric": "sd15", "consistency": "sd15"}  # the others are called like their space

OF_PICTURES = (  # the classes whose images have no frames
    "AutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AsymmetricAutoencoderKL",
    "ConsistencyDecoderVAE",
)


def images(model_stride, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, 2 * model_stride, 3 * model_stride, generator=generator) * 2 - 1


def mode(model, x):
    return model.encode(x).latent_dist.mode()


def moments(model, ndim):
    numbers = (model.config.latents_mean, model.config.latents_std)
    return [torch.tensor(values).view(1, -1, *[1] * (ndim - 2)) for values in numbers]


def pipeline_code(file, class_name, *names):
    """Methods of a pipeline's class as plain functions, out of its source: importing it would need transformers."""
    tree = ast.parse((Path(diffusers.__file__).parent / "pipelines" / file).read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "retrieve_latents"]
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    chosen += [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in chosen:
        node.decorator_list = []
    scope = {"torch": torch}
    flags = __future__.annotations.compiler_flag  # annotations name classes that the scope lacks
    exec(compile(ast.Module(chosen, []), file, "exec", flags), scope)
    return [scope[name] for name in names]


# Each formula: (model, RGB images) -> scaled latents, with the pipeline's own code where it can be called by itself.


def by_scale(model, x):  # StableDiffusionImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
    return (mode(model, x) - (model.config.get("shift_factor") or 0)) * model.config.scaling_factor


def by_flux(model, x):
    (encode,) = pipeline_code("flux/pipeline_flux_img2img.py", "FluxImg2ImgPipeline", "_encode_vae_image")
    means = SimpleNamespace(config=model.config, encode=lambda image: SimpleNamespace(latents=mode(model, image)))
    return encode(SimpleNamespace(vae=means), x, None)


def by_kandinsky(model, x):  # Kandinsky5T2IPipeline decodes `latents / scaling_factor`
    return mode(model, x) * model.config.scaling_factor


def by_flux2(model, x):
    names = ("_patchify_latents", "_encode_vae_image")
    patchify, encode = pipeline_code("flux2/pipeline_flux2.py", "Flux2Pipeline", *names)
    return encode(SimpleNamespace(vae=model, _patchify_latents=patchify), x, None)


def by_sana(model, x):  # SanaSprintImg2ImgPipeline
    return model.encode(x).latent * model.config.scaling_factor


def by_video_scale(model, x):
    return torch.cat([mode(model, one[None].unsqueeze(2)) for one in x]) * model.config.scaling_factor


def by_moments(model, x):  # GlmImagePipeline, WanVideoToVideoPipeline.prepare_latents
    raw = mode(model, x if type(model).__name__ in OF_PICTURES else x.unsqueeze(2))
    mean, std = moments(model, raw.ndim)
    return (raw - mean) / std


def by_scaled_moments(model, x):  # StableDiffusionXLImg2ImgPipeline; MochiPipeline decodes `latents * std / scale + mean`
    return by_moments(model, x) * model.config.scaling_factor


def by_qwen(model, x):
    (encode,) = pipeline_code("qwenimage/pipeline_qwenimage_edit.py", "QwenImageEditPipeline", "_encode_vae_image")
    return encode(SimpleNamespace(vae=model, latent_channels=model.config.z_dim), x.unsqueeze(2), None)


def by_qwen21(model, x):
    (encode,) = pipeline_code("qwenimage21/pipeline_qwenimage21.py", "QwenImage21Pipeline", "_encode_vae_image")
    rgba = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return encode(SimpleNamespace(vae=model, latent_channels=model.config.z_dim), rgba.unsqueeze(2), None)


def by_ltx(model, x):
    raw = mode(model, x.unsqueeze(2))
    (normalize,) = pipeline_code("ltx/pipeline_ltx.py", "LTXPipeline", "_normalize_latents")
    return normalize(raw, model.latents_mean, model.latents_std, model.config.scaling_factor)


def by_cosmos(model, x):  # CosmosVideoToWorldPipeline.prepare_latents
    raw, sigma_data = mode(model, x.unsqueeze(2)), diffusers.EDMEulerScheduler().config.sigma_data
    mean, std = (
        torch.tensor(values).view(1, model.config.latent_channels, -1, 1, 1)[:, :, : raw.size(2)]
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    return (raw - mean) * sigma_data / std


FORMULAS = {
    "playground25": by_scaled_moments,
    "flux1": by_flux,
    "kandinsky5": by_kandinsky,
    "glm-image": by_moments,
    "flux2": by_flux2,
    "sana": by_sana,
    "wan21": by_moments,
    "wan22": by_moments,
    "qwen-image": by_qwen,
    "qwen-image-2.1": by_qwen21,
    "ltx": by_ltx,
    "ltx2": by_ltx,
    "mochi": by_scaled_moments,
    "cosmos1": by_cosmos,
    **dict.fromkeys(("hunyuan-video", "hunyuan-video-1.5", "cogvideox", "cogvideox-5b", "easyanimate"), by_video_scale),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_family_is_encoded_and_decoded_as_its_own_pipeline_does(name):
    """A mean left out, a scale twice, statistics of another frame, channels folded in another order, RGBA without opacity."""
    model = make_family(name)
    asked = name if name in ("kandinsky5", "glm-image") else None  # the two that their VAE's numbers alone do not tell
    codec, x = Codec(model, space=asked), images(32)
    row = family_of(SPACE_OF.get(name, name))
    assert (codec.space.name, codec.channels, codec.stride) == (row.name, row.channels, row.stride)
    with torch.no_grad():
        latents = codec.encode(x)
        own = FORMULAS.get(name, by_scale)(make_family(name), x)
        own = own[:, :, 0] if own.ndim == 5 else own
        torch.testing.assert_close(latents, own, rtol=1e-4, atol=1e-5)
        assert latents.shape == (2, row.channels, x.shape[2] // row.stride, x.shape[3] // row.stride)
        torch.testing.assert_close(codec.decode(latents), reconstruction(make_family(name), x), rtol=1e-3, atol=1e-4)


def reconstruction(model, x):
    """decode(encode(x)) by the model alone, image by image: what the two maps must not change."""
    frames = type(model).__name__ not in OF_PICTURES
    if model.config.get("in_channels") == 4:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    made = []
    for one in x.split(len(x) if type(model).__name__ == "ConsistencyDecoderVAE" else 1):
        encoded = model.encode(one.unsqueeze(2) if frames else one)
        raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        takes = inspect.signature(model.decode).parameters
        more = {"generator": torch.Generator().manual_seed(0)} if "num_inference_steps" in takes else {}
        if model.config.get("timestep_conditioning"):
            more["temb"] = torch.zeros(len(raw))
        made.append(model.decode(raw, **more).sample)
    made = torch.cat(made)
    return (made[:, :, 0] if frames else made)[:, :3]


@pytest.mark.parametrize("class_name", EVERY_CLASS)
def test_every_decoder_gives_its_features(class_name, tmp_path):
    """Stages elsewhere or backwards, hooks that stay, a gradient that ends; a class that works as an object alone."""
    save_class(class_name, tmp_path)
    codec = Codec(load_vae_model(tmp_path, "vae", None, "cpu", torch.float32), str(tmp_path))
    assert not codec.vae.loaded  # the space is known before the weights are read
    if EVERY_CLASS[class_name]:
        made = Codec(make_family(EVERY_CLASS[class_name]))
        torch.testing.assert_close(codec.encode(images(32)), made.encode(images(32)))
    latents = torch.randn(2, codec.channels, 2, 2, requires_grad=True)
    pictures, features = codec.decode_with_features(latents)
    assert torch.equal(pictures, codec.decode(latents))
    sides = [each.shape[-1] for each in features]
    assert len(sides) > 1 and sides == sorted(sides) and sides[0] < pictures.shape[-1]
    assert {len(each) for each in features} == {4 if class_name == "ConsistencyDecoderVAE" else 2}
    for value in (pictures, *features):
        (gradient,) = torch.autograd.grad(value.square().mean(), latents, retain_graph=True)
        assert gradient.any()
    model = codec.vae.model
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_every_class_and_every_row_is_tested():
    """A row or a class added without a model that is compared with its pipeline."""
    assert {class_name for class_name, _ in RECIPES.values()} == set(CONVENTIONS) - {"AutoencoderTiny", "TinyAutoencoder"}
    assert {SPACE_OF.get(name, name) for name in RECIPES} == {family.name for family in FAMILIES}


def test_aliases_name_one_space_each():
    """z-image that means nothing, case that matters, or a name that two rows claim."""
    assert named_space("z-image") is named_space("Z_Image") is SPACES["flux1"]
    assert named_space("Qwen-Image") is SPACES["wan21"]
    for family in FAMILIES:
        assert all(family_of(name) is family for name in (family.name, *family.aliases))
    refusal(lambda: named_space("sd99"), "sd99", "sd15", "flux2")


def test_a_name_that_does_not_fit_is_refused_with_those_that_do():
    """A space recorded against the VAE's own channels or numbers."""
    sdxl = make_family("sdxl")
    refusal(lambda: Codec(sdxl, space="flux1"), "4 channels", "16", "sd15, sdxl, playground25")
    refusal(lambda: Codec(sdxl, space="sd15"), "those of sdxl", "not of sd15")
    refusal(lambda: named_space("glm-image"), "glm-image", "config")


def test_a_wrong_number_of_channels_names_the_spaces_that_have_it():
    """A list in the inference file that falls behind the table, or an error that does not say whose latents these are."""
    for count, names in CHANNELS.items():
        assert names.split(", ") == [family.name for family in FAMILIES if family.channels == count]
    assert set(CHANNELS) == {family.channels for family in FAMILIES}


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readmes_table_is_the_codes(readme):
    """A family that the README does not list, or a number that changed in one of the two."""
    lines = ["| `--vae1_space` | models | channels | stride | class | also called |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        models = f"{family.models} ({family.note})" if family.note else family.models
        shape = f"{family.channels} | {family.stride} | `{family.vae}`"
        lines.append(f"| `{family.name}` | {models} | {shape} | {', '.join(family.aliases)} |")
    assert "\n".join(lines) in (ROOT / readme).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What pipelines give with output_type="latent"


def unpacked_by(file, class_name, x, *more):
    (unpack,) = pipeline_code(file, class_name, "_unpack_latents")
    return unpack(x, *more)


def test_packed_tokens_are_unpacked_as_the_pipelines_do():
    """Channels before the place in a 2x2 patch, rows for columns: latents of the right shape that are noise."""
    flux, ltx = SPACES["flux1"], SPACES["ltx"]
    tokens = torch.randn(2, 6, 64)
    expected = unpacked_by("flux/pipeline_flux.py", "FluxPipeline", tokens, 32, 48, 8)
    assert torch.equal(flux.from_pipeline(tokens, (32, 48)), expected)
    assert torch.equal(pack(expected), tokens)
    qwen = unpacked_by("qwenimage/pipeline_qwenimage.py", "QwenImagePipeline", tokens, 32, 48, 8)
    assert torch.equal(SPACES["wan21"].from_pipeline(tokens, (32, 48)), qwen[:, :, 0])
    wide = torch.randn(2, 6, 128)
    expected = unpacked_by("ltx/pipeline_ltx.py", "LTXPipeline", wide, 1, 2, 3, 1, 1)
    assert torch.equal(ltx.from_pipeline(wide, (64, 96)), expected[:, :, 0])
    tokens = torch.randn(2, 24, 64)
    qwen = unpacked_by("qwenimage21/pipeline_qwenimage21.py", "QwenImage21Pipeline", tokens, 64, 96, 16)
    assert torch.equal(SPACES["qwen-image-2.1"].from_pipeline(tokens, (64, 96)), qwen[:, :, 0])
    ids = torch.tensor([[0, row, column, 0] for row in range(2) for column in range(3)]).expand(2, 6, 4)
    (unpack,) = pipeline_code("flux2/pipeline_flux2.py", "Flux2Pipeline", "_unpack_latents_with_ids")
    assert torch.equal(SPACES["flux2"].from_pipeline(wide, (32, 48)), unpack(wide, ids))


def test_frames_and_channels_last_are_taken():
    """A frame that is taken for a batch, Kandinsky's width for channels, or CogVideoX's frames before its channels refused."""
    latents = torch.randn(2, 16, 4, 6)
    for given in (latents, latents.unsqueeze(2), latents.permute(0, 2, 3, 1).unsqueeze(1)):
        assert torch.equal(SPACES["kandinsky5"].from_pipeline(given), latents)
    for size in ((4, 6), (4, 16), (16, 16)):  # a width of 16 is no channel
        latents = torch.randn(2, 16, *size)
        assert torch.equal(SPACES["cogvideox"].from_pipeline(latents.unsqueeze(1)), latents)
        assert torch.equal(SPACES["kandinsky5"].from_pipeline(latents.permute(0, 2, 3, 1).unsqueeze(1)), latents)


def test_latents_that_are_no_picture_are_one_line():
    """The first frame of a video translated as if it were all, tokens on a guessed grid, or a patch across the edge."""
    space = SPACES["flux1"]
    refusal(lambda: pack(torch.zeros(1, 16, 7, 8)), "even h and w")
    refusal(lambda: space.from_pipeline(torch.zeros(1, 16, 3, 4, 4)), "3 frames")
    refusal(lambda: SPACES["cogvideox"].from_pipeline(torch.zeros(1, 3, 16, 4, 4)), "3 frames")
    refusal(lambda: space.from_pipeline(torch.zeros(1, 4, 64)), "size=(height, width)")
    refusal(lambda: space.from_pipeline(torch.zeros(1, 4, 64), (32, 48)), "(32, 48)")
    refusal(lambda: space.from_pipeline(torch.zeros(1, 4, 64), (33, 33)), "(33, 33)")
    refusal(lambda: space.from_pipeline(torch.zeros(1, 4, 17)), "16 numbers, or 4 times")


def test_translate_takes_what_a_pipeline_gives():
    """A helper that exists beside a translate that refuses the same latents."""
    pipeline = untrained("flux1", "sd15")
    tokens = torch.randn(1, 6, 64)
    latents = SPACES["flux1"].from_pipeline(tokens, (32, 48))
    assert torch.equal(pipeline.translate(tokens, size=(32, 48)), pipeline.translate(latents))
    assert torch.equal(pipeline.translate(latents.unsqueeze(2)), pipeline.translate(latents))
    assert torch.equal(pipeline.translate(latents.unsqueeze(2), raw=True), pipeline.translate(latents, raw=True))
