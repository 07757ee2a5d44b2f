"""Buckets: their sizes and the choice among them, as in sd-scripts, and properties that hold for every picture."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sentences import refused

from fastsd.config.schema import BucketTable
from fastsd.data.building.buckets import Buckets
from fastsd.data.sources.image import Rejected

SD15, SDXL = BucketTable(), BucketTable(min=256, max=2048)
SMALL = BucketTable(no_upscale=True)


def test_sizes_are_those_of_make_bucket_resolutions():
    upright = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)]
    assert Buckets(512, SD15).sizes == sorted([*upright, (512, 512), *(size[::-1] for size in upright)])
    assert Buckets(512, None).sizes == [(512, 512)]
    assert Buckets(512, SMALL).sizes == []
    assert Buckets(500, BucketTable(min=448, max=512)).sizes == [(448, 448), (448, 512), (512, 448)]
    # If the square is larger than `max`, its side becomes `max`.
    assert Buckets(1024, BucketTable(max=512, min=512)).sizes == [(512, 512)]


@pytest.mark.parametrize(
    "resolution, table, picture, resized, bucket",
    [
        (512, None, (512, 512), (512, 512), (512, 512)),
        (512, None, (1024, 768), (683, 512), (512, 512)),
        (512, None, (300, 200), (768, 512), (512, 512)),
        (512, None, (1, 20000), (512, 10240000), (512, 512)),
        (512, SD15, (512, 512), (512, 512), (512, 512)),
        (512, SD15, (1024, 1024), (512, 512), (512, 512)),
        (512, SD15, (300, 300), (512, 512), (512, 512)),
        (512, SD15, (640, 480), (597, 448), (576, 448)),
        (512, SD15, (480, 640), (448, 597), (448, 576)),
        (512, SD15, (1920, 1080), (683, 384), (640, 384)),
        (512, SD15, (1080, 1920), (384, 683), (384, 640)),
        (512, SD15, (1000, 667), (640, 427), (640, 384)),
        (512, SD15, (4000, 1000), (1024, 256), (1024, 256)),
        (512, SD15, (100, 1000), (256, 2560), (256, 1024)),
        (512, SD15, (20000, 1), (5120000, 256), (1024, 256)),
        (512, SD15, (704, 320), (704, 320), (704, 320)),  # this size is a bucket, so nothing is resampled
        (1024, SDXL, (1920, 1080), (1365, 768), (1344, 768)),
        (1024, SDXL, (512, 768), (832, 1248), (832, 1216)),
        (1024, SDXL, (5000, 1000), (2048, 410), (2048, 384)),
        (512, SMALL, (512, 512), (512, 512), (512, 512)),
        (512, SMALL, (511, 300), (511, 300), (448, 256)),
        (512, SMALL, (300, 300), (300, 300), (256, 256)),  # min has no effect
        (512, SMALL, (65, 127), (65, 127), (64, 64)),
        (512, SMALL, (640, 480), (512, 384), (512, 384)),
        (512, SMALL, (1920, 1080), (683, 384), (640, 384)),
        (512, SMALL, (1080, 1920), (384, 683), (384, 640)),
        (512, SMALL, (3000, 1000), (768, 256), (768, 256)),
        (512, SMALL, (700, 380), (589, 320), (576, 320)),
        (512, SMALL, (8000, 600), (1707, 128), (1664, 128)),  # max has no effect
        (512, SMALL, (7510, 118), (4073, 64), (4032, 64)),  # only one of the two possible roundings leaves a bucket
    ],
)
def test_places_are_those_of_sd_scripts(resolution, table, picture, resized, bucket):
    assert Buckets(resolution, table).place(*picture) == (resized, bucket)


@pytest.mark.parametrize("picture", [(63, 4000), (4000, 63), (1, 1), (20000, 30)])
def test_pictures_too_small_for_a_bucket_are_rejected(picture):
    width, height = picture
    with refused("image-too-small", Rejected, width=width, height=height, step=64) as error:
        Buckets(512, SMALL).place(*picture)
    assert error.value.lasting


sides = st.one_of(st.integers(1, 3000), st.integers(1, 20000))


@st.composite
def tables(draw):
    """Draw a resolution and a table of buckets that a config may have."""
    step = draw(st.sampled_from([8, 16, 32, 64, 128]))
    low = draw(st.integers(1, 6)) * step
    high = draw(st.integers(low // step, 16)) * step
    resolution = draw(st.integers(low, high))
    return resolution, BucketTable(min=low, max=high, step=step, no_upscale=draw(st.booleans()))


@given(tables(), sides, sides)
def test_every_picture_gets_a_bucket_that_it_covers(settings, width, height):
    resolution, table = settings
    buckets = Buckets(resolution, table)
    try:
        resized, size = buckets.place(width, height)
    except Rejected:
        assert table.no_upscale and min(width, height) < 2 * table.step * max(1, max(width, height) / resolution)
        return
    assert all(side >= cropped for side, cropped in zip(resized, size, strict=True)), "the resized picture covers its bucket"
    assert all(side > 0 and side % table.step == 0 for side in size)
    if table.no_upscale:
        assert resized[0] <= width and resized[1] <= height
        is_near = all(side - cropped < table.step for side, cropped in zip(resized, size, strict=True))
        assert is_near or width * height > resolution**2
        assert size[0] * size[1] <= resolution**2 + max(resized)  # each side is rounded by up to half a pixel
    else:
        assert size in buckets.sizes and size[0] * size[1] <= resolution**2
        assert table.min <= min(size) and max(size) <= table.max
        # The picture just covers the bucket: one side has exactly its length.
        assert any(side == cropped for side, cropped in zip(resized, size, strict=True))


@given(tables(), sides, sides)
def test_a_picture_keeps_its_aspect_ratio(settings, width, height):
    buckets = Buckets(*settings)
    try:
        resized, _ = buckets.place(width, height)
    except Rejected:
        assume(False)
    # Each side is rounded by at most half a pixel.
    scale_x, scale_y = resized[0] / width, resized[1] / height
    assert abs(scale_x - scale_y) <= 0.51 / width + 0.51 / height


@given(tables())
def test_buckets_are_symmetric_in_width_and_height(settings):
    buckets = Buckets(*settings)
    assert {size[::-1] for size in buckets.sizes} == set(buckets.sizes)
    for size in buckets.sizes:
        for picture in (size, (3 * size[0], 3 * size[1])):
            ratios = [w / h for w, h in buckets.sizes]
            if ratios.count(size[0] / size[1]) == 1:
                assert buckets.place(*picture).size == size and buckets.place(*picture[::-1]).size == size[::-1]
