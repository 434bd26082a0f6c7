"""Checking a folder that has been written."""
