"""What a delta is: its config, its plan, its record, its class."""
