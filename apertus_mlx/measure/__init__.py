"""Measuring on this machine: speed beside peers, and which kernels can be trusted."""
