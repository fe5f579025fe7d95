"""A FastAPI application of one's own with a block cache in it."""
