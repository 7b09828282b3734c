"""Exact match and F1 as SQuAD's two official scripts compute them, for `evaluate.load(folder, "v1.1" or "v2.0")`.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (EMNLP 2016) and "Know What You Don't
Know: Unanswerable Questions for SQuAD" (ACL 2018). The two differ where nothing is left of an answer once articles and
punctuation are gone: two such answers share no word, so v1.1 gives F1 0; v2.0 gives 1, and it drops such gold answers,
although their question still counts as one that has an answer.
"""

import datasets
import evaluate

from hf_oto.deploy.squad_scoring import exact_match, f1, normalize


def score_v1(predictions, golds):
    """Mean of each question's best score over its gold answers. Both arguments are dicts by question id."""
    if unanswered := [question for question, answers in golds.items() if not answers]:
        raise ValueError(f"v1.1 needs a gold answer for every question; {len(unanswered)} have none: {unanswered[:5]}")
    exact = [max(exact_match(predictions[question], gold) for gold in golds[question]) for question in golds]
    words = [max(f1(predictions[question], gold, False) for gold in golds[question]) for question in golds]
    return {"exact_match": 100.0 * sum(exact) / len(golds), "f1": 100.0 * sum(words) / len(golds)}


def score_v2(predictions, golds, null_odds, threshold):
    """Scores over all questions, those with and those without an answer, and at the best thresholds."""
    answered = {question: bool(answers) for question, answers in golds.items()}
    golds = {question: [gold for gold in answers if normalize(gold)] for question, answers in golds.items()}
    raw = {
        "exact": {q: max(exact_match(predictions[q], gold) for gold in golds[q] or [""]) for q in golds},
        "f1": {q: max(f1(predictions[q], gold, True) for gold in golds[q] or [""]) for q in golds},
    }
    decided = {
        name: {q: float(not answered[q]) if null_odds[q] > threshold else score for q, score in scores.items()}
        for name, scores in raw.items()
    }
    results = _means(decided, list(golds), "")
    for prefix, kind in (("HasAns_", True), ("NoAns_", False)):
        if chosen := [question for question in golds if answered[question] is kind]:
            results.update(_means(decided, chosen, prefix))
    for name, scores in raw.items():
        best, at = _best_threshold(predictions, scores, null_odds, answered)
        results[f"best_{name}"] = best
        results[f"best_{name}_thresh"] = at
    return results


def _means(scores, questions, prefix):
    means = {f"{prefix}{name}": 100.0 * sum(of[q] for q in questions) / len(questions) for name, of in scores.items()}
    return {**means, f"{prefix}total": len(questions)}


def _best_threshold(predictions, scores, null_odds, answered):
    """Let answers in one by one, the surest first, and keep the mean and the null odds at its highest."""
    current = sum(not has for has in answered.values())  # nothing is answered yet
    best, at = current, 0.0
    for question in sorted(null_odds, key=null_odds.get):
        if answered[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, at = current, null_odds[question]
    return 100.0 * best / len(scores), at


class SquadScore(evaluate.Metric):
    """`compute(predictions=[...], references=[...])`, with `no_answer_threshold` in v2.0."""

    def _info(self):
        if self.config_name not in ("v1.1", "v2.0"):
            raise ValueError(f'The configuration must be "v1.1" or "v2.0", got {self.config_name!r}.')
        text = datasets.Value("string")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int64"))}
        prediction = {"id": text, "prediction_text": text}
        if self.config_name == "v2.0":
            prediction["no_answer_probability"] = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv:1606.05250, arXiv:1806.03822",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}}),
        )

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        golds = {reference["id"]: reference["answers"]["text"] for reference in references}
        if texts.keys() != golds.keys():
            raise ValueError("`predictions` and `references` must be of the same ids.")
        if self.config_name == "v1.1":
            return score_v1(texts, golds)
        null_odds = {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions}
        return score_v2(texts, golds, null_odds, no_answer_threshold)
