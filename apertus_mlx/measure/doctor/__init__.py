"""Finds out which kernels this machine can be trusted with, by trying each in another process."""
