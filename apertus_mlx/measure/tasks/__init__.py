"""Standard tasks of lm-eval (EleutherAI's harness) on our models; needs the extra `eval`."""
