"""A training run as data: strict sections with defaults.

An unknown key, a value of the wrong kind or settings that contradict each other are
errors before any work. `config_files.py` reads and writes it.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

METRICS = {
    "bits": "min",
    "accuracy": "max",
    "whole": "max",
}  # of a check: which is best


def _whole(value: Any) -> Any:
    # YAML reads 1e6 as a float; as a count it is what was meant.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Whole = Annotated[int, pydantic.BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, lt=2**31)]
CountOrNone = Annotated[Whole, Field(ge=0, lt=2**31)]  # 0 = off
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Lists of a file become tuples: a config is immutable.
Texts = Annotated[
    tuple[str, ...],
    pydantic.BeforeValidator(_texts),
    Field(strict=False),
]


Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(pydantic.BaseModel):
    """Settings that know all their keys and do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """The model to be trained: weights to continue from, or sizes to start from.

    Attributes:
        checkpoint: folder, GGUF file, hub id or embedded model: the first weights.
        config: keys of a Hugging Face `config.json`, for a model from scratch.
        tokenizer: of a model from scratch: a folder with `tokenizer.json`, or "train".
        alpha: attention to go on with, whatever the checkpoint's: 1 is softmax, above 1
            alpha-entmax.
        copies, copy_window, copy_chunk: of every token, and what they see of each other
            (PHD-Transformer); the checkpoint's, or those of `config`, if left out.
        dtype: of the weights in `model`; that of the checkpoint, or of `config`, if
            left out. Training itself keeps them in float32.
    """

    checkpoint: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    alpha: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    copies: Count | None = None
    copy_window: CountOrNone | None = None
    copy_chunk: CountOrNone | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @pydantic.model_validator(mode="after")
    def _one_beginning(self):
        if (self.checkpoint is None) == (self.config is None):
            raise ValueError("give either checkpoint or config, and only one of them")
        if (self.config is None) != (self.tokenizer is None):
            raise ValueError(
                "tokenizer belongs to config, a folder with tokenizer.json or 'train'; "
                "a checkpoint brings its own"
            )
        if self.config is not None and self.alpha is not None:
            raise ValueError("of a model from scratch, alpha is config.attention_alpha")
        return self


class Data(Section):
    """The sources of text.

    Attributes:
        corpus: "stdlib", or files and glob patterns: UTF-8 text, or records that end in
            `.jsonl`, `.ndjson` or `.parquet`; "stdlib/json/*.py" are files of the
            standard library.
        field: of a record, its text.
        held_out: files that the checks are drawn from, as `corpus` and none of its. If
            left out, the last twentieth of the corpus, which is then not trained on; of
            "stdlib", the modules that are left out of it.
        seed: of every sample.
        threads: that prepare batches ahead; 0 prepares each when it is needed.
    """

    corpus: Texts = ("stdlib",)
    field: str = "text"
    held_out: Texts | None = None
    seed: CountOrNone = 0
    threads: CountOrNone = 2


class Stage(Section):
    """Steps with one recipe. A curriculum is a list of stages.

    Attributes:
        steps: optimizer steps.
        tokens: targets per step, over all rows and devices.
        lengths: {targets per row: share of the steps}.
        shortest: rows are packed with several sequences of log-uniform length, from
            `shortest` to the row's; None is one sequence a row.
        mixture: {source: share of the tokens}.
    """

    steps: Count
    tokens: Count
    lengths: dict[Count, Share] = Field(min_length=1)
    shortest: Count | None = None
    mixture: dict[str, Share] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        for name in ("lengths", "mixture"):
            total = sum(getattr(self, name).values())
            if not 0 < total < float("inf"):
                raise ValueError(
                    f"the shares of {name} sum to {total:.3g}: make one positive, and "
                    "none huge"
                )
        if self.tokens < max(self.lengths):
            raise ValueError(
                f"tokens={self.tokens} must be at least one row of the longest of "
                f"lengths, {max(self.lengths)}"
            )
        if self.shortest is not None and self.shortest > min(self.lengths):
            raise ValueError(
                f"shortest={self.shortest} must not exceed the shortest of lengths, "
                f"{min(self.lengths)}"
            )
        return self

    def rows(self, length: int) -> int:
        """Rows of a batch of `length` targets a row."""
        return self.tokens // length


class Optimizer(Section):
    """The way in which weights follow gradients.

    Attributes:
        name: "adamw", or "muon" for the matrices between embedding and output and
            adamw for the rest; muon's updates are scaled to the size of adamw's, so the
            same `lr` serves both.
        lr: the largest learning rate, reached after `warmup` steps.
        schedule: after warm-up: "constant", or "cosine" or "linear" down to `final`
            times `lr` at the last step.
        decay_steps: of a constant schedule: the last steps, linear down to `final`.
        final: share of `lr` at the end.
        b1, b2, eps: of adamw. b1 is muon's momentum too.
        weight_decay: of matrices, per unit of learning rate.
        clip: largest norm of the gradient; 0 is no limit.
        accumulate: parts a batch is computed in, to save memory; changes no result.
        average: decay of a running mean of the weights, which is then what is
            evaluated and exported; 0 is no mean.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    warmup: CountOrNone = 100
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    decay_steps: CountOrNone = 0
    final: Annotated[Share, Field(le=1)] = 0.1
    b1: Annotated[Share, Field(lt=1)] = 0.9
    b2: Annotated[Share, Field(lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: Share = 0.1
    clip: Share = 1.0
    accumulate: Count = 1
    average: Annotated[Share, Field(lt=1)] = 0.0

    @pydantic.model_validator(mode="after")
    def _one_decay(self):
        if self.decay_steps and self.schedule != "constant":
            raise ValueError(
                f"decay_steps={self.decay_steps} is for schedule=constant; "
                f"schedule={self.schedule} decays all the way: set decay_steps to 0"
            )
        return self


class Precision(Section):
    """compute: of activations and products. Weights and optimizer are float32."""

    compute: Literal["float32", "bfloat16"] = "float32"


class RefreshKV(Section):
    """The end of every row attends as :func:`kvjax.refreshkv` decodes (softmax models).

    The defaults are the paper's, but for its 8K rows: one selection of 2,047 tokens at
    the end of the prompt, kept whole for the 50 tokens after it.

    Attributes:
        decoded: last targets of a row, which attend so; those before are its prompt.
        budget, stride, schedule, threshold, kernel, group_reduce, max_gap, self_mode,
            qc_rope, eviction: of :func:`kvjax.training.refreshkv.refresh_attention`.
    """

    decoded: Count = 50
    budget: Annotated[Whole, Field(ge=2)] = 2048
    stride: Count = 50
    schedule: Literal["fixed", "qc"] = "fixed"
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.85
    kernel: Count = 7
    group_reduce: Literal["max", "mean"] = "max"
    max_gap: Count | None = None
    self_mode: Literal["paper", "snapkv", "drop"] = "paper"
    qc_rope: Literal["post", "pre"] = "post"
    eviction: Literal["exact", "none"] = "none"

    def check_budget(self, longest: int) -> None:
        """Raises ValueError if nothing is left out of rows of so many tokens."""
        budget = self.budget
        # A cache that evicts is full once so many tokens are there. Without eviction
        # the last selection that small steps follow chooses budget - 1 of those so far.
        least = longest
        if self.eviction == "none":
            least -= (self.decoded - 1) % self.stride
        if budget >= least:
            raise ValueError(
                f"refreshkv.budget={budget} must be below {least}, or nothing is left "
                f"out of rows of {longest} tokens and full attention is trained: give "
                f"--set refreshkv.budget={max(least // 4, 2)}, or longer rows"
            )


class Lora(Section):
    """Low-rank matrices B A that are trained beside frozen weights, as PEFT has them.

    The result is `adapter`, in PEFT's layout; it is all that optimizer and checkpoints
    hold. The first B is 0, and the first A uniform in +-1/sqrt(inputs).

    Attributes:
        rank: of every B A.
        alpha: B A counts alpha / rank.
        use_rslora: it counts alpha / sqrt(rank).
        target_modules: names of modules, such as [q_proj, v_proj]; or a regular
            expression of whole names; or "all-linear": all matrices but the output.
        modules_to_save: ends of names of norms, such as [norm], that are trained too.
        bias: "none": biases stay as they are.
    """

    rank: Count = 8
    alpha: Positive = 8.0
    use_rslora: bool = False
    target_modules: Annotated[str, Field(min_length=1)] | Names = "all-linear"
    modules_to_save: Names = ()
    bias: Literal["none"] = "none"

    @pydantic.field_validator("modules_to_save")
    @classmethod
    def _norms(cls, names):
        for name in names:
            if not name.endswith("norm"):
                raise ValueError(
                    f"{name!r} is no norm: matrices are trained by target_modules, and "
                    "of the rest norms alone, such as input_layernorm"
                )
        return names


class Mesh(Section):
    """Devices: batches are split over data x fsdp, weights over fsdp."""

    data: Count = 1
    fsdp: Count = 1

    @property
    def size(self) -> int:
        """Devices."""
        return self.data * self.fsdp


class Evaluate(Section):
    """Checks on held-out text and seeds.

    Attributes:
        every: steps between them; 0 is never. The last step is always checked.
        tokens: targets of each check.
        checks: "source@length"; every source of the last stage at its greatest length
            if left out. Each gives bits (per target), accuracy (of answers) and whole
            (rows with every answer right).
    """

    every: CountOrNone = 500
    tokens: Count = 8192
    checks: Texts = ()

    @pydantic.field_validator("checks")
    @classmethod
    def _spelled(cls, checks):
        for check in checks:
            source, _, length = check.partition("@")
            if not (source and length.isdecimal() and int(length) > 0):
                raise ValueError(f"{check!r} must be source@length, such as text@256")
        return checks


class Checkpoint(Section):
    """When the state is saved.

    Attributes:
        every_steps, every_seconds: whichever comes first. The last step is always
            saved, and so is an interrupted one.
        keep: newest ones kept.
        best: metric of a check, such as "text@256/bits", by which the best one is kept
            too and is what `model` holds; None is the newest.
    """

    every_steps: Count = 500
    every_seconds: Positive | None = None
    keep: Count = 2
    best: str | None = None


class Log(Section):
    """every: steps a line of `metrics.jsonl` sums up. tensorboard: write events too."""

    every: Count = 10
    tensorboard: bool = True


class Config(Section):
    """A whole run. `seed` is of the first weights, `data.seed` of what is read.

    `refreshkv` trains for decoding with that method; None is full attention. `lora`
    trains low-rank matrices beside the model's weights; None trains the weights.
    """

    model: Model
    data: Data = Data()
    stages: tuple[Stage, ...] = Field(min_length=1, strict=False)
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    remat: bool = False
    refreshkv: RefreshKV | None = None
    lora: Lora | None = None
    mesh: Mesh = Mesh()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: CountOrNone = 0

    @property
    def steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that some stage or check draws from, sorted."""
        mixed = {name for stage in self.stages for name in stage.mixture}
        return tuple(sorted(mixed | {name for name, _ in self.checks}))

    @property
    def longest(self) -> int:
        """Targets of the longest row of any stage or check."""
        rows = [length for stage in self.stages for length in stage.lengths]
        return max(rows + [length for _, length in self.checks])

    @property
    def checks(self) -> tuple[tuple[str, int], ...]:
        """(source, length) of every check; none if nothing is evaluated."""
        if not self.evaluate.every:
            return ()
        last = self.stages[-1]
        names = self.evaluate.checks or tuple(
            f"{source}@{max(last.lengths)}" for source in sorted(last.mixture)
        )
        parts = (name.split("@") for name in names)
        return tuple((source, int(length)) for source, length in parts)

    def stage(self, step: int) -> Stage:
        """The stage of the step with this index, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"{step=} is beyond the last stage.")

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if self.optimizer.decay_steps > self.steps:
            raise ValueError(
                f"optimizer.decay_steps={self.optimizer.decay_steps} exceeds the "
                f"{self.steps} steps of all stages"
            )
        if self.lora is not None and self.model.checkpoint is None:
            raise ValueError(
                "lora is trained beside the weights of a model, and model.checkpoint "
                "is not given: name one"
            )
        if (self.model.copies or 1) > 1:
            for name in ("lora", "refreshkv"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"model.copies={self.model.copies} trains all weights for an "
                        f"attention of their own, and {name} does not: give "
                        f"--set {name}=null"
                    )
        parts = self.optimizer.accumulate * self.mesh.size
        for index, stage in enumerate(self.stages):
            for length in stage.lengths:
                if stage.rows(length) % parts:
                    raise ValueError(
                        f"stages.{index}: tokens={stage.tokens} make "
                        f"{stage.rows(length)} rows of {length}, which must be a "
                        f"multiple of {parts} (optimizer.accumulate * mesh.data * "
                        "mesh.fsdp)"
                    )
        if self.refreshkv is not None:
            decoded = self.refreshkv.decoded
            lengths = {n for stage in self.stages for n in stage.lengths}
            shortest = min(lengths | {length for _, length in self.checks})
            if shortest <= decoded:
                raise ValueError(
                    f"refreshkv.decoded={decoded} must be below every length of rows "
                    f"and checks; the shortest is {shortest}"
                )
            packed = [
                f"stages.{index}.shortest"
                for index, stage in enumerate(self.stages)
                if stage.shortest is not None
            ]
            if packed:
                changes = " ".join(f"--set {key}=null" for key in packed)
                raise ValueError(
                    "refreshkv needs rows of one sequence, and "
                    f"{' and '.join(packed)} packs several into one: give {changes}"
                )
            self.refreshkv.check_budget(max(n for s in self.stages for n in s.lengths))
        best = self.checkpoint.best
        if best is not None:
            known = [f"{s}@{n}/{metric}" for s, n in self.checks for metric in METRICS]
            if best not in known:
                raise ValueError(
                    f"checkpoint.best={best!r} is measured by no check; there are "
                    f"{', '.join(known) or 'none, as evaluate.every is 0'}"
                )
        return self
