"""Latent spaces, the frozen VAEs behind them, and the cache of what they encode."""
