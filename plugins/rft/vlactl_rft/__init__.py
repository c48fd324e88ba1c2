"""Rejection-sampling fine-tuning, as a vlactl algorithm."""
