"""OpenVLA-OFT with discrete action tokens, as a vlactl model."""
