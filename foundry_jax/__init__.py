"""foundry_jax: find out whether a transformer mutation is actually better."""

__version__ = "0.1.0"
