"""Distillation: a quantized model learns from the one that it was made from, in the same format."""
