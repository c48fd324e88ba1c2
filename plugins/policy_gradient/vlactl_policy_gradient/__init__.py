"""What policy gradient algorithms have in common: keys, formulas, weights and the policy loss."""
