"""Rank sets and what moves between them; the only place that imports torch.distributed."""
