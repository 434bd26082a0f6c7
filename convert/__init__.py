"""Checkpoints in, checkpoints out: inventory, plan, execution, verification."""
