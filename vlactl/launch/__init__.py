"""From configuration and hardware to a supervised torchrun job. Imports no torch."""
