"""Fused Metal kernels for the decode step, each with the plain MLX form that it has to equal.

None runs before `apertus-mlx doctor` has proved it on the machine at hand.
"""
