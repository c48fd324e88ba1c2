"""What a plugin author imports: contracts, descriptors, keyed noise, the simulator pool."""
