"""Demonstrations of scripted experts: made in parallel, stored as a data set, read for training."""
