"""Where keys and values lie: buffers, in slots, kept ones, in pages."""
