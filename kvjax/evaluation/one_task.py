"""One task under one method: what `kvjax eval` runs, as plain numbers."""

from collections.abc import Callable, Sequence
from typing import Any

from kvjax import accounting
from kvjax.attention.choices import check_choice
from kvjax.decoding.checks import check_counts, check_model, check_seed
from kvjax.evaluation import (
    answers,
    by_task,
    compare_inputs,
    compare_rows,
    compare_runs,
    continuations,
    fidelity,
    statistics,
    teacher_forced,
)
from kvjax.evaluation.asked_after import When
from kvjax.evaluation.tasks import (
    chain,
    chat,
    extraction,
    interchange,
    long_output,
    needles,
    own,
    ruler,
)
from kvjax.evaluation.tasks.haystack import Prompted
from kvjax.evaluation.tasks.own import Question
from kvjax.evaluation.tasks.ruler.fitting import Matched
from kvjax.evaluation.tasks.ruler.texts import Texts
from kvjax.interface import LanguageModel, Method

RETRIEVAL = {
    "passkey": needles.passkey,
    "multikey": needles.multikey,
    "variables": needles.variable_tracking,
    "chain": chain.chain_of_key,
    "extraction": extraction.extraction,
    "countdown": long_output.countdown,
    "path_traversal": long_output.path_traversal,
}
PREDICTION = ("perplexity", "fidelity")
RULER = "ruler"  # all of its tasks
MATCHED = (RULER, *ruler.TASKS)
TASKS = (*RETRIEVAL, *MATCHED, *PREDICTION)
OWN = "own"  # the user's questions


def check_task(task: str) -> None:
    """Raises ValueError unless the task exists."""
    if task not in TASKS:
        raise ValueError(f"unknown {task=}: choose one of {', '.join(TASKS)}.")


def check_question(
    task: str, question: str, questions: Sequence[Question] = ()
) -> None:
    """Raises ValueError unless the task's questions can come then.

    Args:
        question: `seen` or `after`, see :func:`run`.
        questions: of the task `own`.
    """
    check_choice("question", question, When)
    if question == "seen":
        return
    if task in PREDICTION:
        raise ValueError(f"--task {task} asks nothing: leave --question out.")
    own.check_contexts(questions)


def run(
    task: str,
    model: LanguageModel,
    method: Method,
    reference: Method,
    text: str,
    *,
    context: int = 1024,
    n: int = 20,
    seed: int = 0,
    new_tokens: int = 64,
    batch: int = 8,
    chunk_size: int = 1024,
    questions: Sequence[Question] = (),
    rows: Sequence[interchange.Row] = (),
    source: Texts | None = None,
    is_chat: bool = False,
    question: str = "seen",
    on_answer: Callable[[int, Prompted, str], None] = answers.ignore,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Runs a task and returns its numbers, ready for JSON.

    Args:
        task: `passkey`, `multikey`, `variables`, `chain` and `extraction` ask for
            something said earlier, and so do RULER's (`ruler` is all of them);
            `countdown` and `path_traversal` for many steps; `perplexity` predicts the
            text by decode steps, `fidelity` compares with the reference; `own` asks
            the questions.
        model: decoder, weights and tokenizer.
        method: under test.
        reference: what `fidelity` compares with; other tasks do not run it.
        text: what the inputs are made of.
        context: tokens of an input, what follows the prompt included; more than the
            model's context only under methods that read texts of any length.
        n: examples, or windows of text.
        seed: of the inputs.
        new_tokens: tokens fed through the decode path, and most of a reply to a
            question (not for other retrieval).
        batch: rows decoded together.
        chunk_size: most prompt tokens processed at once; a second reading takes the
            method's own `chunk`.
        questions: of the task `own`, from :mod:`kvjax.evaluation.tasks.own`.
        rows: of a task in a file, from :mod:`kvjax.evaluation.tasks.interchange`;
            `task` is then any name.
        source: texts of RULER's tasks; those that ship if None.
        is_chat: prompts are turns in the model's chat template (not of windows).
        question: `seen` when a method chooses what to keep, as the prompt's end, or
            asked `after` the context alone was read (not of windows).
        on_answer: called with an example's number, the example and what was answered.
        progress: called with the fraction that is done.

    Raises:
        ValueError: if the task is unknown, or the sizes do not fit model or text.
    """
    if not rows and (task != OWN or not questions):
        check_task(task)
    check_model(model, on_one_device="an evaluation")
    check_counts(context=context, n=n, batch=batch, chunk_size=chunk_size)
    check_counts(new_tokens=new_tokens)
    check_seed(seed)
    readers = (method, reference) if task == "fidelity" else (method,)
    if not all(accounting.reads_any_length(x, model.decoder) for x in readers):
        compare_inputs.check_context(model, context)
    check_question(task, question, questions)
    accounting.check_diagnostics(method, model.decoder)
    shapes: dict[str, Any] = {
        "batch": min(batch, len(rows) or len(questions) or n),
        "chunk_size": chunk_size,
    }
    asked = shapes | {"question": question}
    if task == OWN:
        examples = own.prompts(
            model.tokenizer,
            questions,
            context=context,
            new_tokens=new_tokens,
            is_chat=is_chat,
        )
        return _retrieval(model, method, examples, asked, on_answer, progress)
    if rows or task in MATCHED:
        examples = matched(
            task,
            model,
            context=context,
            n=n,
            seed=seed,
            rows=rows,
            source=source,
            is_chat=is_chat,
        )
        numbers = by_task.run(model, method, examples, asked, on_answer, progress)
        return {"question": question, **numbers}
    if task in RETRIEVAL:
        examples = chat.fitted(
            model.tokenizer,
            lambda context: RETRIEVAL[task](
                model.tokenizer, text, context=context, n=n, seed=seed
            ),
            context,
            is_chat=is_chat,
        )
        return _retrieval(model, method, examples, asked, on_answer, progress)
    if not 2 <= new_tokens < context:
        raise ValueError(f"{new_tokens=} must be in [2, {context=}).")
    windows = needles.windows(model.tokenizer, text, context=context, n=n, seed=seed)
    shapes["new_tokens"] = new_tokens
    if task == "perplexity":
        return _perplexity(model, method, windows, shapes, progress)
    return _fidelity(model, method, reference, windows, shapes, progress)


def matched(
    task: str,
    model: LanguageModel,
    *,
    context: int,
    n: int,
    seed: int,
    rows: Sequence[interchange.Row] = (),
    source: Texts | None = None,
    is_chat: bool = False,
) -> list[Matched]:
    """Returns examples that are scored by string match: RULER's, or those of a file.

    Arguments as :func:`run`; `n` is of each of RULER's tasks.

    Raises:
        ValueError: if the context is too short for one.
    """
    if rows:
        return interchange.examples(
            model.tokenizer, rows, context=context, is_chat=is_chat
        )
    sizes = {"context": context, "n": n, "seed": seed, "source": source}
    return [
        example
        for name in (ruler.TASKS if task == RULER else (task,))
        for example in ruler.examples(name, model.tokenizer, is_chat=is_chat, **sizes)
    ]


def _retrieval(model, method, examples, asked, on_answer, progress) -> dict[str, Any]:
    numbers = _asked(model, method, examples, asked, on_answer, progress)
    return {"question": asked["question"], **numbers}


def _asked(model, method, examples, asked, on_answer, progress) -> dict[str, Any]:
    longest = max(example.answer_tokens for example in examples)

    def answered(place: int, first: int, said: Sequence[str]) -> None:
        del place  # there is one method
        for index, answer in enumerate(said, first):
            on_answer(index, examples[index], answer)

    (replies,) = compare_runs.retrieve(
        model,
        [method],
        examples,
        new_tokens=longest,
        on_answers=answered,
        progress=progress,
        **asked,
    )
    found = zip(examples, replies.answers, replies.scores, strict=True)
    listed = [
        {
            "prompt_tokens": len(example.prompt),
            "expected": example.answer,
            "answer": answer,
            "score": score,
        }
        for example, answer, score in found
    ]
    if isinstance(examples[0], chain.Chain):
        for entry, example in zip(listed, examples, strict=True):
            entry["keys"] = len(example.keys)
        interval = statistics.share_interval(replies.scores)
        sizes = {"links": examples[0].links}
        return {"valid_prefix": interval._asdict(), **sizes, "examples": listed}
    if isinstance(examples[0], extraction.Extraction):
        interval = statistics.share_interval(replies.scores)
        sizes = {"rows": len(examples[0].rows)}
        return {"f1": interval._asdict(), **sizes, "examples": listed}
    if isinstance(examples[0], long_output.Steps):
        for entry, example in zip(listed, examples, strict=True):
            entry["steps"] = len(example.steps)
        interval = statistics.share_interval(replies.scores)
        return {"valid_steps": interval._asdict(), "examples": listed}
    for entry in listed:
        entry["correct"] = entry.pop("score") == 1
    accuracy = statistics.proportion(replies.scores)._asdict()
    if isinstance(examples[0], own.Own):
        return {"accuracy": accuracy, "examples": listed}
    for entry, example in zip(listed, examples, strict=True):
        entry["depth"] = example.depth
    return {
        "accuracy": accuracy,
        "by_depth": [
            {"depth": depth, "correct": correct, "asked": asked}
            for depth, correct, asked in compare_rows.by_depth(examples, replies.scores)
        ],
        "examples": listed,
    }


def _perplexity(model, method, windows, shapes, progress) -> dict[str, Any]:
    predicted = continuations.predict(
        model, method, windows, progress=progress, **shapes
    )
    means = predicted.log_probs.mean(1)
    decoded = predicted.log_probs.shape[1]
    firsts = [len(window) - decoded for window in windows]
    rows = list(predicted.log_probs)
    bits = teacher_forced.bits_interval(model.tokenizer, windows, firsts, rows)
    return {
        "perplexity": statistics.perplexity(means)._asdict(),
        "log_prob": statistics.log_prob(means)._asdict(),
        "bits_per_byte": bits._asdict(),
        "tokens_per_window": int(decoded),
    }


def _fidelity(model, method, reference, windows, shapes, progress) -> dict[str, Any]:
    expected = continuations.predict(model, reference, windows, **shapes)
    progress(1 / 3)
    predicted = continuations.predict(model, method, windows, **shapes)
    progress(2 / 3)
    agreement = fidelity.agreement(expected.logits, predicted.logits)
    layers = continuations.layer_fidelity(model, reference, method, windows, **shapes)
    progress(1.0)
    lost = expected.log_probs.mean(1), predicted.log_probs.mean(1)
    per_head = {
        name: getattr(layers, name) for name in ("error", "dropped", "support", "exact")
    }
    per_head["refreshed"] = layers.refreshed[:, :, None]
    return {
        "top1_agreement": statistics.share_interval(agreement.top1.mean(1))._asdict(),
        "kl": statistics.amount_interval(agreement.kl.mean(1))._asdict(),
        "nats_lost": statistics.paired_difference(*lost)._asdict(),
        "layers": [
            {"layer": layer}
            | {
                name: compare_rows.OF_LAYERS[name](x[layer].mean(-1))._asdict()
                for name, x in per_head.items()
            }
            for layer in range(len(layers.error))
        ],
    }
