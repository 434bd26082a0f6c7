"""An HTTP server as OpenAI's clients expect it: one thread computes, another speaks HTTP."""
