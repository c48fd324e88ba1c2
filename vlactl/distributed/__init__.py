"""Rank sets and what moves between them; alone, but for checkpoints, in using torch.distributed."""
