"""What a run is: typed sections, presets that extend each other, where each value came from."""
