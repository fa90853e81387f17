"""What everything stands on: names, walks, widths, containers, files. No word of deltas."""
