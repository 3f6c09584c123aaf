"""Impls: from a layer's static facts and a step's arrays to one kernel call."""
