"""A model of the lm-evaluation-harness: a language model of ours under a method."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.decoding.checks import check_counts, check_model, check_seed
from kvjax.decoding.sampling import Sampling
from kvjax.interface import LanguageModel, Method
from kvjax.lm_eval import requests as answering
from kvjax.lm_eval.requests import Pair, Progress, Wanted, ignore
from kvjax.registry import as_method
from kvjax.text import encoding

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        "the lm-evaluation-harness is not installed: pip install 'kvjax[lm-eval]'."
    ) from error

# Names that tasks have for the most tokens of a reply.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_ONE = ("num_beams", "num_return_sequences", "n")  # others than 1 are not offered


class KvjaxLM(TemplateLM):
    """A language model under a KV-cache method, for `lm_eval.simple_evaluate`.

    Under a method that forgets, what is a prompt decides what is measured. Here the
    context of a request is the prompt, and ends where the request says: `finish` comes
    then. Its continuation goes through decode steps, token by token, as in
    :func:`kvjax.score`: the log-probabilities are those of `score` with `prefill` the
    tokens of the context. Texts of `loglikelihood_rolling` have no context but the
    token that begins a text: all of a window is decoded (but for what an earlier window
    has predicted), and a method that only shrinks prompts forgets nothing there.

    A context that is too long loses its oldest tokens, as in the harness's own models:
    `num_cut` counts them. Contexts that several requests share are read once.

    Args:
        model: decoder, weights and tokenizer.
        method: any :class:`kvjax.Method`, or its spec, as `quest:budget=128`.
        batch_size: rows read and decoded together.
        max_length: most tokens fed for a request; the model's context if left out.
        max_gen_toks: most tokens of a reply, where a task does not say.
        chunk_size: most tokens of a context processed at once.
        seed: of sampled replies.
        progress: called with the fraction of each call's requests that is done.

    Raises:
        ImportError: when it is imported, if the package `lm_eval` is missing.
        ValueError: if an argument is of another type or out of its range.
    """

    def __init__(
        self,
        model: LanguageModel,
        method: Method | str = "full",
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        chunk_size: int = 512,
        seed: int = 0,
        progress: Progress = ignore,
    ):
        super().__init__()
        check_model(model, on_one_device="lm-eval")
        check_counts(
            batch_size=batch_size, max_gen_toks=max_gen_toks, chunk_size=chunk_size
        )
        check_seed(seed)
        context = model.decoder.context
        if max_length is not None:
            check_counts(max_length=max_length)
            if max_length > context:
                raise ValueError(
                    f"{max_length=} exceeds the model's context of {context}: lower it "
                    "or leave it out."
                )
        self.model = model
        self.method = as_method(method)
        self.batch_size = int(batch_size)
        self.max_length = context if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        self.num_cut = 0
        self._options: dict[str, Any] = {
            "batch": self.batch_size,
            "chunk_size": int(chunk_size),
            "progress": progress,
        }
        self._seed = seed

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text.

        Raises:
            ValueError: if the model has none.
        """
        if not self.model.eos_ids:
            raise ValueError(
                "the model has no token that ends a text: give it eos_ids."
            )
        return self.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context begins with: BOS, else EOS."""
        before = encoding.added(self.model.tokenizer.encode).before
        named = getattr(self.model.tokenizer, "bos_id", None)
        if before:
            return before[-1]
        return self.eot_token_id if named is None else named

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others: Any
    ) -> list[int]:
        """Returns the tokens of a text that is gone on with.

        Args:
            string: the text.
            add_special_tokens: False leaves out those that the tokenizer begins a text
                with; a chat template that writes BOS itself gets no second one.
            others: what else models of the harness take; without effect.
        """
        del others
        encode = self.model.tokenizer.encode
        if add_special_tokens is False:
            return encoding.inside(encode, string)
        tokens, before = encoding.begin(encode, string), encoding.added(encode).before
        twice = bool(before) and tuple(tokens[: 2 * len(before)]) == before * 2
        return tokens[len(before) :] if twice else tokens

    def tok_decode(self, tokens: Sequence[int], **others: Any) -> str:
        """Returns the text of tokens."""
        del others
        return self.model.tokenizer.decode(list(tokens))

    def _encode_pair(
        self, context: str, continuation: str
    ) -> tuple[list[int], list[int]]:
        """Returns the tokens of a context, and those of a continuation behind it.

        The context has the tokens that it has alone, so that requests can share it.
        Blanks at its end go to the continuation.
        """
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        encode = self.model.tokenizer.encode
        if not context:
            return [self.prefix_token_id], encoding.inside(encode, continuation)
        following = encoding.following(encode, continuation, after=context)
        return self.tok_encode(context), following

    # --- chats

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, for caches of requests."""
        return self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the chat template that is used; None for no chat.

        Args:
            chat_template: True for the usual one, or a name.

        Raises:
            ValueError: if the tokenizer has no such template.
        """
        if chat_template is False or chat_template is None:
            return None
        name = "default" if chat_template is True else chat_template
        known = getattr(self.model.tokenizer, "chat_templates", {})
        if name not in known:
            raise ValueError(
                f"the tokenizer has no chat template {name!r}, only "
                f"{', '.join(known) or 'none'}: leave the template out."
            )
        self._template = name
        return known[name]

    _template: str | None = None  # of the chat, by name

    def apply_chat_template(
        self,
        chat_history: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns a conversation as text, up to the model's reply.

        Args:
            chat_history: messages, each with `role` and `content`.
            add_generation_prompt: False if the last message is the reply's beginning.
        """
        tokenizer: Any = self.model.tokenizer
        return tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt,
            tokenize=False,
            template=self._template,
            continue_final_message=not add_generation_prompt,
        )

    # --- requests

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns of each request's continuation how likely it is, and if greedy.

        Args:
            requests: instances whose `args` are a context and a continuation.
            disable_tqdm: without effect.
        """
        pairs = [
            (request.args, *self._encode_pair(*request.args)) for request in requests
        ]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], **others: Any
    ) -> list[tuple[float, bool]]:
        """Runs :meth:`loglikelihood` on `(texts, context, continuation)` in tokens."""
        del others
        pairs = [
            Pair(self._cut(context, max(len(following) - 1, 0)), tuple(following))
            for _, context, following in requests
        ]
        found = answering.likelihoods(self.model, self.method, pairs, **self._options)
        return [(log_prob, is_greedy) for log_prob, is_greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each request's text, window by window.

        Args:
            requests: instances whose `args` are a text alone.
            disable_tqdm: without effect.
        """
        del disable_tqdm
        encode, begin = self.model.tokenizer.encode, self.prefix_token_id
        cut = [
            answering.windows(encoding.inside(encode, text), begin, self.max_length)
            for text in (request.args[0] for request in requests)
        ]
        pairs = [pair for own in cut for pair in own]
        found = answering.likelihoods(self.model, self.method, pairs, **self._options)
        log_probs = iter([likelihood.log_prob for likelihood in found])
        return [sum((next(log_probs) for _ in own), 0.0) for own in cut]

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns a new text for each request.

        Args:
            requests: instances whose `args` are a context and options: `until`,
                `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.
            disable_tqdm: without effect.

        Raises:
            ValueError: if an option is none of these; it is named.
        """
        del disable_tqdm
        wanted = []
        for request in requests:
            context, options = request.args
            length, stop, sampling = generation_options(options, self.max_gen_toks)
            tokens = self._cut(
                self.tok_encode(context) or [self.prefix_token_id], length
            )
            wanted.append(Wanted(tokens, length, stop, sampling))
        return answering.continuations(
            self.model, self.method, wanted, seed=self._seed, **self._options
        )

    def _cut(self, context: Sequence[int], following: int) -> tuple[int, ...]:
        """Returns the newest tokens of a context that fit; counts what was cut."""
        kept = answering.newest(context, following, self.max_length)
        self.num_cut += len(kept) < len(context)
        return kept

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness records of a model."""
        return {"model": self.model.name, "method": repr(self.method)}


def generation_options(
    given: Mapping[str, Any], max_new_tokens: int
) -> tuple[int, tuple[str, ...], Sampling]:
    """Reads a task's options of a reply: most tokens, stop strings and sampling.

    Greedy unless `do_sample` is true, or left out beside a temperature above 0.

    Args:
        given: a request's options.
        max_new_tokens: where they do not say.

    Raises:
        ValueError: if one is unknown, or has a value that is not offered.
    """
    options = {name: value for name, value in given.items() if value is not None}
    lengths = [options.pop(name) for name in _LENGTHS if name in options]
    until = options.pop("until", ())
    stop = (until,) if isinstance(until, str) else tuple(until)
    sampled = options.pop("do_sample", None)
    asked = {name: options.pop(name) for name in _SAMPLING if name in options}
    for name in _ONE:
        if options.get(name) == 1:
            del options[name]
    if options:
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"a task asks to generate with {shown}, which kvjax does not have; it has "
            f"until, do_sample, {_LENGTHS[0]} and {', '.join(_SAMPLING)}."
        )
    temperature = float(asked.pop("temperature", 1.0 if sampled else 0.0))
    if sampled is False or temperature == 0:
        sampling = Sampling()
    else:
        sampling = Sampling(temperature=temperature, **asked)
    longest = int(lengths[0]) if lengths else max_new_tokens
    return longest, tuple(text for text in stop if text), sampling
