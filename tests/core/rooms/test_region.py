"""Regions: what an index or a shard covers of an array."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardinit.core.region import Region, covering

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@st.composite
def regions(draw, shape):
    starts = [draw(st.integers(0, n)) for n in shape]
    sizes = [draw(st.integers(0, n - s)) for n, s in zip(shape, starts, strict=True)]
    return Region(tuple(starts), tuple(sizes))


@given(st.data())
def test_a_region_of_a_region_is_one_of_the_array(data):
    shape = data.draw(shapes)
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    outer = data.draw(regions(shape))
    inner = data.draw(regions(outer.shape))
    place = inner.within(outer)
    assert place.inside(shape)
    assert Region.of_slices(place.slices, shape).size == place.size
    part = array[outer.slices]
    assert part.size == outer.size
    np.testing.assert_array_equal(part[inner.slices], array[place.slices])


def test_what_lies_outside_is_told():
    for region in (
        Region((0,), (5,)),
        Region((-1,), (2,)),
        Region((3,), (2,)),
        Region((0,), (-1,)),
        Region((0, 0), (1, 1)),
        Region((), ()),
    ):
        assert not region.inside((4,)), region
    assert Region((4,), (0,)).inside((4,))
    assert Region.full((4, 2)) == Region((0, 0), (4, 2))


@given(st.data())
def test_what_covers_an_index_holds_all_it_names(data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    steps = st.sampled_from([None, 1, 2, -1, -2])
    bound = st.none() | st.integers(-6, 6)
    slices = st.builds(slice, bound, bound, steps)
    index = tuple(data.draw(slices | st.integers(-n, n - 1)) for n in shape)
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    region, rest = covering(index, shape, "the array")
    assert region.inside(shape)
    np.testing.assert_array_equal(array[region.slices][rest], array[index])
