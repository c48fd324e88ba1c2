"""A CPU-only environment and policy for tests, docs and fault injection."""
