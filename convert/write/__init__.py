"""Writing the output: weights, the files beside them, and the state of unfinished work."""
