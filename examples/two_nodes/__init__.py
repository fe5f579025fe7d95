"""Two services that share a block cache."""
