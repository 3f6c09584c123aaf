"""Acme's attention for attnsel-jax."""
