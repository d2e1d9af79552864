"""A CPU-friendly init."""
