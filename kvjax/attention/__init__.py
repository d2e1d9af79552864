"""Attention, whatever it is over: partial results, and which keys are chosen."""
