"""MLPS: what each token computes on its own."""

from foundry_jax.model.mlp.gated import SwiGLU

MLPS = {"swiglu": SwiGLU}
