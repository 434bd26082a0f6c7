"""The Metal kernels' own text, run as CUDA: whether another GPU computes with it what it should."""
