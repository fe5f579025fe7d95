"""Two FastAPI applications that share a block cache."""
