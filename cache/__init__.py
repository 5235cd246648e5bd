"""The latent cache: what both frozen VAEs make of each training image."""
