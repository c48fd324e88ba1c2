"""An environment for vlactl, to copy from."""
