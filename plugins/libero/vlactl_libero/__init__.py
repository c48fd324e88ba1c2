"""LIBERO on robosuite and MuJoCo, as a vlactl environment."""
