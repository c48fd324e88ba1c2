"""A scripted expert: it solves LIBERO tasks by what it reads in the simulator.

It makes demonstrations to learn from. It is no policy: poses of objects, joints and contacts are
read from MuJoCo, and nothing is seen.
"""
