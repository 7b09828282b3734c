"""Logits -> answers: the n-best search over the windows of a context.

Shapes: `F` windows, `L` tokens of the longest, `K` starts and ends that a window keeps, `E` questions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

WINDOWS_AT_ONCE = 2048  # K * K spans of each are in memory together


@dataclass(frozen=True)
class Answers:
    """What a model answers, by question id.

    Args:
        texts (`dict[str, str]`): The answers; empty where it says that there is none.
        spans (`dict[str, str]`): The best spans of text, whatever the score of no answer.
        n_best (`dict[str, list[dict]]`): Best first: text, probability, start and end logit.
        null_odds (`dict[str, float] | None`): Score of no answer over that of the best span. `None` without v2.0.
    """

    texts: dict[str, str]
    spans: dict[str, str]
    n_best: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float] | None


def find_answers(
    examples: Dataset,
    features: Dataset,
    logits: tuple[np.ndarray, np.ndarray],
    *,
    n_best_size: int,
    max_answer_length: int,
    version_2: bool = False,
    null_score_diff_threshold: float = 0.0,
    show_progress: bool = False,
) -> Answers:
    """
    Search the best answers of every question over all windows of its context.

    A span scores its start logit plus its end logit. A question's score of no answer is the lowest that its windows'
    null tokens give it: it takes one window with an answer to have one.

    Args:
        examples (`Dataset`): Questions, with `id` and `context`.
        features (`Dataset`): Their windows, as `feature_maker(labels=False)` makes them.
        logits (`tuple[np.ndarray, np.ndarray]`): Of start and end, `[F, at least L]` each.
        n_best_size (`int`): `K`, and the answers to keep of a question.
        max_answer_length (`int`): Longest span, in tokens.
        version_2 (`bool`, *optional*, defaults to `False`): Whether a question may have no answer.
        null_score_diff_threshold (`float`, *optional*, defaults to 0.0): Null odds above which there is none.
        show_progress (`bool`, *optional*, defaults to `False`): Whether bars are shown.
    """
    starts, ends = (np.asarray(side, dtype=np.float64) for side in logits)
    if not len(starts) == len(ends) == len(features):
        raise ValueError(f"`logits` must have one row a window, got {len(starts)} and {len(ends)} of {len(features)}.")
    table = features.select_columns(["example", "null_position", "token_start", "token_end"]).with_format("arrow")[:]
    example_F, null_F = (table[name].to_numpy() for name in ("example", "null_position"))
    token_start, token_end = (_rectangle(table[name].combine_chunks()) for name in ("token_start", "token_end"))

    bars: dict[str, Any] = {"disable": not show_progress, "leave": False}
    chunks = [slice(i, i + WINDOWS_AT_ONCE) for i in range(0, len(features), WINDOWS_AT_ONCE)]
    parts = [
        _best_spans(starts[chunk], ends[chunk], token_start[chunk] >= 0, n_best_size, max_answer_length)
        for chunk in tqdm(chunks, desc="Searching answers", **bars)
    ]
    first, last, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    window, rank = np.nonzero(np.isfinite(score))
    first, last, score = first[window, rank], last[window, rank], score[window, rank]
    order = np.lexsort((-score, example_F[window]))  # by question, best first; ties keep the windows' order
    window, first, last, score = window[order], first[order], last[order], score[order]
    bounds = np.searchsorted(example_F[window], np.arange(len(examples) + 1))

    null_E = np.full(len(examples), np.inf)
    null_score_F = starts[np.arange(len(features)), null_F] + ends[np.arange(len(features)), null_F]
    lowest = np.lexsort((-null_score_F, example_F))  # of equal index the last write stays: the lowest
    null_window_E = np.zeros(len(examples), dtype=np.int64)
    null_window_E[example_F[lowest]] = lowest
    null_E[example_F[lowest]] = null_score_F[lowest]

    texts, spans, n_best, null_odds = {}, {}, {}, {}
    questions = zip(examples["id"], examples["context"], strict=True)
    questions = tqdm(questions, desc="Reading answers off", total=len(examples), **bars)
    for example, (name, context) in enumerate(questions):
        found = slice(bounds[example], min(bounds[example + 1], bounds[example] + n_best_size))
        candidates = [
            {
                "text": context[token_start[w, i] : token_end[w, j]].strip(),
                "start_logit": float(starts[w, i]),
                "end_logit": float(ends[w, j]),
            }
            for w, i, j in zip(window[found], first[found], last[found], strict=True)
        ]
        spans[name] = texts[name] = candidates[0]["text"] if candidates else ""
        if version_2:
            best = score[found][0] if candidates else -np.inf
            null_odds[name] = float(np.clip(null_E[example] - best, -1e9, 1e9))  # JSON knows no infinity
            if null_odds[name] > null_score_diff_threshold:
                texts[name] = ""
            w = null_window_E[example]
            null_logits = {"start_logit": float(starts[w, null_F[w]]), "end_logit": float(ends[w, null_F[w]])}
            candidates.append({"text": "", **null_logits})
            candidates.sort(key=lambda one: -(one["start_logit"] + one["end_logit"]))
        n_best[name] = _with_probabilities(candidates)
    return Answers(texts, spans, n_best, null_odds if version_2 else None)


def _best_spans(
    starts: np.ndarray, ends: np.ndarray, context: np.ndarray, n_best: int, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, last token and score of each window's best spans, `[F, K]` each; -inf where there is no span."""
    length = context.shape[1]
    k = min(n_best, length)
    starts = np.where(context, starts[:, :length], -np.inf)
    ends = np.where(context, ends[:, :length], -np.inf)
    top_start = np.argsort(-starts, axis=1, kind="stable")[:, :k]
    top_end = np.argsort(-ends, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(starts, top_start, 1)[:, :, None] + np.take_along_axis(ends, top_end, 1)[:, None, :]
    tokens = top_end[:, None, :] - top_start[:, :, None] + 1
    scores = np.where((tokens >= 1) & (tokens <= max_length), scores, -np.inf).reshape(len(starts), k * k)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :n_best]  # there are more spans than starts
    first = np.take_along_axis(top_start, best // k, 1)
    last = np.take_along_axis(top_end, best % k, 1)
    return first, last, np.take_along_axis(scores, best, 1)


def _rectangle(lists: Any) -> np.ndarray:
    """Arrow lists of different lengths -> `[F, L]`, -1 beyond a list's end."""
    lengths = lists.value_lengths().to_numpy()
    filled = np.arange(lengths.max()) < lengths[:, None]
    rectangle = np.full(filled.shape, -1, dtype=np.int64)
    rectangle[filled] = lists.flatten().to_numpy()
    return rectangle


def _with_probabilities(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scores = np.array([one["start_logit"] + one["end_logit"] for one in candidates])
    weights = np.exp(scores - scores.max()) if candidates else scores
    return [
        {"text": one["text"], "probability": float(weight), **one}
        for one, weight in zip(candidates, weights / weights.sum(), strict=True)
    ]
