"""Settings of the data: sources, split and token limits."""

from dataclasses import dataclass, field

from l2m_jax.data.tokenizer import MIN_VOCAB_SIZE
from l2m_jax.errors import InputError, require_at_least, require_choice


@dataclass(frozen=True)
class SyntheticData:
    """Graded instruction tasks made from a seed (`data.source = "synthetic"`)."""

    train: int = 2000
    validation: int = 100
    test: int = 200
    seed: int = 0
    tokenizer_size: int = 1024  # entries of the tokenizer trained on the tasks

    def __post_init__(self):
        require_at_least(self, 1, "train", "validation", "test")
        require_at_least(self, 0, "seed")
        require_at_least(self, MIN_VOCAB_SIZE, "tokenizer_size")


@dataclass(frozen=True)
class Data:
    source: str = (
        "files"  # "files" (files, folders, hub names or mixtures in train, validation, test) or "synthetic"
    )
    train: str = "databricks/databricks-dolly-15k"
    validation: str = ""  # empty: split off the training rows
    test: str = ""  # empty: split off the training rows
    validation_rows: int = 1000  # rows split off, or the maximum number of rows of a given file (0: all)
    test_rows: int = 500
    train_rows: int = 0  # training rows used (0: all)
    split_seed: int = 42
    # Processes that tokenise; 0: one for each core that the run may use, at most 16. Costs time and memory only.
    processes: int = field(default=0, metadata={"absent_at_default": True})
    tokenizer: str = ""  # folder or hub name; empty: the teacher's
    # Keep the tokens that occur at least so often in what the run reads, and few others (0: the whole vocabulary).
    trim_vocabulary: int = field(default=0, metadata={"absent_at_default": True})
    max_length: int = 1024  # tokens of prompt and response; longer examples are dropped and counted
    max_prompt_length: int = 0  # 0: no separate limit
    truncate: bool = False  # cut long prompts and responses to the limits instead of dropping the example
    # Which rows begin with the beginning-of-sequence token: "none", "training" (and the answers to training
    # prompts), "evaluation" (validation, test and other sets) or "both".
    bos: str = "none"
    # "alpaca", or "chat": the tokenizer's own chat template. Settings absent at their default leave older keys as they were.
    prompt: str = field(default="alpaca", metadata={"absent_at_default": True})
    synthetic: SyntheticData = field(default_factory=SyntheticData)

    def __post_init__(self):
        require_choice(self, "source", ("files", "synthetic"))
        require_choice(self, "bos", ("none", "training", "evaluation", "both"))
        require_choice(self, "prompt", ("alpaca", "chat"))
        if self.prompt == "chat" and self.bos != "none":
            raise InputError(
                f"bos: {self.bos!r} with prompt 'chat', whose template writes the beginning of sequence itself; set it to "
                "'none'"
            )
        if self.prompt == "chat" and self.truncate:
            raise InputError(
                "truncate: true with prompt 'chat' would cut turns in two; set it to false, and longer rows are left out"
            )
        if self.prompt == "chat" and self.trim_vocabulary:
            raise InputError(
                f"trim_vocabulary: {self.trim_vocabulary} with prompt 'chat' is not supported; set it to 0, or prompt to "
                "'alpaca'"
            )
        require_at_least(
            self,
            0,
            "validation_rows",
            "test_rows",
            "train_rows",
            "split_seed",
            "processes",
            "trim_vocabulary",
            "max_prompt_length",
        )
        require_at_least(self, 3, "max_length")  # a prompt, a response and the end of sequence
        if self.max_prompt_length >= self.max_length:
            raise InputError(
                f"max_prompt_length: {self.max_prompt_length!r} must be below max_length ({self.max_length}), or 0 for no "
                "separate limit"
            )
        if self.source == "synthetic":
            if self.trim_vocabulary:
                raise InputError(
                    f"trim_vocabulary: {self.trim_vocabulary} is for rows from files; the vocabulary of synthetic tasks "
                    "is small already"
                )
            return
        if not self.train:
            raise InputError("train: empty; give a file, a folder or the name of a data set on the hub")
        for part in ("validation", "test"):
            if not getattr(self, part) and not getattr(self, f"{part}_rows"):
                raise InputError(
                    f"{part}_rows: 0 with no {part} file leaves no {part} rows; set it or {part}"
                )
