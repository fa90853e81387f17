"""How a delta gets on a backbone, runs and comes off; what is remembered of it."""
