"""A small VLA for CPUs: pictures, instruction and proprioception to 8x7 action tokens."""
