"""Answers to questions about a context, from a model with a question-answering head.

Transformers 5 has no pipeline for it. Shapes: `L` tokens of a window, `A` tokens of the longest answer, `S` spans.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..models.modes import evaluating
from ..renamed import renamed

NEEDED = "`question` and `context` must be text that is not empty"


@dataclass(frozen=True)
class Answer:
    """
    One answer: `context[start:end] == text`.

    Args:
        text (`str`): The span; empty where the answer is that there is none.
        start, end (`int`): Characters of the context; 0 and 0 where there is no answer.
        score (`float`):
            Probability among all spans of the context that may be an answer, and among no answer if that is allowed.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class _Window:
    """Tokens that the model reads at once.

    Args:
        question (`int`): Index of the question.
        inputs (`dict[str, list[int]]`): What the tokenizer gives for `forward`.
        null (`int`): Position of the token that says "no answer".
        spans (`list[tuple[int, int]]`): Characters of the context where each token starts and ends; (0, 0) outside.
    """

    question: int
    inputs: dict[str, list[int]]
    null: int
    spans: list[tuple[int, int]]


class QuestionAnswerer:
    r"""
    Finds the answers to questions in contexts of any length.

    A context too long for the model is read in overlapping windows. A span scores its start logit plus its end logit,
    the better of two windows that both hold it; "no answer" scores the lowest that any window gives it, as it takes
    one window with an answer to have one. The probabilities are the softmax over all these scores.

    Args:
        model ([`PreTrainedModel`]): A model with a question-answering head, dense or pruned, on any device.
        tokenizer ([`PreTrainedTokenizerBase`]): Its tokenizer, a fast one.
        max_seq_length (`int`, *optional*):
            Tokens of a window. By default 384, or what the model can read if that is less.
        doc_stride (`int`, *optional*): Tokens that two windows share. By default a third of `max_seq_length`.
        max_answer_length (`int`, *optional*, defaults to 30): Tokens of the longest answer.
        batch_size (`int`, *optional*, defaults to 32): Windows that the model reads together.

    Raises:
        `ValueError`, `TypeError`: The model has no such head, the tokenizer is no fast one or has more tokens than
            the model, or a number breaks its rule.

    Example:

    ```python
    answerer = QuestionAnswerer.from_pretrained("bert-squad-oto")
    answerer("Who wrote it?", "It was written by Ada Lovelace.")[0].text
    ```
    """

    @renamed(max_length="max_seq_length", stride="doc_stride")
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        doc_stride: int | None = None,
        max_answer_length: int = 30,
        batch_size: int = 32,
    ) -> None:
        if not type(model).__name__.endswith("ForQuestionAnswering"):
            raise ValueError(f"`model` must have a question-answering head, got {type(model).__name__}.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"`tokenizer` must be a fast one, got {type(tokenizer).__name__}: without character offsets a token "
                f"cannot be turned back into text."
            )
        beyond, vocabulary = max(tokenizer.get_vocab().values()), model.config.vocab_size
        if beyond >= vocabulary:
            raise ValueError(
                f"`tokenizer` must be the one that the model was trained with: it has a token of number {beyond}, the "
                f"model's vocabulary has {vocabulary}, counted from 0."
            )
        limit = min(longest_sequence(model), tokenizer.model_max_length)
        self.max_seq_length = min(384, limit) if max_seq_length is None else max_seq_length
        if not 1 <= self.max_seq_length <= limit:
            raise ValueError(f"`max_seq_length` must be from 1 to the model's {limit}, got {max_seq_length}.")
        self.doc_stride = self.max_seq_length // 3 if doc_stride is None else doc_stride
        for name, value, low in (
            ("doc_stride", self.doc_stride, 0),
            ("max_answer_length", max_answer_length, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_answer_length = max_answer_length
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike, **options: Any) -> QuestionAnswerer:
        """
        Load model and tokenizer from a folder or the Hub.

        Args:
            model_name_or_path (`str` or `os.PathLike`): As in [`~PreTrainedModel.from_pretrained`].
            options: Arguments of [`QuestionAnswerer`].

        Raises:
            `ValueError`: The model has no weights for a question-answering head: it was not trained to answer.
        """
        loaded: Any = AutoModelForQuestionAnswering.from_pretrained(
            model_name_or_path, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{model_name_or_path} has no weights for {', '.join(missing)}, random ones would answer. Use a model "
                f"that was trained to answer questions."
            )
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False)
        return cls(model, tokenizer, **options)

    @renamed(no_answer="handle_impossible_answer")
    def __call__(
        self, question: str, context: str, *, top_k: int = 1, handle_impossible_answer: bool = False
    ) -> list[Answer]:
        """The answers to one question, best first; see [`~QuestionAnswerer.answer`]."""
        return self.answer([question], [context], top_k=top_k, handle_impossible_answer=handle_impossible_answer)[0]

    @renamed(no_answer="handle_impossible_answer")
    def answer(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        top_k: int = 1,
        handle_impossible_answer: bool = False,
        show_progress: bool = False,
    ) -> list[list[Answer]]:
        """
        The answers to many questions.

        Args:
            questions, contexts (`Sequence[str]`): One context for each question.
            top_k (`int`, *optional*, defaults to 1): Answers to give to each; fewer where there are fewer spans.
            handle_impossible_answer (`bool`, *optional*, defaults to `False`):
                Whether "there is none" counts among the answers.
            show_progress (`bool`, *optional*, defaults to `False`): Whether a bar counts the windows.

        Returns:
            `list[list[Answer]]`: For every question its answers, best first.

        Raises:
            `ValueError`, `TypeError`: A question or context is no text, or empty, if only to the tokenizer; a question
                leaves no room for its context; or there are not as many of the one as of the other.
        """
        if isinstance(questions, str) or isinstance(contexts, str):
            raise TypeError(
                "`questions` and `contexts` must be lists of texts, got one text. Call the object for one."
            )
        if len(questions) != len(contexts):
            raise ValueError(
                f"`questions` must have one context each in `contexts`, got {len(questions)} and {len(contexts)}."
            )
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        windows = [
            window
            for index, (question, context) in enumerate(zip(questions, contexts, strict=True))
            for window in self._windows(index, question, context)
        ]
        found = zip(windows, self._logits(windows, show_progress), strict=True)
        return [
            self._search(contexts[index], list(own), top_k, handle_impossible_answer)
            for index, own in groupby(found, key=lambda pair: pair[0].question)
        ]

    def _windows(self, index: int, question: str, context: str) -> list[_Window]:
        for text in (question, context):
            if not isinstance(text, str):
                raise TypeError(f"{NEEDED}, got {type(text).__name__}.")
        question = question.strip()
        if not question or not context.strip():
            raise ValueError(f"{NEEDED}, got {question[:80]!r} and {context[:80]!r}.")
        length = len(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        room = self.max_seq_length - self.tokenizer.num_special_tokens_to_add(pair=True) - length
        if room <= self.doc_stride:
            raise ValueError(
                f"`max_seq_length` {self.max_seq_length} leaves {max(room, 0)} tokens of context beside a question of "
                f"{length}, and `doc_stride` {self.doc_stride} must be below that. Raise the one, lower the other, or "
                f"ask a shorter question than {question[:80]!r}."
            )
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_seq_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        windows = []
        for row, pairs in enumerate(offsets):
            inputs = {name: values[row] for name, values in encoded.items()}
            of_context = [sequence == 1 for sequence in encoded.sequence_ids(row)]
            spans = [
                _trimmed(context, start, end) if inside else (0, 0)
                for (start, end), inside in zip(pairs, of_context, strict=True)
            ]
            windows.append(_Window(index, inputs, _null_position(self.tokenizer, inputs["input_ids"]), spans))
        if not length or not any(end > start for window in windows for start, end in window.spans):
            raise ValueError(
                f"{NEEDED}: `tokenizer` leaves nothing of {(context if length else question)[:80]!r}, whose "
                f"characters it drops."
            )
        return windows

    @torch.inference_mode()
    def _logits(self, windows: Sequence[_Window], show_progress: bool) -> list[tuple[Tensor, Tensor]]:
        """Start and end logits of every window, without padding, in float32 on the CPU."""
        # Windows of one length are read together: little padding.
        order = sorted(range(len(windows)), key=lambda index: len(windows[index].spans))
        logits: list[Any] = [None] * len(windows)
        bar = tqdm(total=len(windows), desc="Answering", leave=False, disable=not show_progress)
        with evaluating(self.model), bar:
            for first in range(0, len(order), self.batch_size):
                chosen = order[first : first + self.batch_size]
                rows = {name: [windows[i].inputs[name] for i in chosen] for name in windows[chosen[0]].inputs}
                # On the right, whatever the tokenizer's own side: positions stay those of the window.
                batch = self.tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt")
                starts, ends = self._forward(batch)
                for row, index in enumerate(chosen):
                    length = len(windows[index].spans)
                    logits[index] = starts[row, :length], ends[row, :length]
                bar.update(len(chosen))
        return logits

    def _forward(self, batch: BatchEncoding) -> tuple[Tensor, Tensor]:
        """Start and end logits, in float32 on the CPU."""
        outputs = self.model(**batch.to(self.model.device), return_dict=True)  # whatever the config says
        return outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()

    def _search(
        self,
        context: str,
        windows: Sequence[tuple[_Window, tuple[Tensor, Tensor]]],
        top_k: int,
        handle_impossible_answer: bool,
    ) -> list[Answer]:
        keys, scores = [], []
        places_per_start = len(context) + 1
        for window, (starts, ends) in windows:
            first_S, last_S, score_S = span_scores(starts, ends, self.max_answer_length)
            places_L2 = torch.tensor(window.spans, device="cpu")
            # Tokens outside of the context, and those without a character, are at no place.
            placed_L = places_L2[:, 1] > places_L2[:, 0]
            inside_S = placed_L[first_S] & placed_L[last_S]
            keys.append((places_L2[first_S, 0] * places_per_start + places_L2[last_S, 1])[inside_S])
            scores.append(score_S[inside_S])
        key_S, inverse = torch.unique(torch.cat(keys), return_inverse=True)
        score_S = torch.full_like(key_S, -torch.inf, dtype=torch.float32).scatter_reduce(
            0, inverse, torch.cat(scores), "amax"
        )
        if handle_impossible_answer:
            null = torch.stack([starts[window.null] + ends[window.null] for window, (starts, ends) in windows]).min()
            key_S, score_S = F.pad(key_S, (0, 1)), torch.cat([score_S, null[None]])  # characters 0 to 0
        best = score_S.softmax(0).sort(descending=True, stable=True)
        answers = []
        for score, key in zip(best.values[:top_k].tolist(), key_S[best.indices[:top_k]].tolist(), strict=True):
            start, end = divmod(key, places_per_start)
            answers.append(Answer(context[start:end], start, end, score))
        return answers


class OnnxAnswerer(QuestionAnswerer):
    """
    As another [`QuestionAnswerer`], with the logits of an ONNX file that its model was exported to.

    Args:
        answerer ([`QuestionAnswerer`]): Whose tokenizer and settings to use.
        session (`onnxruntime.InferenceSession`): With inputs and outputs of the model's names.
    """

    def __init__(self, answerer: QuestionAnswerer, session: Any) -> None:
        vars(self).update(vars(answerer))
        self.session = session

    def _forward(self, batch: BatchEncoding) -> tuple[Tensor, Tensor]:
        tensors: Any = batch.data
        # What a tokenizer does not give is all zeros, as for the model: token types.
        absent = torch.zeros_like(tensors["input_ids"])
        inputs = {one.name: tensors.get(one.name, absent).numpy() for one in self.session.get_inputs()}
        starts, ends = self.session.run(["start_logits", "end_logits"], inputs)
        return torch.from_numpy(starts), torch.from_numpy(ends)


def span_scores(starts: Tensor, ends: Tensor, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Every span of at most so many tokens: first token, last token, start logit plus end logit.

    Shapes: `[L]`, `[L]` -> `[S]` each, S < L·A.
    """
    length = len(starts)
    width = min(max_length, length)
    # Row i holds the ends i … i + A - 1; beyond the last token there is none.
    ends_LA = F.pad(ends, (0, width - 1), value=-torch.inf).unfold(0, width, 1)
    score_LA = starts[:, None] + ends_LA
    first_LA = torch.arange(length, device=starts.device)[:, None].expand_as(score_LA)
    last_LA = first_LA + torch.arange(width, device=starts.device)
    valid = last_LA < length
    return first_LA[valid], last_LA[valid], score_LA[valid]


def _trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """A token's place without the spaces that some tokenizers count to it."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def _null_position(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Where a window says "no answer": its class token, its first token if it has none."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def longest_sequence(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence that a model of any family reads: some count positions from the padding id on."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", sys.maxsize)
    embeddings = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((getattr(module, "padding_idx", None) for module in embeddings), None)
    return positions if padding is None else positions - padding - 1
