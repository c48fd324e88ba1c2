"""Directories of weights and how they prove that they are complete. Imports no torch."""
