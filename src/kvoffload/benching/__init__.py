"""What this machine can do, and what kvoffload makes of it, measured in turns."""
