"""A search for the cheapest method: what is run, what is chosen, what is refused."""

import json

import numpy as np
import pytest
from tiny import TEXT, ByteTokenizer, tiny_model

import kvjax
from kvjax import accounting, registry
from kvjax.decoding.scoring import score
from kvjax.evaluation import calibrate
from kvjax.evaluation.calibrate import Candidate, run
from kvjax.evaluation.tasks import needles

MODEL = tiny_model(num_layers=1, deviation=0.2)
FULL = kvjax.full()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_divergences_are_those_of_scores_logits():
    """Each prompt alone, in float64, of the tokens behind the first decoded one."""
    method = registry.parse("streaming_llm:budget=12,num_sinks=2")
    data = TEXT.encode()
    prompts = [list(data[:40]), list(data[100:133]), list(data[200:240])]
    expected = []
    for prompt in prompts:
        before = len(prompt) - 6
        p, q = (
            log_softmax(
                score(MODEL, one, [prompt], prefill=before, return_logits=True).logits
            )[0, 1:]
            for one in (FULL, method)
        )
        expected.append((np.exp(p) * (p - q)).sum(-1).mean())
    done = []
    found = calibrate.divergences(
        MODEL, FULL, method, prompts, new_tokens=6, batch=2, progress=done.append
    )
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-3)
    assert min(expected) > 1e-3
    assert done == [2 / 3, 1.0]
    same = calibrate.divergences(MODEL, FULL, FULL, prompts, new_tokens=6, batch=3)
    np.testing.assert_allclose(same, 0, atol=1e-9)


def test_wrong_answers_are_what_scores_lack(monkeypatch):
    examples = needles.passkey(MODEL.tokenizer, TEXT, context=120, n=3)

    def retrieve(model, methods, asked, **options):
        assert (model, methods, asked) == (MODEL, [FULL], examples)
        assert options["batch"] == 3
        assert options["new_tokens"] == max(one.answer_tokens for one in examples)
        return [calibrate.compare_runs.Retrieval([1.0, 0.0, 0.25], [""] * 3)]

    monkeypatch.setattr(calibrate.compare_runs, "retrieve", retrieve)
    found = calibrate.wrong_answers(MODEL, FULL, examples)
    assert found.tolist() == [0.0, 1.0, 0.75]


def family(*costs):
    return [Candidate(f"{cost}", FULL, cost) for cost in costs]


def found_by(families, risks, **options):
    """A search in which a candidate's losses are all its cost's risk."""
    asked = []

    def measure(candidate):
        asked.append(candidate.cost)
        return np.full(options.get("prompts", 200), risks[candidate.cost])

    settings = {"at_most": 0.1, "confidence": 0.9, "full_cost": 100, "prompts": 200}
    return run(families, measure, **(settings | options)), asked


def test_the_cheapest_that_holds_is_chosen():
    risks = {80: 0.0, 40: 0.01, 20: 0.5, 10: 0.0, 70: 0.02, 30: 0.04, 5: 0.9}
    found, asked = found_by(
        [family(20, 80, 10, 40, 300), family(70, 30, 5), family(100)], risks
    )
    assert found.choice == "30"
    assert asked == [80, 40, 20, 70, 30, 5]
    assert [(row.spec, row.outcome) for row in found.rows] == [
        ("300", "no cheaper"),
        ("80", "holds"),
        ("40", "holds"),
        ("20", "fails"),
        ("10", "not tested"),
        ("70", "holds"),
        ("30", "holds"),
        ("5", "fails"),
        ("100", "no cheaper"),
    ]
    assert found.level == pytest.approx(0.05)  # of two families that can be cheaper
    row = found.rows[2]
    assert row.mean == pytest.approx(0.01)
    assert 0.01 < row.upper <= 0.1
    assert found.rows[0].mean is None


def test_nothing_is_chosen_where_nothing_holds():
    found, asked = found_by([family(50, 20)], {50: 0.3, 20: 0.0})
    assert found.choice is None
    assert asked == [50]
    assert found.rows[0].upper > 0.1


def test_what_cannot_be_found_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no method costs less than full attention"):
        found_by([family(100, 200)], {})
    message = (
        "9 prompts cannot bound a loss by 0.1 of its range with confidence=0.9 and "
        "families=2 of methods, even if none loses anything: give at least 3"
    )
    with pytest.raises(ValueError, match=message):
        found_by([family(50), family(20)], {}, prompts=9)


def test_costs_are_the_accountings():
    method, decoder = registry.parse("snapkv:budget=40"), MODEL.decoder
    read = calibrate.cost(method, decoder, 128, 8, "read")
    held = calibrate.cost(method, decoder, 128, 8, "held")
    assert read == accounting.bytes_read(method, decoder, 128, 8)
    assert held == accounting.bytes_held(method, decoder, 128, 8)
    with pytest.raises(ValueError, match="by='kept' must be read or held"):
        calibrate.cost(method, decoder, 128, 8, "kept")


def test_prompts_are_lines():
    lines = [
        {"prompt": "a prompt of its own"},
        {"context": "A text.", "question": "And a question?"},
        {"question": "A question alone?", "answer": "yes"},
    ]
    text = "\n\n".join(map(json.dumps, lines))
    found = calibrate.prompts_of_lines(MODEL, text, "mine.jsonl", new_tokens=4)
    assert [bytes(prompt).decode() for prompt in found] == [
        "a prompt of its own",
        "A text.\n\nAnd a question?",
        "A question alone?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine has no line"),
        ('\n{"prompt": "long enough"}\n{', "mine, line 3: is no JSON"),
        ("[1]", "mine, line 1: must be an object with a text `prompt`"),
        ('{"prompt": " "}', "mine, line 1: prompt=' ' must be a text that says"),
        ('{"question": 3}', "mine, line 1: question=3 must be a text that says"),
        ('{"question": "x", "context": 3}', "mine, line 1: context=3 must be a text"),
        ('{"context": "x"}', "mine, line 1: must be an object with a text"),
        ('{"prompt": "abcd"}', "prompt has 4 tokens, of which the last new_tokens=4"),
        (json.dumps({"prompt": "x" * 5000}), "5000 tokens, more than the model's con"),
        ('{"prompt": "half \\ud800 of it"}', "half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_prompts(text, message):
    with pytest.raises(ValueError, match=message):
        calibrate.prompts_of_lines(MODEL, text, "mine", new_tokens=4)


def test_windows_of_a_text_are_disjoint():
    tokenizer = ByteTokenizer()
    found = calibrate.windows_of(tokenizer, TEXT, context=100, n=None, most=5)
    assert len(found) == 5
    assert len({bytes(window) for window in found}) == 5
    every = calibrate.windows_of(tokenizer, TEXT, context=100, n=None, most=999)
    assert len(every) == len(TEXT) // 100
    with pytest.raises(ValueError, match="n=99 windows"):
        calibrate.windows_of(tokenizer, TEXT, context=100, n=99, most=5)
