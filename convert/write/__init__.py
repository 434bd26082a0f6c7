"""Writing the output: arrays, the files beside them, and whatever unfinished work needs."""
