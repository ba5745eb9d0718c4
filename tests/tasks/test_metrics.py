import pytest

from lvnas.tasks.metrics import METRICS


@pytest.mark.parametrize(
    ("metric", "answer", "truth", "score"),
    [
        ("exact", " Yes. ", "yes", 1),
        ("exact", "yes it is", "yes", 0),
        ("yes_no", "Yes, it is.", "yes", 1),
        ("yes_no", "True", "Yes.", 1),
        ("yes_no", "no", "yes", 0),
        ("anls", "hello", "hello", 1),
        ("anls", "helo", "hello", 0.8),
        ("anls", "he", "hello", 0),
        ("relaxed", "104", "100", 1),
        ("relaxed", "106", "100", 0),
        ("relaxed", "5%", "0.05", 1),
        ("relaxed", "blue", "Blue", 1),
        ("numeric", "1,000", "1000.0", 1),
        ("numeric", "1.02", "1.0", 0),
        ("option", "Answer: B", "B", 1),
        ("option", "(b) the moon", "B.", 1),
        ("option", "C", "B", 0),
        ("option", "a man", "A", 0),
        ("vqarad", "Yes", "yes", 1),
        ("vqarad", "left lung", "the left lung", 0),
    ],
)
def test_metrics(metric, answer, truth, score):
    assert METRICS[metric](answer, truth) == pytest.approx(score)
