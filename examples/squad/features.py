"""Questions -> the windows of tokens that the model reads.

Shapes: `E` questions of a batch, `F` their windows, `T` tokens of all windows one after another.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_oto.deploy.answering import longest_sequence

OUTSIDE = -1  # stands for the character offsets of a token that is not of the context


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless the tokenizer tells where in the text its tokens stand."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, without which a token cannot be turned back into "
            "text. Use a fast tokenizer (one with a tokenizer.json)."
        )


def check_length(model: PreTrainedModel, max_seq_length: int) -> None:
    """Raise `ValueError` for sequences that the model has no positions for: the first batch with one would fail."""
    if max_seq_length > (longest := longest_sequence(model)):
        raise ValueError(f"`max_seq_length` must be at most {longest}, what the model reads, got {max_seq_length}.")


def feature_maker(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    doc_stride: int,
    pad: bool,
    labels: bool,
    segments: bool = False,
) -> Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]:
    """
    Make the function for `datasets.map(..., batched=True, with_indices=True)`.

    A context too long for one window is cut into several that share `doc_stride` tokens. The question comes first,
    on whichever side the tokenizer pads.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        max_seq_length (`int`): Tokens of a window.
        doc_stride (`int`): Tokens that two windows share.
        pad (`bool`): Pad to `max_seq_length`.
        labels (`bool`):
            For training: add `start_positions` and `end_positions`, those of the null token where the window does not
            hold the whole answer. Otherwise add what turns logits into text: `example`, the question's row;
            `null_position`; `token_start` and `token_end`, characters of the context, -1 outside of it.
        segments (`bool`): Tell question and context apart (`token_type_ids`) even if the tokenizer's model does not.
    """
    # Tokens padded on the left would be shifted against their offsets once a batch is padded to its longest window.
    pad = pad or tokenizer.padding_side == "left"

    def make(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        questions = [question.strip() for question in batch["question"]]
        check_room(tokenizer, questions, max_seq_length, doc_stride)
        encoded = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=max_seq_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=segments or None,
            padding="max_length" if pad else False,
        )
        source_F = np.asarray(encoded.pop("overflow_to_sample_mapping"))
        offsets = encoded.pop("offset_mapping")
        lengths_F = np.array([len(window) for window in offsets])
        null_F = np.array([null_position(tokenizer, ids) for ids in encoded["input_ids"]])
        offsets_T = np.array([pair for window in offsets for pair in window], dtype=np.int64)
        sequence_T = [sequence for i in range(len(offsets)) for sequence in encoded.sequence_ids(i)]
        context_T = np.array([sequence == 1 for sequence in sequence_T])
        window_T = np.repeat(np.arange(len(offsets)), lengths_F)
        starts_T = np.where(context_T, offsets_T[:, 0], OUTSIDE)
        ends_T = np.where(context_T, offsets_T[:, 1], OUTSIDE)
        columns = dict(encoded)
        if labels:
            answers_E2 = np.array([answer_span(answer) for answer in batch["answers"]])
            answers_F2 = held_by_tokens(starts_T, ends_T, source_F[window_T], answers_E2)[source_F]
            positions = label_positions(starts_T, ends_T, lengths_F, answers_F2, null_F)
            columns["start_positions"], columns["end_positions"] = positions
        else:
            cuts = np.cumsum(lengths_F)[:-1]
            columns["example"] = np.asarray(indices)[source_F]
            columns["null_position"] = null_F
            columns["token_start"], columns["token_end"] = np.split(starts_T, cuts), np.split(ends_T, cuts)
        return columns

    return make


def answer_span(answers: dict[str, list[Any]]) -> tuple[int, int]:
    """Characters of the context where the first answer starts and ends, without spaces around it; -1 for none."""
    if not answers["text"]:
        return OUTSIDE, OUTSIDE
    text, start = answers["text"][0], answers["answer_start"][0]
    start += len(text) - len(text.lstrip())  # no token ends in a space, so the labels would take in its neighbours
    return start, start + len(text.strip())


def held_by_tokens(
    starts_T: np.ndarray, ends_T: np.ndarray, example_T: np.ndarray, answers_E2: np.ndarray
) -> np.ndarray:
    """
    The answers without what no token holds at their ends: characters that the tokenizer's normalizer drops, such as
    accents in NFD. -1 where nothing is left.

    Args:
        starts_T, ends_T (`np.ndarray`): Characters of the context at which a token starts and ends, -1 outside.
        example_T (`np.ndarray`): The question that a token's window is of.
        answers_E2 (`np.ndarray`): Characters of the answers, start and end; -1 for none. `[E, 2]`

    Returns:
        `np.ndarray`: Likewise, `[E, 2]`.
    """
    answer_T2 = answers_E2[example_T]
    some_T = starts_T < ends_T  # a space may be a token of no characters
    reach = some_T & (ends_T > answer_T2[:, 0]), some_T & (starts_T < answer_T2[:, 1])
    first_E, last_E = np.full(len(answers_E2), np.iinfo(np.int64).max), np.full(len(answers_E2), OUTSIDE)
    np.minimum.at(first_E, example_T[reach[0]], starts_T[reach[0]])
    np.maximum.at(last_E, example_T[reach[1]], ends_T[reach[1]])
    held_E2 = np.stack([np.maximum(answers_E2[:, 0], first_E), np.minimum(answers_E2[:, 1], last_E)], axis=1)
    return np.where((held_E2[:, 0] < held_E2[:, 1])[:, None], held_E2, OUTSIDE)


def label_positions(
    starts_T: np.ndarray, ends_T: np.ndarray, lengths_F: np.ndarray, answers_F2: np.ndarray, null_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    The tokens at which each window's answer starts and ends; the null token's if the answer is not wholly in it.

    Several tokens may stand for the same characters (of a rare one each has some bytes): the answer has all of them.

    Args:
        starts_T, ends_T (`np.ndarray`): Characters of the context at which a token starts and ends, -1 outside.
        lengths_F (`np.ndarray`): Tokens of each window.
        answers_F2 (`np.ndarray`): Characters of the answer, start and end, as tokens hold them; -1 for none. `[F, 2]`
        null_F (`np.ndarray`): Position of each window's null token.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Positions in the window, `[F]` each.
    """
    first_F = np.concatenate([[0], np.cumsum(lengths_F)[:-1]])
    position_T = np.arange(len(starts_T)) - np.repeat(first_F, lengths_F)
    answer_T2 = np.repeat(answers_F2, lengths_F, axis=0)
    context_T = starts_T != OUTSIDE
    # The first token that ends after the answer's start, and the last that starts before its end.
    start_F = np.minimum.reduceat(
        np.where(context_T & (ends_T > answer_T2[:, 0]), position_T, lengths_F.max()), first_F
    )
    end_F = np.maximum.reduceat(np.where(context_T & (starts_T < answer_T2[:, 1]), position_T, -1), first_F)
    found_F = (answers_F2[:, 0] >= 0) & (start_F <= end_F)
    # Where the answer begins before the window, or goes on after it, these are not its first and last.
    inside_F = (starts_T[first_F + np.where(found_F, start_F, 0)] <= answers_F2[:, 0]) & (
        ends_T[first_F + np.where(found_F, end_F, 0)] >= answers_F2[:, 1]
    )
    return np.where(found_F & inside_F, start_F, null_F), np.where(found_F & inside_F, end_F, null_F)


def null_position(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Where a window says "no answer": its class token, or its first token that is not padding if it has none."""
    if tokenizer.cls_token_id in ids:
        return ids.index(tokenizer.cls_token_id)
    return next((i for i, token in enumerate(ids) if token != tokenizer.pad_token_id), 0)


def check_room(tokenizer: PreTrainedTokenizerBase, questions: list[str], max_seq_length: int, doc_stride: int) -> None:
    """Raise `ValueError` if a question leaves no room for new context beside the tokens that windows share."""
    lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    room = max_seq_length - tokenizer.num_special_tokens_to_add(pair=True) - lengths[longest]
    if room <= doc_stride:
        raise ValueError(
            f"`max_seq_length` {max_seq_length} leaves {max(room, 0)} tokens of context beside a question of "
            f"{lengths[longest]}, and `doc_stride` {doc_stride} must be below that. Raise the one or lower the other; "
            f"the question: {questions[longest][:80]!r}"
        )
