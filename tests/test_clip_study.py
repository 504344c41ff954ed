"""The picture of what the clip stops: autograd's numbers against the formulas that docs/method.md states."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmark.studies import clip

ROOT = Path(__file__).parent.parent
RATIOS = np.array([0.4, 0.5, 0.899, 0.901, 1.0, 1.099, 1.101, 2.0, 3.0])


def plain(placement: str, advantage: float, weighted_loss: float, ratio: float) -> tuple[float, float]:
    """∂J/∂r and -∂J/∂ℓ / α by hand."""
    utility = advantage - weighted_loss * (placement != "additive")
    active = ratio > 1.1 if utility > 0 else ratio < 0.9
    edge = 1.1 if utility > 0 else 0.9
    pull = {"utility": edge if active else ratio, "additive": 1.0, "gated": 0.0 if active else ratio}[placement]
    return 0.0 if active else utility, pull


@pytest.mark.parametrize("weighted_loss", [0.01, 1.5])  # the second turns the sign of U where A = +1
@pytest.mark.parametrize("placement", clip.PLACEMENTS)
def test_derivatives_equal_the_formulas(placement, weighted_loss):
    found = clip.derivatives(placement, RATIOS, weighted_loss)
    for sign in (1, -1):
        expected = np.array([plain(placement, sign, weighted_loss, ratio) for ratio in RATIOS])
        np.testing.assert_allclose(found[sign]["ratio"], expected[:, 0], atol=1e-5)
        np.testing.assert_allclose(found[sign]["pull"], expected[:, 1], atol=1e-5)


def test_the_document_states_what_is_computed():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- table: clip -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1] == clip.table()
    numbers = {(1, 2.0): 1.10, (-1, 0.5): 0.90, (-1, 2.0): 2.00}
    for (sign, ratio), pull in numbers.items():
        assert clip.derivatives("utility", np.array([ratio]), 0.01)[sign]["pull"] == pytest.approx(pull)
        assert f"{pull:.2f} times" in text


def test_the_picture_has_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "RESULTS", tmp_path)
    found = []
    for _ in range(2):
        clip.draw()
        found.append([(tmp_path / name).read_bytes() for name in ("clip.png", "clip.pdf")])
    assert found[0] == found[1]
