"""One file per checkpoint format: recognises it and knows how to read each weight matrix of it."""
