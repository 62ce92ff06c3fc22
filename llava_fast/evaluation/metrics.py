"""The metrics of LLaVA-Interleave Bench, as its published scorer computes them, quirks included.

Source: LLaVA-NeXT, llava/eval/evaluate_interleave.py; ROUGE-L by the package `rouge` that it uses (sets of words, sentence-wise).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llava_fast.checks import shown

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
LONGEST = 512  # characters of a prediction that ROUGE-L sees


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation. A mark is deleted where it touches a space somewhere in the text, or where a comma stands
    between digits somewhere; otherwise it becomes a space. Periods go unless a digit follows, 32 of them at most; colons stay."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    delete_all = re.search(r"(\d),(\d)", text) is not None
    out = text
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete_all or touches else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    return out.strip("'").strip('"').strip(")").strip("(").strip().lower()  # one kind after another, as there


def is_right_choice(prediction: str, gold: str) -> bool:
    """Whether a multiple-choice answer is the gold one: 'A', 'A.', '(A)' and 'Answer: A' are 'a'; 'A. red' is not.

    After a colon, the last piece that is a single letter from a to h counts.
    """
    given, wanted = normalise_answer(prediction), normalise_answer(gold)
    letters = [piece for piece in (part.strip() for part in given.split(":")) if re.fullmatch("[a-h]", piece)] if ":" in given else []
    return (letters[-1] if letters else given) == wanted


def rouge_l(prediction: str, gold: str) -> float | None:
    """F of ROUGE-L of the normalised texts, 0 for an empty prediction, None where the gold answer is empty (it is left out)."""
    from rouge import Rouge

    given, wanted = normalise_answer(prediction)[:LONGEST], normalise_answer(gold)
    if not wanted.strip(". "):
        return None
    if not given.strip(". "):
        return 0.0
    return Rouge(metrics=["rouge-l"]).get_scores(given, wanted)[0]["rouge-l"]["f"]


def score(records: Iterable[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """By data set: {'Accuracy': share right} where its first record is 'multi-choice', {'Rouge-L f': mean} where it is 'open-ended'.

    records: dataset, question_type, pred_response, gt_response.  Raises ValueError for another question_type.
    """
    by_dataset: dict[str, list[Mapping[str, str]]] = {}
    for record in records:
        by_dataset.setdefault(record["dataset"], []).append(record)
    scores = {}
    for dataset, own in by_dataset.items():
        kind = own[0]["question_type"]
        if kind not in ("multi-choice", "open-ended"):
            raise ValueError(f"question_type of {dataset} must be 'multi-choice' or 'open-ended', got {shown(kind)}")
        pairs = [(record["pred_response"], record["gt_response"]) for record in own]
        if kind == "multi-choice":
            scores[dataset] = {"Accuracy": sum(is_right_choice(*pair) for pair in pairs) / len(pairs)}
        else:
            values = [value for pair in pairs if (value := rouge_l(*pair)) is not None]
            scores[dataset] = {"Rouge-L f": sum(values) / len(values) if values else 0.0}
    return scores
