"""Which hardware computes, and loading the model for it."""
