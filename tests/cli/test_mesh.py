"""`--mesh`: the same text over devices, mistakes in a line, and a device's plan."""

import json

import pytest

from kvjax import cli


def test_a_text_is_that_of_one_device(run, checkpoint):
    given = "generate", "--model", checkpoint, "--prompt", "abcdef"
    given += "--max-new-tokens", 6, "--method", "h2o:budget=4"
    assert run(*given, "--mesh", "tensor=2") == run(*given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --prompt x --mesh heads=2", "mesh='heads=2' must name axes and"),
        ("generate --prompt x --mesh tensor=8", "needs 8 devices, and there are 4 of"),
        (
            "generate --prompt x --mesh tensor=3",
            "tensor=3 does not share out 2 KV",
        ),
        ("generate --prompt x --mesh data=2", "data=2 shares rows out, and there is 1"),
        ("score --text README.md --mesh seq=2", "seq=2 would split a cache by its"),
        ("generate --resume x --mesh tensor=2", "--mesh tensor=2 splits a cache over"),
        ("compare --mesh tensor=2", "No such option"),
        ("plan --train toy --mesh tensor=2", "--mesh has no meaning beside --train"),
    ],
)
def test_mistakes_are_a_line(capsys, arguments, message):
    assert cli.run(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_plan_is_of_each_device(run):
    """By hand: of 4 rows 2, of 2 KV heads 1; two sums of hidden states a layer."""
    given = "plan", "--context", 512, "--batch", 4, "--method", "full", "--method"
    given = *given, "tova:budget=64", "--device", "H100", "--json"
    one = json.loads(run(*given))
    two = json.loads(run(*given, "--mesh", "data=2,tensor=2"))
    (whole, _), (own, tova) = one["rows"], two["rows"]
    lengths = 4 * 4  # of four layers, int32
    held = own["decode_state"] - 2 * lengths
    assert 4 * held == whole["decode_state"] - 4 * lengths
    assert 4 * own["read_per_step"]["kv"] == whole["read_per_step"]["kv"]
    assert one["weights"] / 2 < two["weights"] < 0.52 * one["weights"]
    assert whole["sent_per_step"] == 0
    # Float32: nine sums, logits, hidden states of all rows; half of each is sent.
    sums, logits = 2 * 9 * 2 * 128 * 4, 4 * 2806 * 4
    assert own["sent_per_step"] == (sums + logits + 4 * 128 * 4) // 2
    # What tova tells beside: a weight of each token, of two rows in four layers.
    assert tova["sent_per_step"] - own["sent_per_step"] == 4 * 2 * 64 * 4
