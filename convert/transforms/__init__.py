"""Rotation and smoothing: other weights that compute the same."""
