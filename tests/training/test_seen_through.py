"""--seen_through: which picture an image module is shown, and that it is the same with and without the cache."""

import numpy as np
import torch
from runs import QUIET, assert_same_tensors, same_weights, train

from images.decoding import to_pixel_values
from vaes.codec import Codec, SeenThrough
from vaes.loading import load_vae_model

RECIPE = {**QUIET, "input_types": ["image"], "max_train_steps": 4, "decoder_loss_weight": 1.0, "reencode_target": 0.5}


def test_each_image_is_seen_through_its_own_vae_or_none(vae_folders):
    """Catches a picture of the wrong VAE, of another image of the batch, not clamped, and VAEs that are never drawn."""
    folders = [vae_folders[name] for name in ("kl4", "kl4_stride4")]
    codecs = [Codec(load_vae_model(folder, "", None, "cpu", torch.float32)) for folder in folders]
    images = to_pixel_values(
        torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    seen = SeenThrough(codecs)
    places, pictures = seen.places(images), seen(images)
    assert set(places.tolist()) == {0, 1, 2}
    for image, place, picture in zip(images, places.tolist(), pictures):
        codec = [*codecs, None][place]
        wanted = codec.decode(codec.encode(image[None])).clamp(-1, 1)[0] if codec else image
        torch.testing.assert_close(picture, wanted, atol=1e-5, rtol=1e-4)


def test_the_cache_and_a_resumed_run_show_what_training_without_them_shows(flags, vae_folders, tmp_path):
    """A cache of VAE1's picture or of the image itself; a turn by the folder's content; pictures drawn anew."""
    seen = {"seen_through": [str(vae_folders["kl4_stride4"])], **RECIPE}
    cached = train(flags, tmp_path / "cached", **seen, cache_views=1)
    online = train(flags, tmp_path / "online", **seen, no_cache_latents=True)
    plain = train(flags, tmp_path / "plain", **RECIPE | {"reencode_target": 0.0})
    first_epoch = [run.scalars["train/loss"][:3] for run in (cached, online)]  # later, training without a cache has other crops
    assert np.allclose(*first_epoch, rtol=5e-3)
    assert not same_weights(cached.last, plain.last)
    train(flags, tmp_path / "broken", **seen | {"max_train_steps": 2}, cache_views=1)
    assert_same_tensors(train(flags, tmp_path / "broken", **seen, cache_views=1, resume=True).last, cached.last)
