"""What is planned is what is allocated, and what is read what the methods say."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import sys
import types

import jax
import pytest
from tiny import SMALL, tiny_model

import models
from kvjax import accounting, cli, registry
from kvjax.cost import planning
from kvjax.decoding.reader import empty_states
from kvjax.stores.buffers import num_bytes
from models.llama import LlamaDecoder

CONFIG = pathlib.Path(__file__).parents[2] / "docs/configs/llama-3.1-8b.json"
EIGHT_B = models.load_decoder(CONFIG)
WEIGHTS = planning.Weights(100, 60)
MLP_WIDTH = 14336


@pytest.mark.parametrize("spec", ["full", "snapkv", "dense_layers:first=1+h2o"])
def test_states_are_those_that_are_allocated(spec):
    decoder = tiny_model().decoder
    method = registry.parse(spec, **SMALL)
    options = {"weights": WEIGHTS, "mlp_width": MLP_WIDTH, "context": 90}
    plan = planning.plan(decoder, method, new_tokens=20, batch=3, **options)
    states = list(jax.jit(lambda: empty_states(decoder, method, 3, 70, 20))())
    assert plan.prompt_state == num_bytes(states)
    held, end = [], jax.jit(method.finish)
    for layer, state in enumerate(states):
        states[layer] = end(state)
        held.append(num_bytes(states) + num_bytes(state))
    assert plan.decode_state == num_bytes(states)
    if spec != "full":  # whose buffers are passed on
        assert plan.ending_state == max(held)
        assert plan.ending_state > plan.prompt_state > plan.decode_state
    else:
        assert plan.ending_state == plan.prompt_state == plan.decode_state
    read = accounting.traffic(method, decoder, 90, 20)
    assert (plan.kv, plan.metadata) == (3 * read.kv, 3 * read.metadata)
    assert plan.step_bytes == 60 + 3 * read.total
    device = planning.Device(plan.peak, 10 * plan.step_bytes)
    assert planning.tokens_per_second(plan, device) == pytest.approx(30)
    assert planning.fits(plan, device, margin=0.0)
    assert not planning.fits(plan, device._replace(memory=plan.peak - 1), margin=0.0)
    # A tenth of the memory stays free, unless something else is said.
    assert not planning.fits(plan, device)
    roomy = device._replace(memory=-(-10 * plan.peak // 9))
    assert planning.fits(plan, roomy)
    assert not planning.fits(plan, roomy._replace(memory=roomy.memory - 2))
    assert not planning.fits(plan, roomy, margin=0.2)


@pytest.mark.parametrize("memory", ["pinned_host", "device"])
def test_what_lies_in_the_hosts_memory_is_not_the_devices(memory):
    """Told from types, by hand: two layers of pages, one of them whole at the end."""
    decoder = tiny_model(num_layers=2).decoder
    spec = f"offload:cache=8,memory={memory}+quest:budget=16,page_size=8"
    method = registry.parse(spec)
    options = {"weights": WEIGHTS, "mlp_width": MLP_WIDTH, "context": 512}
    plan = planning.plan(decoder, method, new_tokens=32, batch=3, **options)
    states = jax.eval_shape(lambda: empty_states(decoder, method, 3, 480, 32))
    ended = [jax.eval_shape(method.finish, state) for state in states]
    pages = 3 * 2 * 512 * 2 * 8 * 4
    hosted = 2 * pages * (memory == "pinned_host")
    assert plan.host == hosted
    assert plan.prompt_state == num_bytes(states) - hosted
    assert plan.decode_state == num_bytes(ended) - hosted
    # A layer is copied where it is on the device; from afar it comes in blocks.
    there = planning.plan(
        *(decoder, registry.parse(spec.partition("+")[2])),
        **({"new_tokens": 32, "batch": 3} | options),
    )
    saved = there.prompt_temporaries - plan.prompt_temporaries
    assert saved == 2 * pages * (memory == "pinned_host")
    last = num_bytes(ended) - hosted + num_bytes(states[1])
    assert plan.ending_state == last
    assert plan.kv == 2 * 3 * 2 * 16 * 2 * 8 * 4
    is_far = memory == "pinned_host"
    assert plan.link == plan.kv * is_far
    # All of them, before the step's own bytes.
    device = planning.Device(plan.peak, 10 * plan.step_bytes)
    rate = planning.tokens_per_second(plan, device, 2.5 * plan.kv)
    assert rate == pytest.approx(3 / (0.1 + 0.4 * is_far))


def test_the_peak_is_the_worst_moment():
    plan = planning.Plan(WEIGHTS, 10, 12, 5, 3, 4, 0, 0, 1)
    assert (plan.prompt_bytes, plan.decode_bytes, plan.peak) == (113, 109, 113)
    assert plan._replace(ending_state=14).peak == 114
    assert plan._replace(decode_temporaries=20).peak == 125


def test_eight_billion_parameters_at_128k():
    """By hand, and the temporaries by what was compiled for NOTES."""
    held = 8_030_261_248 * 2
    weights = planning.Weights(*models.footprint(EIGHT_B)[:2])
    assert weights == (held, held - 128_256 * 4096 * 2)
    plan = planning.plan(
        EIGHT_B,
        registry.parse("full"),
        weights=weights,
        mlp_width=models.footprint(EIGHT_B).mlp_width,
        context=131_072,
    )
    cache = 2 * 32 * 8 * 131_072 * 128 * 2
    assert plan.prompt_state == cache + 32 * 4  # and the lengths
    assert plan.kv == cache
    assert plan.metadata == 0
    rate = planning.tokens_per_second(plan, planning.DEVICES["H100"])
    assert rate == pytest.approx(3350e9 / (held - 128_256 * 4096 * 2 + cache))
    # 33.6 MB and 626 to 1,164 MB: two layers' logits, a layer's cache up to twice.
    assert 33.5e6 < plan.decode_temporaries < 35e6
    assert 1.0e9 < plan.prompt_temporaries < 1.2e9


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tied):
    config = dataclasses.replace(
        tiny_model().decoder.config, num_layers=3, tied_embeddings=tied, qkv_bias=True
    )
    decoder = LlamaDecoder(config)
    params = jax.eval_shape(decoder.init)
    weights = models.footprint(decoder)
    assert weights.held == num_bytes(params)
    unread = 0 if tied else num_bytes(params["embedding"])
    assert weights.read == weights.held - unread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 90, "new_tokens": 90}, r"new_tokens=90 must be in \[1, context="),
        ({"context": 90, "batch": 0}, "batch=0 must be at least 1"),
        ({"context": 90, "chunk_size": 0}, "chunk_size=0 must be at least 1"),
    ],
)
def test_sizes_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        planning.plan(
            EIGHT_B,
            registry.parse("full"),
            weights=WEIGHTS,
            mlp_width=MLP_WIDTH,
            **options,
        )


def test_a_config_is_enough(tmp_path):
    assert EIGHT_B.config.num_layers == 32
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    assert models.load_decoder(tmp_path, dtype="float32").config == dataclasses.replace(
        EIGHT_B.config, dtype="float32"
    )
    embedded = models.load("embedded-softmax")
    assert models.load_decoder("embedded-softmax") == embedded.decoder
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load_decoder(tmp_path.parent)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
        models.load_decoder(tmp_path)


def test_of_a_model_on_the_hub_the_config_alone_is_fetched(tmp_path, monkeypatch):
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        assert (repo_id, revision) == ("meta-llama/Llama-3.1-8B", "main")
        assert allow_patterns == ["config.json"]
        (tmp_path / "config.json").write_text(CONFIG.read_text())
        return str(tmp_path)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert models.load_decoder("meta-llama/Llama-3.1-8B@main") == EIGHT_B


PLAN = ["plan", "--model", CONFIG, "--new-tokens", "64", "--context", "65536"]


def plan(capsys, *options):
    code = cli.run([str(option) for option in (*PLAN, *options)])
    return code, capsys.readouterr()


def test_the_table_has_what_the_document_has(capsys):
    options = ["--method", "full", "--method", "streaming_llm", "--budget", "512,2048"]
    options += ["--device", "L4", "--device", "v6e-1"]
    code, printed = plan(capsys, *options, "--json")
    document = json.loads(printed.out)
    assert code == 0
    specs = ["full", "streaming_llm:budget=512", "streaming_llm:budget=2048"]
    assert [row["method"] for row in document["rows"]] == specs
    full, small, _ = document["rows"]
    assert [full["devices"][d]["fits"] for d in ("L4", "v6e-1")] == [False, True]
    assert small["devices"]["L4"]["fits"]
    weights = document["weights"]
    state = full["prompt_state"] + full["prompt_temporaries_estimate"]
    assert full["peak"] == weights + state
    assert full["read_per_step"]["weights"] == document["weights_read"] < weights
    code, printed = plan(capsys, *options)
    lines = printed.out.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["full"]]
    rate = full["devices"]["v6e-1"]["most_tokens_per_second"]
    gigabytes = [
        full["prompt_state"],
        full["decode_state"],
        full["prompt_temporaries_estimate"],
        full["peak"],
        sum(full["read_per_step"].values()),
    ]
    assert line.split() == [
        "full",
        *(f"{count / 1e9:.2f}" for count in gigabytes),
        "-",
        f"{rate:.0f}",
    ]
    assert "L4: 2 of 3 fit; the least bytes a step has streaming_llm:budget=512." in (
        printed.out
    )
    code, printed = plan(capsys, "--method", "full", "--device", "T4")
    assert "T4: none fits; full comes nearest, 10.85 GB" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "v9"], "unknown device='v9': choose one of T4, L4, v5e-1, v6e-1"),
        (["--device", "mine:48"], "device='mine:48' must read name:GB:GB/s, as mine:"),
        (["--device", "mine:48:fast"], "device='mine:48:fast' must read name:GB:GB/s"),
        (["--device", ":48:900"], "device=':48:900' must read name:GB:GB/s"),
        (["--device", "mine:0:900"], "must read name:GB:GB/s, as mine:48:864, both ab"),
        (["--device", "mine:inf:nan"], "must read name:GB:GB/s, as mine:48:864, both"),
        (
            ["--device", "mine:48:864", "--device", "mine:24:864"],
            "device='mine:24:864': mine is given with other sizes too",
        ),
        (["--margin", "1"], "margin=1.0 must be in [0, 1), a share of the memory"),
        (["--margin", "-0.1"], "margin=-0.1 must be in [0, 1)"),
        (["--budget", "1k"], "--budget 1k must be whole numbers with commas"),
        (["--budget", "0"], "budget=0 must be at least 1"),
        (["--budget", "20", "--method", "quest"], "error: quest: budget=20 must be"),
        (["--new-tokens", "65536"], "must be in [1, context=65536)"),
        (["--model", "no/where/at"], "no/where/at is no directory"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, options, message):
    code, printed = plan(capsys, *options)
    assert (code, printed.out) == (2, "")
    assert message in printed.err


def test_beyond_the_context_of_the_model(capsys):
    options = ["--context", "262144", "--method", "streaming_llm"]
    code, printed = plan(capsys, *options, "--device", "H100")
    assert code == 0
    assert "The model was made for 131,072 tokens: only methods of con" in printed.out


def test_devices_are_those_of_the_vendors_or_of_the_user(capsys):
    sizes = {"L4": (24e9, 300e9), "H200": (141e9, 4800e9)}
    sizes |= {"v4": (32 * 2**30, 1200e9), "v5p": (95e9, 2765e9)}
    for name, (memory, bandwidth) in sizes.items():
        assert planning.device(name) == (name, (memory, bandwidth))
    options = ["--method", "full", "--device", "mine:48.5:864", "--margin", "0.5"]
    code, printed = plan(capsys, *options, "--json")
    document = json.loads(printed.out)
    assert code == 0
    assert document["devices"] == {
        "mine": {"memory": 48_500_000_000, "bandwidth": 864_000_000_000}
    }
    assert document["margin"] == 0.5
    (row,) = document["rows"]
    assert 24.25e9 < row["peak"] < 48.5e9
    assert not row["devices"]["mine"]["fits"]
    code, printed = plan(capsys, *options)
    said = " ".join(printed.out.split())
    assert "where the peak does not leave 50% of the memory free" in said
    over = row["peak"] - 24.25e9
    assert f"mine: none fits; full comes nearest, {over / 1e9:.2f} GB too much." in said


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_packed_weights_count_their_scales(capsys, weights, bits):
    options = ["--model", str(CONFIG), "--method", "full", "--weights", weights]
    code, printed = plan(capsys, *options, "--json")
    assert code == 0
    found = json.loads(printed.out)
    # Llama 3.1 8B: two bfloat16 a group of 32 beside the integers of its matrices.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    matrices = 32 * layer + 4096 * 128256
    embedding, norms = 2 * 4096 * 128256, 2 * (2 * 32 + 1) * 4096
    packed = matrices * bits // 8 + matrices // 32 * 4
    assert found["weights_read"] == packed + norms
    assert found["weights"] == packed + norms + embedding
    assert found["weights_dtype"] == weights
    code, printed = plan(capsys, *options)
    assert f"({weights}, the rest bfloat16)" in printed.out


DOCS = pathlib.Path(__file__).parents[2] / "docs"
# The pages with plans, and how many each has.
PAGES = {DOCS / "eight_billion.md": 5, DOCS / "parallel.md": 1}


def shown(page: pathlib.Path) -> list[tuple[str, str]]:
    """The plans of a page, each with what it is said to print."""
    blocks = re.findall(
        r"```sh\n(kvjax plan .*?)\n```\n\n```text\n(.*?)```\n",
        page.read_text("utf-8"),
        re.DOTALL,
    )
    assert len(blocks) == PAGES[page]
    return blocks


def printed_by(command: str, print_to) -> str:
    """`python tests/cost/test_planning.py` puts it into its page."""
    _, *arguments = command.split()
    arguments = [str(CONFIG) if "/" in word else word for word in arguments]
    assert cli.run(arguments) == 0
    lines = [line.rstrip() for line in print_to().splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_is_printed(page, capsys):
    for command, said in shown(page):
        assert printed_by(command, lambda: capsys.readouterr().out) == said


if __name__ == "__main__":
    for place in PAGES:
        page = place.read_text("utf-8")
        for command, said in shown(place):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                new = printed_by(command, out.getvalue)
            begin = f"```sh\n{command}\n```\n\n```text\n"
            page = page.replace(begin + said, begin + new)
        place.write_text(page, "utf-8")


def test_a_prompt_that_is_read_in_part_says_so(capsys):
    """And its chunks are as long as what must come whole."""
    decoder = tiny_model(num_layers=2).decoder
    spec = "critiprefill:segment=64,block=16,budget=64,dense_tokens=64+full"
    method = registry.parse(spec)
    options = {"weights": WEIGHTS, "mlp_width": MLP_WIDTH, "context": 512}
    found = planning.plan(decoder, method, new_tokens=32, chunk_size=16, **options)
    # Segments at 64 to 384 leave out what is before them, but for 64 tokens; the last
    # one, at 448, is cut.
    every = 480 * 481 // 2
    pairs = 2 * every - 64 * (64 + 128 + 192 + 256 + 320)
    assert found.prompt_share == pairs / (2 * every)
    same = planning.plan(decoder, method, new_tokens=32, chunk_size=64, **options)
    assert found.prompt_temporaries == same.prompt_temporaries
    command = ["plan", "--model", str(CONFIG), "--context", "512", "--device", "v5e-1"]
    assert cli.run([*command, "--method", spec, "--method", "full"]) == 0
    printed = capsys.readouterr().out
    assert "pairs" in printed
    assert "of the query-key pairs of a prompt" in " ".join(printed.split())
    assert cli.run([*command, "--method", "full"]) == 0
    assert "pairs" not in capsys.readouterr().out
