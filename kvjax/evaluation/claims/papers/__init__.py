"""The claims of each paper."""
