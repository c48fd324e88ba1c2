"""What a run leaves behind for people: metric sinks and films."""
