"""What a `generation_config.json` asks for."""

import pytest

from kvjax.decoding import generation_config
from kvjax.decoding.generation_config import Wanted
from kvjax.decoding.sampling import Sampling


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, {}),
        ({"eos_token_id": [1, 2], "max_length": 4096}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
        ),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_k": 0}),
        ({"top_p": 0.5}, {"temperature": 1.0, "top_k": 50, "top_p": 0.5}),
        # As the transformers library has it: greedy, whatever stands beside it.
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"temperature": None, "top_k": None}, {}),
    ],
)
def test_sampling_is_what_it_names(generation, sampling):
    assert generation_config.read(generation) == Wanted(sampling, ())


def test_where_a_file_is_silent_the_transformers_library_samples_so():
    """Its `generate` fills in what a `generation_config.json` leaves out."""
    transformers = pytest.importorskip("transformers")
    file = transformers.GenerationConfig(do_sample=True)
    filled = transformers.GenerationConfig(do_sample=True)
    filled.update(**file._get_default_generation_params(), defaults_only=True)
    found = generation_config.read(file.to_diff_dict()).sampling
    assert found == {name: getattr(filled, name) for name in found}
    assert found["top_k"] == 50
    kept = Sampling(**found)
    assert (kept.top_p, kept.repetition_penalty) == (filled.top_p, 1.0)
    assert filled.min_p is None


def test_what_is_not_supported_is_named_where_it_would_matter():
    found = generation_config.read(
        {"typical_p": 0.9, "num_beams": 4, "length_penalty": 1.0, "min_length": 0}
    )
    assert found.others == ("typical_p", "num_beams")


@pytest.mark.parametrize("value", ["0.5", True, [0.5], float("nan")])
def test_a_value_that_is_no_number_is_an_error(value):
    with pytest.raises(ValueError, match=r"generation_config\.json has top_p="):
        generation_config.read({"top_p": value})
