"""Attention kernels: functions from arrays to arrays, one room per op, one file per lowering.

Each room's docstring is the contract of its op: names, shapes, dtypes, what padding holds and what
the numbers mean. Every lowering of an op, here or in `attnsel_jax.xla`, has the signature that the
room's contract prints; a test compares them. Nothing in this package imports `attnsel_jax`.
"""
