"""supra_jax turns a pretrained transformer into an RNN."""

from supra_jax.lm import LM, load

__all__ = ["LM", "load"]
