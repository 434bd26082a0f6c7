"""A smaller vocabulary: which tokens are kept, the files and weights of the rest, and the price."""
