"""Group relative policy optimisation, as a vlactl algorithm."""
