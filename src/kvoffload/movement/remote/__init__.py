"""Movement between a manager's own tiers and the engine that it shares with others."""
