"""Questions of your own about texts of your own, a JSON object a line.

A line has `question`, `answer` (one, or a list of which any will do) and, if there is
one, `context`; other keys are left alone.
"""

import difflib
import json
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvjax.evaluation.tasks import chat
from kvjax.interface import Tokenizer
from kvjax.text import encoding


class Question(NamedTuple):
    """A line of the file."""

    where: str  # file and line, for messages
    text: str  # the context, an empty line, the question
    answers: tuple[str, ...]
    context: str = ""  # with which the text begins


class Own(NamedTuple):
    """A question as a prompt, and every answer that is right."""

    text: str
    prompt: list[int]  # the text as tokens
    answer: str  # the first of `answers`
    answers: tuple[str, ...]
    answer_tokens: int  # most tokens of a reply
    is_chat: bool
    asked_at: int = 0  # tokens of the prompt before the question; 0 without a context

    def score(self, generated: str) -> float:
        """1 if an answer stands in the reply as words of its own, else 0.

        Capitals and the kinds of blanks do not matter; of a longer number a part is
        not the answer. A reply is the first line that
        is not empty; in a chat it is the whole turn.
        """
        reply = generated if self.is_chat else generated.strip().partition("\n")[0]
        return float(any(_says(reply, answer) for answer in self.answers))


# Scripts whose words have no blank between them, or join what follows: Thai to Burmese,
# Khmer, kana, Han, Hangul.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u9fff\uac00-\ud7ff"
    r"\uf900-\ufaff\U00020000-\U0003ffff"
)
_OF_WORD = rf"[^\W{_UNSPACED}]"
# A sign behind a word is a hyphen: 10-12.
_SIGNED = r"(?<!\W[-\u2212])(?<!\A[-\u2212])"


def _says(reply: str, answer: str) -> bool:
    answer = _plain(answer)
    before, after = rf"(?<!{_OF_WORD})", rf"(?!{_OF_WORD})"
    if re.match(r"\W?\d", answer):
        before += rf"(?<!\d[.,:]){_SIGNED}"
    if re.search(r"\d\Z", answer):
        after += r"(?![.,:]\d)"
    return re.search(before + re.escape(answer) + after, _plain(reply)) is not None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.casefold().split()))


def parse(text: str, name: str) -> list[Question]:
    """The questions of a file in JSONL; empty lines do not count.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ValueError: naming the line, if one is no JSON object or lacks something; and
            if there is none.
    """
    questions = []
    # Not `splitlines`: what separates lines elsewhere may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                questions.append(_question(f"{name}, line {number}", line))
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
    if not questions:
        raise ValueError(f"{name} has no line: give one JSON object a question.")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"is no JSON: {reason}.") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"is a {type(record).__name__}, and must be an object with the keys "
            "context, question and answer."
        )
    context = _context(record)
    question = _checked("question", record.get("question"), record)
    answers = record.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    answers = tuple(_checked("answer", x, record) for x in answers or [None])
    # A blank at the end may be one token with what follows: it is the reply's.
    question = question.rstrip(" ")
    text = f"{context}\n\n{question}" if context else question
    return Question(where, text, answers, context)


def _context(given: Mapping[str, Any]) -> str:
    if given.get("context") == "":
        return ""
    if "context" in given:
        return _checked("context", given["context"], given)
    if close := difflib.get_close_matches("context", given, 1, cutoff=0.75):
        raise ValueError(f"has {close[0]!r}: write 'context'.")
    return ""


def _checked(key: str, value: Any, given: Mapping[str, Any]) -> str:
    if key not in given:
        raise ValueError(f"has no {key}, only {', '.join(given) or 'nothing'}.")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{key}={reprlib.repr(given[key])} must be a text that says something."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half of a surrogate pair.") from None
    return value


def prompts(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    context: int,
    new_tokens: int,
    is_chat: bool = False,
) -> list[Own]:
    """The questions as prompts, each with room for a reply.

    Args:
        tokenizer: of the model under test.
        questions: from :func:`parse`.
        context: most tokens of prompt and reply together.
        new_tokens: most tokens of a reply.
        is_chat: a question is the user's turn in the model's chat template.

    Raises:
        ValueError: naming the line, if a prompt does not fit, or an answer does not fit
            in a reply.
    """
    prompts = []
    for question in questions:
        text = question.text
        prompt = encoding.begin(tokenizer.encode, text)
        if is_chat:
            text = chat.turn(tokenizer, question.text)
            prompt = chat.encode(tokenizer, text)
        own = Own(
            text,
            prompt,
            question.answers[0],
            question.answers,
            new_tokens,
            is_chat,
            _asked_at(tokenizer, question, prompt, is_chat),
        )
        shortest = min(len(tokenizer.encode(answer)) for answer in question.answers)
        if len(prompt) + new_tokens > context:
            raise ValueError(
                f"{question.where}: its prompt has {len(prompt)} tokens; with "
                f"{new_tokens=} that exceeds {context=}: raise it, or shorten the line."
            )
        if shortest > new_tokens:
            raise ValueError(
                f"{question.where}: its answer takes {shortest} tokens, more than "
                f"{new_tokens=}: raise it."
            )
        prompts.append(own)
    return prompts


def _asked_at(
    tokenizer: Tokenizer, question: Question, prompt: Sequence[int], is_chat: bool
) -> int:
    """Returns the number of tokens that the prompt shares with its context alone."""
    if not question.context:
        return 0
    alone = encoding.begin(tokenizer.encode, question.context)
    if is_chat:
        alone = chat.encode(tokenizer, chat.turn(tokenizer, question.context))
    return encoding.shared(alone, prompt)


def check_contexts(questions: Sequence[Question]) -> None:
    """Raises ValueError, naming the line, if a question has no context."""
    for question in questions:
        if not question.context:
            raise ValueError(
                f"{question.where}: has no context, and --question after reads that "
                "before the question comes: give it one, or leave --question out."
            )
