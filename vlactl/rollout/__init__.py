"""Episodes and how they are collected; train, evaluate and video all roll out through here."""
