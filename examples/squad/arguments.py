"""What `run_squad.py` understands on the command line or in a JSON file."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from hf_oto import OTOConfig
from hf_oto.renamed import OLD_SETTINGS


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a config and a tokenizer to start from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from: a folder or a name on the Hub."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config, if not the checkpoint's. Without a checkpoint: train from scratch."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the checkpoint's."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "How attention is computed: `sdpa`, `eager`, …"},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoint."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and (self.config_name is None or self.tokenizer_name is None):
            raise ValueError(
                "Give `--model_name_or_path`, or both `--config_name` and `--tokenizer_name` to train from scratch."
            )


@dataclass
class DataArguments:
    """Which questions, and how they are read and answered."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set with SQuAD's columns."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training questions in SQuAD's JSON."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation questions in SQuAD's JSON."})
    test_file: str | None = field(
        default=None, metadata={"help": "Questions to answer in SQuAD's JSON; they need no answers."}
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "SQuAD v2.0: some questions have no answer, and the model may say so."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Answer nothing if no answer scores more than this above the best answer. v2.0 only."},
    )
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window: question and context together."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two windows of one context share."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to `max_seq_length` rather than to the longest of the batch."}
    )
    n_best_size: int = field(default=20, metadata={"help": "Starts, ends and answers that the search keeps."})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer, in tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first questions only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first questions only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first questions only."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever is cached."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into an `output_dir` that is not empty; training removes the checkpoints in it."},
    )

    def __post_init__(self) -> None:
        files = (self.train_file, self.validation_file, self.test_file)
        if (self.dataset_name is None) == (not any(files)):
            raise ValueError(
                "Give either `--dataset_name` or files (`--train_file`, `--validation_file`, `--test_file`), "
                f"got {self.dataset_name!r} and {files}."
            )
        for name in ("max_seq_length", "n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.doc_stride < self.max_seq_length:
            raise ValueError(
                f"`doc_stride` must be in [0, `max_seq_length`), got {self.doc_stride} and {self.max_seq_length}."
            )


# HfArgumentParser reads neither a tuple nor a number that may be the word "none".
_AS_TEXT, _AS_LIST = "target_sparsity", {"structures": str, "milestones": float}
_AS_PATH = "latency_table"
_NO_SETTINGS = ("compress", "teacher_model_name_or_path")


def _compression_field(setting: dataclasses.Field) -> tuple[str, Any, dataclasses.Field]:
    """One field of OTOConfig as an argument of the same name and default."""
    metadata = {"help": "OTOConfig's setting of this name; with `--compress` only."}
    if setting.name == "sequence_length":
        metadata["help"] += " For MACs; what the model reads is `--max_seq_length`."
    if setting.name == _AS_TEXT:
        metadata["help"] += ' "none" runs HSPG as published.'
        return setting.name, str | None, field(default=str(setting.default), metadata=metadata)
    if setting.name in _AS_LIST:
        default = getattr(OTOConfig(), setting.name)
        kind: Any = list[_AS_LIST[setting.name]]
        return setting.name, kind, field(default_factory=lambda: list(default), metadata=metadata)
    if setting.name == _AS_PATH:
        metadata["help"] += " The file that `hf-oto latency` wrote."
        return setting.name, str | None, field(default=None, metadata=metadata)
    return setting.name, type(setting.default), field(default=setting.default, metadata=metadata)


_CompressionFields = dataclasses.make_dataclass(
    "_CompressionFields",
    [
        ("compress", bool, field(default=False, metadata={"help": "Prune while training, and save the small model."})),
        (
            "teacher_model_name_or_path",
            str | None,
            field(default=None, metadata={"help": "Fine-tuned model to learn from."}),
        ),
        *(_compression_field(setting) for setting in dataclasses.fields(OTOConfig)),
    ],
)


@dataclass  # its own, or the fields' `__init__` would be used, which knows no `__post_init__`
class CompressionArguments(_CompressionFields):
    """`--compress` and every setting of [`OTOConfig`] under its own name."""

    def __post_init__(self) -> None:
        self.oto_config()

    def oto_config(self) -> OTOConfig | None:
        """The settings, or `None` for a dense run. Raises `ValueError` if there are settings for a dense run."""
        settings = {name: value for name, value in vars(self).items() if name not in _NO_SETTINGS}
        text = settings[_AS_TEXT]
        settings[_AS_TEXT] = None if text is None or str(text).lower() == "none" else _number(_AS_TEXT, text)
        config = OTOConfig.from_dict(settings)
        if self.compress:
            return config
        default = OTOConfig().to_dict()
        given = [name for name, value in config.to_dict().items() if value != default[name]]
        if given := given + ["teacher_model_name_or_path"] * (self.teacher_model_name_or_path is not None):
            raise ValueError(
                f"{', '.join(f'`--{name}`' for name in given)} set up the compression: give `--compress` too. "
                "(The learning rate's warm-up is `--warmup_steps`, a share of all steps if below 1.)"
            )
        return None


def _number(name: str, text: object) -> float:
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f'`{name}` must be a number or "none", got {text!r}.') from None


_OLD_NAMES = {**OLD_SETTINGS, "teacher_name_or_path": "teacher_model_name_or_path"}


def refuse_old_names(arguments: list[str]) -> None:
    """Raises `ValueError` if an argument of the compression is given by a name that it no longer has."""
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        given = list(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    else:
        given = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    for name in given:
        if name in _OLD_NAMES:
            raise ValueError(
                f"There is no `--{name}`: the name is `--{_OLD_NAMES[name]}`. (The learning rate's warm-up is "
                f"`--warmup_steps`, a share of all steps if below 1.)"
            )


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, CompressionArguments, TrainingArguments]:
    """Read the command line, or the JSON file that is its only argument. Raises `ValueError` on what breaks a rule."""
    arguments = sys.argv[1:] if arguments is None else arguments
    refuse_old_names(arguments)
    parser = HfArgumentParser((ModelArguments, DataArguments, CompressionArguments, TrainingArguments))
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        parsed = parser.parse_json_file(arguments[0])
    else:
        parsed = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    _, data, compression, training = parsed
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ValueError("Nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    for switch, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
        if getattr(training, switch) and data.dataset_name is None and getattr(data, f"{split}_file") is None:
            raise ValueError(f"`--{switch}` needs `--{split}_file` or `--dataset_name`.")
    if compression.compress and not training.do_train:
        raise ValueError("`--compress` prunes while the model trains: give `--do_train` too.")
    return parsed
