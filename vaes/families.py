"""The latent spaces that models share: one row for each, with its numbers and every name that people use for it.

The constants are those of the families' VAE configs and of diffusers' class defaults; ComfyUI's latent formats have the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from utils import UserError, shown
from vae_align import LatentSpace

WAN21_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN21_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.916,
)
QWEN21_MEAN = (
    0.5126,
    0.7721,
    -0.0631,
    1.3506,
    -0.7855,
    -2.1025,
    -0.3458,
    1.3722,
    1.8873,
    -1.7177,
    -0.651,
    0.2732,
    0.7562,
    -0.6163,
    -1.0277,
    3.8363,
    2.021,
    0.0472,
    0.932,
    2.0087,
    2.4954,
    -0.1391,
    -1.4249,
    1.8464,
    -0.5236,
    1.2826,
    3.7046,
    -1.3035,
    2.7286,
    -1.4518,
    -1.9036,
    -1.9955,
    -0.0342,
    -1.0265,
    -0.7636,
    3.0555,
    0.0746,
    -3.0751,
    -0.1076,
    1.7376,
    -1.0914,
    -1.9435,
    -0.2784,
    -1.368,
    0.4809,
    -0.4433,
    0.3764,
    0.5729,
    -2.0595,
    1.096,
    -1.326,
    -2.0211,
    -5.0179,
    0.5275,
    4.0162,
    1.8505,
    0.3026,
    1.9373,
    1.4937,
    0.2632,
    0.5547,
    -1.7121,
    -0.1562,
    0.0304,
)
QWEN21_STD = (
    3.2001,
    3.2936,
    3.4321,
    3.0091,
    3.1061,
    4.0379,
    4.0705,
    3.791,
    3.0785,
    3.65,
    3.9308,
    3.0904,
    2.8778,
    3.7675,
    3.732,
    5.0756,
    3.2864,
    4.0397,
    3.1317,
    4.0443,
    2.9249,
    3.9454,
    3.0988,
    4.2489,
    3.4896,
    3.8513,
    3.9323,
    3.4719,
    3.7498,
    4.283,
    3.5694,
    4.2467,
    3.9037,
    3.2947,
    5.077,
    3.5075,
    3.27,
    3.4767,
    2.8063,
    5.1125,
    3.5327,
    4.7833,
    3.1286,
    4.1819,
    3.8527,
    3.8312,
    3.5605,
    4.3875,
    3.9624,
    4.0168,
    3.5643,
    4.055,
    5.5614,
    4.2963,
    4.408,
    3.4959,
    3.8747,
    3.7608,
    3.5735,
    3.149,
    3.7662,
    3.6746,
    3.4563,
    3.8161,
)
MOCHI_MEAN = (
    -0.06730895953510081,
    -0.038011381506090416,
    -0.07477820912866141,
    -0.05565264470995561,
    0.012767231469026969,
    -0.04703542746246419,
    0.043896967884726704,
    -0.09346305707025976,
    -0.09918314763016893,
    -0.008729793427399178,
    -0.011931556316503654,
    -0.0321993391887285,
)
MOCHI_STD = (
    0.9263795028493863,
    0.9248894543193766,
    0.9393059390890617,
    0.959253732819592,
    0.8244560132752793,
    0.917259975397747,
    0.9294154431013696,
    1.3720942357788521,
    0.881393668867029,
    0.9168315692124348,
    0.9185249279345552,
    0.9274757570805041,
)
COSMOS_MEAN = (
    0.11362758,
    0.19125476,
    0.01306714,
    -0.00197727,
    -0.02994183,
    0.08019473,
    0.16718403,
    0.09564418,
    -0.04987567,
    -0.05364667,
    0.16427967,
    -0.10612928,
    -0.16888915,
    -0.03415358,
    0.02055675,
    0.20312774,
)
COSMOS_STD = (
    0.56700271,
    0.85245121,
    0.84960359,
    0.91877103,
    0.77755755,
    0.69903517,
    0.8187142,
    0.67583984,
    0.72450989,
    0.90176988,
    0.49853548,
    0.61986589,
    0.35586974,
    0.98101336,
    0.83202779,
    0.44025335,
)
WAN22_MEAN = (
    -0.2289,
    -0.0052,
    -0.1323,
    -0.2339,
    -0.2799,
    0.0174,
    0.1838,
    0.1557,
    -0.1382,
    0.0542,
    0.2813,
    0.0891,
    0.157,
    -0.0098,
    0.0375,
    -0.1825,
    -0.2246,
    -0.1207,
    -0.0698,
    0.5109,
    0.2665,
    -0.2108,
    -0.2158,
    0.2502,
    -0.2055,
    -0.0322,
    0.1109,
    0.1567,
    -0.0729,
    0.0899,
    -0.2799,
    -0.123,
    -0.0313,
    -0.1649,
    0.0117,
    0.0723,
    -0.2839,
    -0.2083,
    -0.052,
    0.3748,
    0.0152,
    0.1957,
    0.1433,
    -0.2944,
    0.3573,
    -0.0548,
    -0.1681,
    -0.0667,
)
WAN22_STD = (
    0.4765,
    1.0364,
    0.4514,
    1.1677,
    0.5313,
    0.499,
    0.4818,
    0.5013,
    0.8158,
    1.0344,
    0.5894,
    1.0901,
    0.6885,
    0.6165,
    0.8454,
    0.4978,
    0.5759,
    0.3523,
    0.7135,
    0.6804,
    0.5833,
    1.4146,
    0.8986,
    0.5659,
    0.7069,
    0.5338,
    0.4889,
    0.4917,
    0.4069,
    0.4999,
    0.6866,
    0.4093,
    0.5709,
    0.6065,
    0.6415,
    0.4944,
    0.5726,
    1.2042,
    0.5458,
    1.6887,
    0.3971,
    1.06,
    0.3943,
    0.5537,
    0.5444,
    0.4089,
    0.7468,
    0.7744,
)
PLAYGROUND_MEAN = (-1.6574, 1.886, -1.383, 2.5155)
PLAYGROUND_STD = (8.4927, 5.9022, 6.5498, 5.2299)


@dataclass(frozen=True)
class Family:
    """A latent space and those who live in it.

    Attributes:
        name: of the space, as checkpoints record it.
        models: whose latents these are, for readers.
        channels, stride: of scaled latents.
        scale, shift: diffusers' `(raw - shift) * scale`, where one number serves all channels.
        mean, std: `(raw - mean) * scale / std` of each channel, where there are such numbers. None and None with `scale` None:
            the numbers are in each VAE's own config and not known here.
        aliases: other names for the space; letters and digits count, their case does not.
        files: stems of single-file VAEs, which do not say themselves whose they are.
        tiny: stems and hub names of tiny autoencoders, which give scaled latents and do not say whose.
        ignores_shift: the family's pipeline ignores the shift_factor of its VAE's config.
        vae: the class in diffusers.
        note: what the table of the README adds.
    """

    name: str
    models: str
    channels: int
    stride: int
    vae: str
    scale: float | None = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    aliases: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    ignores_shift: bool = False
    note: str = ""

    @cached_property
    def space(self) -> LatentSpace | None:
        """The space with its numbers; None where they are not known."""
        if self.scale is None:
            return None
        mean = self.mean or (self.shift,) * self.channels
        std = self.std or (1.0,) * self.channels
        return LatentSpace(self.name, self.channels, self.stride, mean, tuple(value / self.scale for value in std))


# FLUX.2 and LTX keep their statistics in the weights. The raw latents of their spaces are the normalised ones, as ComfyUI
# keeps them.
FAMILIES = (
    Family("sd15", "Stable Diffusion 1.x and 2.x, PixArt-α", 4, 8, "AutoencoderKL", 0.18215,
           aliases=("sd1", "sd14", "sd2", "sd21", "stable-diffusion", "pixart-alpha", "sd-turbo"),
           files=("vae-ft-mse-840000-ema-pruned", "vae-ft-ema-560000-ema-pruned", "kl-f8-anime2"), tiny=("taesd",),
           note="also AsymmetricAutoencoderKL and ConsistencyDecoderVAE, which share the encoder"),
    Family("sdxl", "SDXL, PixArt-Σ, AuraFlow, Kolors, HunyuanDiT, Lumina-Next, OmniGen", 4, 8, "AutoencoderKL", 0.13025,
           aliases=("sd-xl", "sdxl-turbo", "pixart-sigma", "auraflow", "kolors", "hunyuandit", "lumina-next", "omnigen"),
           files=("sdxl_vae", "sdxl.vae"), tiny=("taesdxl",)),
    Family("playground25", "Playground v2.5", 4, 8, "AutoencoderKL", 0.5, mean=PLAYGROUND_MEAN, std=PLAYGROUND_STD,
           aliases=("playground", "playground-v2.5")),
    Family("sd3", "Stable Diffusion 3 and 3.5", 16, 8, "AutoencoderKL", 1.5305, 0.0609, aliases=("sd35", "sd3-medium"),
           files=("sd3_vae",), tiny=("taesd3",)),
    Family("flux1", "FLUX.1, Z-Image, HiDream-I1, Chroma, Lumina 2, Ovis-Image, LongCat-Image", 16, 8, "AutoencoderKL",
           0.3611, 0.1159, aliases=("flux", "flux1-dev", "flux1-schnell", "z-image", "hidream", "hidream-i1", "chroma",
                                    "lumina2", "ovis-image", "longcat-image"),
           files=("ae", "flux_vae", "flux_ae"), tiny=("taef1",)),
    Family("kandinsky5", "Kandinsky 5 image models", 16, 8, "AutoencoderKL", 0.3611, aliases=("kandinsky-5",),
           ignores_shift=True, note="FLUX.1's VAE without its shift, latents channels-last"),
    Family("glm-image", "GLM-Image", 16, 8, "AutoencoderKL", None, note="numbers from the VAE's config"),
    Family("flux2", "FLUX.2, FLUX.3 Klein, ERNIE-Image, Ideogram 4, Bria FIBO 2", 128, 16, "AutoencoderKLFlux2",
           aliases=("flux2-dev", "flux2-klein", "flux3-klein", "ernie-image", "ideogram4", "fibo2"), tiny=("taef2",),
           note="32 raw channels of stride 8, folded 2x2; numbers from the VAE's weights"),
    Family("sana", "Sana, PRX (DC-AE f32c32)", 32, 32, "AutoencoderDC", 0.41407, aliases=("dc-ae", "dc-ae-f32c32", "prx"),
           tiny=("taesana",)),
    Family("hunyuan-image", "HunyuanImage 2.1", 64, 32, "AutoencoderKLHunyuanImage", 0.75289,
           aliases=("hunyuanimage", "hunyuan-image-2.1")),
    Family("wan21", "Wan 2.1 and 2.2-14B, Qwen-Image, Krea 2, Nucleus, Bria FIBO, JoyImage, ChronoEdit, Cosmos-Predict2",
           16, 8, "AutoencoderKLWan", mean=WAN21_MEAN, std=WAN21_STD,
           aliases=("wan", "wan2.1", "wan2.2-14b", "qwen-image", "qwen-image-edit", "krea2", "nucleus", "fibo", "joyimage",
                    "chronoedit", "cosmos2", "cosmos-predict2"), note="also AutoencoderKLQwenImage"),
    Family("wan22", "Wan 2.2-5B", 48, 16, "AutoencoderKLWan", mean=WAN22_MEAN, std=WAN22_STD, aliases=("wan2.2-5b",)),
    Family("qwen-image-2.1", "Qwen-Image 2.1", 64, 16, "AutoencoderKLQwenImage21", mean=QWEN21_MEAN, std=QWEN21_STD,
           note="images with opacity; ours are opaque"),
    Family("hunyuan-video", "HunyuanVideo, Kandinsky 5 video", 16, 8, "AutoencoderKLHunyuanVideo", 0.476986,
           aliases=("hunyuanvideo", "kandinsky5-video")),
    Family("hunyuan-video-1.5", "HunyuanVideo 1.5", 32, 16, "AutoencoderKLHunyuanVideo15", 1.03682),
    Family("ltx", "LTX-Video", 128, 32, "AutoencoderKLLTXVideo", aliases=("ltx-video",),
           note="numbers from the VAE's weights"),
    Family("ltx2", "LTX-2", 128, 32, "AutoencoderKLLTX2Video", aliases=("ltx-2",),
           note="numbers from the VAE's weights; LTX2Pipeline gives raw latents of its VAE"),
    Family("cogvideox", "CogVideoX-2B", 16, 8, "AutoencoderKLCogVideoX", 1.15258426, aliases=("cogvideox-2b",)),
    Family("cogvideox-5b", "CogVideoX-5B", 16, 8, "AutoencoderKLCogVideoX", 0.7),
    Family("easyanimate", "EasyAnimate", 16, 8, "AutoencoderKLMagvit", 0.7125),
    Family("mochi", "Mochi 1", 12, 8, "AutoencoderKLMochi", mean=MOCHI_MEAN, std=MOCHI_STD, aliases=("mochi-1",)),
    Family("cosmos1", "Cosmos 1", 16, 8, "AutoencoderKLCosmos", 0.5, mean=COSMOS_MEAN, std=COSMOS_STD, aliases=("cosmos",)),
)  # fmt: skip
SPACES = {family.name: family.space for family in FAMILIES if family.space}


def family_of(name: str) -> Family:
    """The row of a space's name or alias; UserError lists the names."""
    wanted = _letters(name)
    for family in FAMILIES:
        if wanted in map(_letters, (family.name, *family.aliases)):
            return family
    raise UserError(f"latent space {shown(name)}: unknown; choose from {', '.join(family.name for family in FAMILIES)}")


def named_space(name: str) -> LatentSpace:
    """The latent space of that name or alias; UserError lists the names."""
    family = family_of(name)
    if family.space is None:
        raise UserError(f"latent space {family.name}: its numbers are in its VAE's config and not known without it")
    return family.space


def family_of_file(stem: str, of: str) -> Family | None:
    """The row that lists this stem among its `of`: "files" or "tiny"."""
    return next((family for family in FAMILIES if stem.lower() in getattr(family, of)), None)


def spaces_with(channels: int, stride: int | None = None) -> list[Family]:
    """The rows with that many channels, and of that stride if one is given."""
    return [family for family in FAMILIES if family.channels == channels and stride in (None, family.stride)]


def table_of_families() -> str:
    """The README's table."""
    lines = ["| `--vae1_space` | models | channels | stride | class | also called |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        also = ", ".join(family.aliases)
        models = f"{family.models} ({family.note})" if family.note else family.models
        cells = (f"`{family.name}`", models, family.channels, family.stride, f"`{family.vae}`", also)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _letters(name: str) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum())
