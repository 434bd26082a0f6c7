"""From a prompt to an answer: sampling, decoding, runs and conversations."""
