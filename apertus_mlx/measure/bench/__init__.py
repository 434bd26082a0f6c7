"""Measuring: speed and memory of a model on this machine, alone or in turn with a peer."""
