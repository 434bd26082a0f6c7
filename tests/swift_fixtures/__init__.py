"""What Swift tests compare with, computed by Python: `python -m tests.swift_fixtures OUT`."""
