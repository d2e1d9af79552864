"""The way from a prompt to tokens, text and scores, under any method."""
