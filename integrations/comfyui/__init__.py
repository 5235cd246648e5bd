"""Align Latents: a ComfyUI node pack. `install.py` puts `vae_align.py` beside this file; nothing else is needed."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
