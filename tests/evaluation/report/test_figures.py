"""The renderer: both formats, the same bytes each time, names that are no formula, SVG that a page can hold."""

import re
import xml.etree.ElementTree as ET
from functools import partial

import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.report.figures import inline_svg, render, spread_of, write_figure

NAMES = ["a$b^{$", "$\\nosuch$", "<script>&", "名前"]


def draw(figure, names=NAMES):
    axes = figure.subplots()
    axes.barh(range(len(names)), [1.0] * len(names), label="$x^$")
    axes.set_yticks(range(len(names)), names)
    axes.plot([0, 1], [0, 1], "o-")
    axes.legend()


def texts(svg):
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_png_and_svg_come_from_the_same_function(tmp_path):
    write_figure(tmp_path / "x.png", draw, (4, 3))
    write_figure(tmp_path / "x.svg", draw, (4, 3))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert {*NAMES, "$x^$"} <= set(texts((tmp_path / "x.svg").read_bytes()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.svg"]
    with pytest.raises(RsgwmError, match=r"x\.gif: pictures are written as \.png or \.svg"):
        write_figure(tmp_path / "x.gif", draw, (4, 3))


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_picture_has_the_same_bytes(form):
    assert render(draw, (4, 3), form) == render(draw, (4, 3), form)


def test_a_page_can_hold_several():
    """Well-formed, named, scalable, without style of its own; every reference leads to an id that stands there once."""
    svg = inline_svg(draw, (4, 3), 'a "label" <b>')
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'a "label" <b>'
    assert (root.get("viewBox"), root.get("width")) == ("0 0 288 216", None)
    assert {*NAMES, "$x^$"} <= set(texts(svg))
    assert "<style" not in svg
    assert "<script" not in svg
    ids, used = re.findall(r' id="([^"]+)"', svg), re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
    assert used
    assert sorted(ids) == sorted(set(used))
    other = inline_svg(partial(draw, names=["z"]), (4, 3), "other")
    shared = set(ids) & set(re.findall(r' id="([^"]+)"', other))
    for name in shared:  # the same hash is the same content
        element = next(e for e in root.iter() if e.get("id") == name)
        twin = next(e for e in ET.fromstring(other).iter() if e.get("id") == name)
        assert ET.tostring(element) == ET.tostring(twin)


def test_what_is_drawn_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(draw, (4, 3))
    assert dict(matplotlib.rcParams) == before


def test_error_bars():
    bars = spread_of([{"value": 0.5, "low": 0.25, "high": 1.0}, {"value": 0.0, "low": 0.0, "high": 0.5}])
    assert bars == [[0.25, 0.0], [0.5, 0.5]]
