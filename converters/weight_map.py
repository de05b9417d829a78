"""What mlx-lm's ``sanitize`` makes of a checkpoint's arrays: where each parameter of its model comes from, and how.

A model class of mlx-lm renames, drops, transposes, splits, stacks, scales and shifts arrays before it loads them
(Falcon-H1's muP multipliers, the norms of Qwen3-Next, GPT-2's Conv1D). An adapter of another framework belongs to the
arrays as they were before. So ``sanitize`` runs once on marker arrays with the names and shapes of the checkpoint:
what comes out as the very object that went in was renamed; of the rest, markers that hold zeros, ones, twos, the
number of their array and their indices along each axis show source, order, scale and offset of every element. The
markers are broadcast views: only parameters that were computed take memory, one of each kind of layer at a time.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Any

import mlx.core as mx
import numpy as np

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# A scale or offset is read off in float32; the indices, up to millions, survive a division by it.
EXACT = 1e-6
LARGE = 1 << 26
CONSTANTS = {"zero": 0.0, "one": 1.0, "two": 2.0}


@dataclass(frozen=True)
class SourceRows:
    """Rows of a parameter of mlx-lm (or of one expert's matrix in it) that come from one array of the checkpoint.

    ``rows``: which rows of the source, in order. ``expert``: the source's index along its first axis, where it is
    stacked there already. ``transposed``: the source's columns are the rows.
    """

    source: str
    rows: np.ndarray
    expert: int | None = None
    transposed: bool = False

    def is_all(self, rows: int) -> bool:
        """Whether these are all of ``rows`` rows, in order."""
        return len(self.rows) == rows and bool((self.rows == np.arange(rows)).all())


@dataclass(frozen=True)
class Link:
    """How a parameter of mlx-lm comes from the checkpoint: ``scale`` · (its source) + ``offset``.

    ``axes``: the whole source with its axes in that order; then ``parts`` is empty. Else ``parts`` lists the rows in
    order, for three axes a list an expert. ``scale``: one number, or one a row (for three axes a row of an expert).
    """

    source: str
    axes: tuple[int, ...] | None = None
    parts: tuple[tuple[SourceRows, ...], ...] = ()
    scale: float | np.ndarray = 1.0
    offset: float | np.ndarray = 0.0

    @property
    def scaled(self) -> bool:
        """Whether the source is multiplied."""
        return isinstance(self.scale, np.ndarray) or self.scale != 1.0

    @property
    def shifted(self) -> bool:
        """Whether anything is added to the source."""
        return isinstance(self.offset, np.ndarray) or self.offset != 0.0

    @property
    def plain(self) -> bool:
        """Whether only the name changes."""
        return self.axes == tuple(range(len(self.axes or ()))) and not self.scaled and not self.shifted

    @property
    def sources(self) -> tuple[str, ...]:
        """The arrays of the checkpoint that it comes from, one for every part."""
        return (self.source,) if not self.parts else tuple(part.source for rows in self.parts for part in rows)

    def apply(self, value: mx.array) -> mx.array:
        """The parameter that mlx-lm makes of the whole array ``value``; ``axes`` must not be None."""
        moved = value if self.axes == tuple(range(value.ndim)) else value.transpose(self.axes)
        if self.scaled:
            scale = mx.array(self.scale)
            scale = scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.ndim else scale
            moved = (moved * scale).astype(value.dtype)
        return (moved + mx.array(self.offset)).astype(value.dtype) if self.shifted else moved

    def undo(self, value: mx.array) -> mx.array:
        """The reverse of :meth:`apply`: in the dtype of ``value`` where that holds it exactly, else in float32."""
        source = value.astype(mx.float32)
        if self.shifted:
            source = source - mx.array(self.offset)
        if self.scaled:
            scale = mx.array(self.scale)
            source = source / (scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.ndim else scale)
        # (w + 1) in bfloat16 has no w in bfloat16 where w + 1 is small: rounding it would be another parameter.
        narrow = source.astype(value.dtype)
        exact = not self.shifted or bool(mx.array_equal(narrow.astype(mx.float32), source).item())
        value = narrow if exact else source
        order = tuple(int(axis) for axis in np.argsort(self.axes or ()))
        return value if order == tuple(range(value.ndim)) else value.transpose(order)


Shapes = Mapping[str, tuple[int, ...]]
Sanitize = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class WeightMap:
    """Every parameter of mlx-lm by name, with its :class:`Link`, found when asked for; None where it is not affine."""

    def __init__(self, sanitize: Sanitize, shapes: Shapes) -> None:
        self._sanitize = sanitize
        self._shapes = shapes
        self._numbers = {name: index for index, name in enumerate(shapes)}
        self._names = list(shapes)
        self._runs: dict[str, dict[str, mx.array]] = {}
        self._links: dict[str, Link | None] = {}
        self._kinds: dict[tuple[str, tuple[int, ...]], str] = {}
        markers = {name: _view(0.0, shape) for name, shape in shapes.items()}
        objects = {id(value): name for name, value in markers.items()}
        self._digests: dict[tuple[str, str], bytes] = {}
        self._runs["zero"] = sanitize(dict(markers))
        self._made = {name: tuple(value.shape) for name, value in self._runs["zero"].items()}
        # Passed through as the same object; its values may have been changed in place all the same.
        self.renamed = {name: objects[id(value)] for name, value in self._runs["zero"].items() if id(value) in objects}

    def names(self) -> list[str]:
        """mlx-lm's parameters, in the model's order."""
        return list(self._made)

    def link(self, name: str) -> Link | None:
        """Where the parameter ``name`` comes from, or None where that is not understood."""
        if name in self._links:
            return self._links[name]
        if name not in self._made:
            return None
        if name in self.renamed and self._untouched(name, "zero", 0.0) and self._untouched(name, "one", 1.0):
            self._links[name] = Link(self.renamed[name], tuple(range(len(self._made[name]))))
            return self._links[name]
        kind = NUMBER.sub("#", name), self._made[name]
        pattern = self._kinds.get(kind)
        link = self._like(name, pattern) if pattern is not None else None
        if link is None:
            link = self._measure(name)
            self._kinds[kind] = name
        self._links[name] = link
        return link

    def _like(self, name: str, pattern: str) -> Link | None:
        """The link of another layer's parameter of the same name and shape, carried over to this layer."""
        known = self._links[pattern]
        here, there = NUMBER.findall(name), NUMBER.findall(pattern)
        if known is None or here[1:] != there[1:]:
            return None  # only the first number is a layer's

        def moved(source: str) -> str:
            numbers = NUMBER.findall(source)
            return NUMBER.sub(here[0], source, count=1) if numbers[:1] == there[:1] else ""

        parts = tuple(tuple(replace(part, source=moved(part.source)) for part in rows) for rows in known.parts)
        link = replace(known, source=moved(known.source), parts=parts)
        if not all(source in self._shapes for source in link.sources):
            return None
        return link if self._carried(name, pattern, link) else None

    def _carried(self, name: str, pattern: str, link: Link) -> bool:
        """Whether the markers of ``name`` say ``link``, too: a factor, an order or a source of every layer's own shows.

        The numbers of the arrays, scaled and shifted, show all but the order within an array; where there are more
        than ``LARGE`` elements, as in stacks of experts, only they are looked at, in the first column.
        """
        shape = self._made[name]
        large = math.prod(shape) > LARGE
        column = large and len(shape) > 1
        if not np.allclose(self._values("number", name, column), self._numbered(link, column), rtol=EXACT, atol=EXACT):
            return False
        runs = [] if large else ["zero", "one", *(str(axis) for axis in range(len(shape)))]
        return all(self._digest(run, name) == self._digest(run, pattern) for run in runs)

    def _numbered(self, link: Link, column: bool) -> np.ndarray:
        """What ``link`` makes of arrays that hold their own numbers, of one column."""
        if link.axes is not None:
            numbers = np.full([1] * len(link.axes), self._numbers[link.source], np.float32)
            scale = np.reshape(link.scale, (-1, *[1] * (len(link.axes) - 1)))
        else:
            blocks = [
                np.concatenate([np.full(len(part.rows), self._numbers[part.source], np.float32) for part in rows])
                for rows in link.parts
            ]
            numbers = np.stack(blocks)[..., None] if len(blocks) > 1 else blocks[0][:, None]
            scale = link.scale[..., None] if isinstance(link.scale, np.ndarray) else np.asarray(link.scale)
        offset = link.offset[..., :1] if column and isinstance(link.offset, np.ndarray) else link.offset
        return np.asarray(numbers * scale + offset)

    # --- markers ------------------------------------------------------------------------------------------------

    def _array(self, run: str, name: str) -> mx.array:
        if name not in self._runs.get(run, {}):
            self._runs[run] = self._sanitize({source: self._marker(run, source) for source in self._shapes})
        return self._runs[run][name]

    def _untouched(self, name: str, run: str, value: float) -> bool:
        """Whether what came out is the marker as it went in: still a view of one number, and of that number."""
        array: Any = self._array(run, name)
        mx.eval(array)
        seen = np.asarray(memoryview(array))
        viewed = all(stride == 0 for stride, size in zip(seen.strides, seen.shape, strict=True) if size > 1)
        return viewed and float(seen.flat[0]) == value

    def _values(self, run: str, name: str, column: bool = False) -> np.ndarray:
        """What ``run`` makes of ``name``, or its first ``column``. The array is let go: evaluated, it takes memory."""
        array = self._array(run, name)
        del self._runs[run][name]
        values = np.array((array[..., :1] if column else array).astype(mx.float32))
        if not column and values.size <= LARGE:
            cleaned = values + np.float32(0.0)  # no negative zeros
            self._digests[run, name] = hashlib.blake2b(cleaned.tobytes(), digest_size=16).digest()
        return values

    def _digest(self, run: str, name: str) -> bytes:
        """What stands for the values, so that those of one layer need not be kept to compare the next with."""
        if (run, name) not in self._digests:
            self._values(run, name)
        return self._digests[run, name]

    def _marker(self, run: str, name: str) -> mx.array:
        shape = self._shapes[name]
        if run in CONSTANTS:
            return _view(CONSTANTS[run], shape)
        if run == "number":
            return _view(float(self._numbers[name]), shape)
        axis = int(run)
        if axis >= len(shape):
            return _view(0.0, shape)
        indices = mx.arange(shape[axis], dtype=mx.float32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return mx.broadcast_to(indices, shape)

    def _measure(self, name: str) -> Link | None:
        offset = self._values("zero", name)
        scale = self._values("one", name) - offset
        if not np.allclose(self._values("two", name), offset + 2 * scale, rtol=EXACT, atol=EXACT) or not scale.all():
            return None

        def read(run: str) -> np.ndarray:
            return np.asarray(np.rint((self._values(run, name) - offset) / scale)).astype(np.int32)

        number = read("number")
        if number.min() < 0 or number.max() >= len(self._names):
            return None
        shape = offset.shape
        source = self._names[int(number.flat[0])]
        constant = (number == number.flat[0]).all() and sorted(self._shapes[source]) == sorted(shape)
        shift = _constant(offset)
        if constant:
            indices = [read(str(axis)) for axis in range(len(shape))]
            factor = _by_row(scale)
            for axes in permutations(range(len(shape))):
                if tuple(self._shapes[source][axis] for axis in axes) == shape and factor is not None:
                    grids = np.indices(shape, sparse=True)
                    if all((indices[axis] == grids[place]).all() for place, axis in enumerate(axes)):
                        return Link(source, axes, (), factor, shift)
        if len(shape) not in (2, 3) or isinstance(shift, np.ndarray) or shift != 0.0:
            return None
        return self._split(shape, scale, number, [read(str(axis)) for axis in range(3)])

    def _split(
        self, shape: tuple[int, ...], scale: np.ndarray, number: np.ndarray, indices: list[np.ndarray]
    ) -> Link | None:
        """A parameter of rows of several arrays, or of some rows of one; or experts, each of such rows."""
        factor = _constant(scale.max(axis=-1))
        if (scale != scale[..., :1]).any():
            return None
        blocks = [number] if len(shape) == 2 else list(number)
        axes = [[index] if len(shape) == 2 else list(index) for index in indices]
        parts = []
        for place, block in enumerate(blocks):
            rows = self._rows(block, [axis[place] for axis in axes])
            if rows is None:
                return None
            parts.append(rows)
        return Link(parts[0][0].source, None, tuple(parts), factor)

    def _rows(self, number: np.ndarray, indices: list[np.ndarray]) -> tuple[SourceRows, ...] | None:
        """One matrix's rows, taken apart where the source changes; None where a row is not a source's row or column."""
        if (number != number[:, :1]).any():
            return None
        parts = []
        borders = [0, *(np.flatnonzero(np.diff(number[:, 0])) + 1).tolist(), len(number)]
        for start, stop in pairwise(borders):
            source = self._names[int(number[start, 0])]
            stacked = len(self._shapes[source]) == 3
            first, second = (index[start:stop] for index in (indices[1:] if stacked else indices[:2]))
            expert = indices[0][start:stop]
            columns = np.arange(number.shape[1])
            if stacked and (expert != expert[0, 0]).any():
                return None
            for transposed, (row, column) in enumerate(((first, second), (second, first))):
                if (row == row[:, :1]).all() and (column == columns).all():
                    # A source longer than this matrix is wide would be cut in two: its rows are not all here.
                    if self._shapes[source][-2 if transposed else -1] != len(columns):
                        return None
                    place = int(expert[0, 0]) if stacked else None
                    parts.append(SourceRows(source, row[:, 0], place, bool(transposed)))
                    break
            else:
                return None
        return tuple(parts)


def _view(value: float, shape: tuple[int, ...]) -> mx.array:
    return mx.broadcast_to(mx.array(value), shape)


def _constant(values: np.ndarray) -> float | np.ndarray:
    """One number where all are equal, else float32."""
    first = float(values.flat[0]) if values.size else 0.0
    return first if (values == first).all() else values.astype(np.float32)


def _by_row(scale: np.ndarray) -> float | np.ndarray | None:
    """One number, one a row, or None where columns differ."""
    rule = _constant(scale)
    if not isinstance(rule, np.ndarray):
        return rule
    rows = scale.reshape(scale.shape[0], -1)
    return None if (rows != rows[:, :1]).any() else rows[:, 0].astype(np.float32)


def describe_link(name: str, link: Link | None) -> str:
    """In words, why an adapter of the parameter ``name`` is not carried over."""
    if link is None:
        return f"mlx-lm computes {name} from the checkpoint in a way that an adapter cannot follow"
    return f"mlx-lm makes {name} of {', '.join(dict.fromkeys(link.sources))}"
