"""Tiers: bytes in numbered slots of one medium, and no policy."""
