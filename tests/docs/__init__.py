"""Tests of README and docs: what they show runs, what they claim is computed."""
