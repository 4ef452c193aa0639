"""Pictures as SVG, whose text is text: names as they were given, one legend, gaps where nothing is known, the same bytes."""

from __future__ import annotations

import math
import re

import pytest

from tars_fast.evaluation.metrics import Curve
from tars_fast.reports.plots import accuracy_plot, as_svg, curves_plot, heat_map_plot, write_png

NAMES = ["$\\frac{a}$", "before & <after>", "mine_$5"]


def texts(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def test_names_of_users_are_no_formulas_and_stand_once_in_the_legend():
    curves = {name: Curve([1, 2, 3], [0.1, 0.2, 0.3]) for name in NAMES}
    shown = texts(as_svg(curves_plot({NAMES[0]: curves, "second": curves}, "step", "reward")))
    escaped = [name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for name in NAMES]
    # The first one is a title too.
    assert [shown.count(name) for name in escaped] == [2, 1, 1]
    assert (shown.count("step"), shown.count("reward")) == (2, 1)
    report = {
        f"{modality}_accuracy{end}": value
        for modality in ("speech", "text")
        for end, value in (("", 0.5), ("_ci95", [0.4, 0.6]))
    }
    shown = texts(as_svg(accuracy_plot({NAMES[0]: {"this model": report}})))
    assert shown.count(NAMES[0]) == shown.count("speech") == shown.count("text") == 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda: curves_plot({"a": {"b": Curve([1, 2], [0.5, None], [0.4, None], [0.6, math.nan])}}, "x", "y"),
        lambda: heat_map_plot({"a": [[0.5, None], [math.nan, 1.0]]}, "x", "y", "CKA"),
    ],
)
def test_the_same_figure_gives_the_same_bytes(draw, tmp_path):
    assert as_svg(draw()) == as_svg(draw())
    for name in ("one.png", "other.png"):
        write_png(tmp_path / name, draw())
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_what_is_not_known_is_a_gap_in_a_curve_and_grey_in_a_heat_map():
    (axis,) = curves_plot({"a": {"b": Curve(range(4), [0.5, None, math.nan, 1.0])}}, "x", "y").axes
    assert [math.isfinite(value) for value in axis.lines[0].get_ydata()] == [True, False, False, True]
    figure = heat_map_plot({"a": [[0.5, None]], "b": [[math.nan, 1.0]]}, "x", "y", "CKA")
    images = [axis.images[0] for axis in figure.axes[:2]]
    assert [image.get_array().mask.tolist() for image in images] == [[[False, True]], [[True, False]]]
    grey = images[0].to_rgba(images[0].get_array())[0, 1]
    assert grey[0] == grey[1] == grey[2] > 0.8


def test_long_curves_are_thinned_to_means_of_what_is_known():
    values = [None if number % 4 == 1 else float(number) for number in range(600)]
    thin = Curve(range(600), values).thinned()
    assert len(thin.x) == 150
    assert thin.x[0] == 1.5
    assert thin.y[0] == pytest.approx((0 + 2 + 3) / 3)
    assert thin.low is None
    short = Curve([1, 2], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3])
    assert short.thinned() == short
    assert math.isnan(Curve([1], [None]).thinned().y[0])


def test_many_panels_stand_in_rows_of_three():
    curve = {"b": Curve([1, 2], [0.1, 0.2])}
    widths = [curves_plot({str(n): curve for n in range(count)}, "x", "y").get_figwidth() for count in (1, 3, 5)]
    assert widths == pytest.approx([widths[0], 3 * widths[0], 3 * widths[0]])
    figure = curves_plot({str(n): curve for n in range(5)}, "x", "y")
    assert len(figure.axes) == 5
    assert figure.get_figheight() == pytest.approx(2 * curves_plot({"0": curve}, "x", "y").get_figheight())
