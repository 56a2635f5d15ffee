"""Measurements of claims: one file per claim, each with the command that repeats it."""
