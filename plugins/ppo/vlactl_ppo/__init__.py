"""Proximal policy optimisation, as a vlactl algorithm."""
