"""Everything that looks at text before weights are written: which, and what follows from it."""
