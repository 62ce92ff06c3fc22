"""LLaVA-Interleave Bench's metrics on the answers that its own scorer was run on."""

from __future__ import annotations

import pytest

from llava_fast.evaluation.metrics import is_right_choice, normalise_answer, rouge_l, score


@pytest.mark.parametrize(
    "prediction, right",
    [("A", True), ("a", True), ("A.", True), ("(A)", True), ("Answer: A", True), ("A. foo", False), ("B", False), ("", False)]
    + [("b: a", True), ("The answer is: it is red", False), ("answer: A: z", True), ("answer: i", False)],
)
def test_multiple_choice(prediction, right):
    assert is_right_choice(prediction, "A") is right


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A red-blue cat", "a red blue cat"),  # a mark inside a word becomes a space
        ("red- blue-green", "red bluegreen"),  # one that touches a space anywhere is deleted everywhere
        ("1,000 well-known", "1000 wellknown"),  # a comma between digits deletes all marks
        ("3.5 is it.", "3.5 is it"),
        ("one\ttwo\nthree ", "one two three"),
        ("'quoted'", "quoted"),
        ("'A'!", "a'"),  # quotes are stripped once, before what stood behind them is gone
        ("why: because", "why: because"),
        ("." * 40, "." * 8),  # 32 of them at most
    ],
)
def test_normalisation(text, expected):
    assert normalise_answer(text) == expected


def test_rouge_l():
    assert rouge_l("a a a b", "a b") == pytest.approx(0.999999995, abs=1e-12)  # sets of words
    assert rouge_l("the cat sat", "the cat sat") == pytest.approx(1.0, abs=1e-6)
    assert rouge_l("the cat", "the cat sat on") == pytest.approx(2 * 1.0 * 0.5 / 1.5, abs=1e-6)
    assert rouge_l("...", "a b") == 0.0 == rouge_l("", "a b") == rouge_l("x y", "a b")
    assert rouge_l("a", "") is None
    assert rouge_l("x " * 300 + "a b", "a b") == 0.0  # past 512 characters nothing is read


def test_scores_by_data_set():
    def record(dataset, kind, given, wanted):
        return {"dataset": dataset, "question_type": kind, "pred_response": given, "gt_response": wanted}

    records = [record("NLVR2", "multi-choice", "A", "A"), record("NLVR2", "multi-choice", "B", "A")]
    records += [record("VIST", "open-ended", "a b", "a b"), record("VIST", "open-ended", "", "a b"), record("VIST", "open-ended", "x", "")]
    assert score(records) == {"NLVR2": {"Accuracy": 0.5}, "VIST": {"Rouge-L f": pytest.approx(0.5, abs=1e-6)}}
    with pytest.raises(ValueError, match="question_type of X must be 'multi-choice' or 'open-ended', got 'other'"):
        score([record("X", "other", "a", "a")])
