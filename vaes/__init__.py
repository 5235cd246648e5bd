"""Frozen VAEs: how they are found, loaded and called, and the latent spaces that they share."""
