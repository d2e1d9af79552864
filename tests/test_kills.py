"""A command that keeps something, killed at a random moment: nothing is lost."""

import random

import kills
from tiny import TEXT, byte_tokenizer, tiny_model

import models


def test_killed_and_run_again_it_ends_the_same(tmp_path):
    """`python tests/kills.py` does the same to the others, and more often."""
    model = tiny_model(num_layers=1, context=512)
    model = model._replace(tokenizer=byte_tokenizer(), eos_ids=(258,))
    models.save_pretrained(model, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:300])
    job = kills.jobs(tmp_path / "model", text)["prefill"]
    kills.killed_and_gone_on(job, 1, tmp_path, random.Random(1))
