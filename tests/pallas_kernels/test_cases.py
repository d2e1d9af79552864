"""Every problem that kernels are compiled for is one that its operation takes."""

import jax
import jax.numpy as jnp
import pytest
from aot.cases import PROBLEMS

from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.page_attention import cases as page_cases
from pallas_kernels.page_entmax import cases as entmax_cases
from pallas_kernels.page_scores import cases as score_cases
from pallas_kernels.shared import cases
from pallas_kernels.topk import cases as topk_cases


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_operation_takes_it(name):
    function, arguments = PROBLEMS[name]
    results = jax.tree.leaves(jax.eval_shape(function, *arguments))
    q = arguments[0]
    assert all(x.shape[0] == q.shape[0] for x in results)
    assert {x.dtype for x in results} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_names_are_of_one_problem_each():
    assert len({str(case) for case in PROBLEMS.values()}) == len(PROBLEMS)


def test_bytes_are_those_that_must_be_read():
    _, k, v, *_ = decode_cases.arguments(1024)
    assert decode_cases.num_bytes(k, v) == 2 * 8 * 1024 * 128 * 2
    _, pages, ids, *_ = page_cases.arguments(1024, 64, tokens=256)
    quarter = page_cases.num_bytes(pages, ids)
    assert quarter == decode_cases.num_bytes(k, v) // 4
    assert entmax_cases.num_bytes(pages, ids) == quarter
    _, low, high = score_cases.arguments(16)
    assert score_cases.num_bytes(low, high) == decode_cases.num_bytes(k, v) // 64
    (scores,) = topk_cases.arguments(16)
    assert topk_cases.num_bytes(scores) == cases.bytes_of(scores) == 8 * 16 * 4
