"""What is done with one delta: freezing, merging, sums. None needs another."""
