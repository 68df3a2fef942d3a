"""Reading and writing panoptic PNGs, against Pillow."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png, write_panoptic_png
from panoptic_fpn_ext.errors import UserError

id_maps = hnp.arrays(
    st.sampled_from([np.int32, np.uint32, np.int64]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=20),
    elements=st.integers(0, 2**24 - 1),
)


def rgb_of(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("png")


@given(ids=id_maps)
def test_reads_what_pillow_writes(folder, ids):
    Image.fromarray(rgb_of(ids)).save(folder / "pillow.png")
    read = read_panoptic_png(folder / "pillow.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)


# Where the pixels of each pass begin, and how far they are apart: rows and columns.
ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def png_of(pixels: np.ndarray, filters: np.ndarray, *, interlaced: bool, parts: int) -> bytes:
    """A PNG (H, W, 3 or 4) with a filter, 0 to 4, for each row, its data in several chunks."""
    height, width, channels = pixels.shape
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    data = bytearray()
    for top, left, dy, dx in passes:
        image = pixels[top::dy, left::dx].astype(int)
        if not image.size:
            continue
        padded = np.pad(image, ((1, 0), (1, 0), (0, 0)))
        a, b, c = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
        distances = np.abs([b - c, a - c, a + b - 2 * c])  # Paeth's, to a, b and c
        paeth = np.choose(distances.argmin(axis=0), [a, b, c])
        filtered = image - np.choose(
            filters[top::dy, None, None], [np.zeros_like(a), a, b, (a + b) // 2, paeth]
        )
        for number, row in zip(filters[top::dy], filtered.astype(np.uint8), strict=True):
            data += bytes([number]) + row.tobytes()
    stream = zlib.compress(bytes(data))
    size = -(-len(stream) // parts)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 6, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"tEXt", b"a\0b")]
    chunks += [(b"IDAT", stream[i : i + size]) for i in range(0, len(stream), size)]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    return content


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([3, 4])),
    colors=st.sampled_from([2, 256]),
    interlaced=st.booleans(),
    parts=st.integers(1, 3),
)
def test_reads_every_filter_and_interlacing(folder, seed, shape, colors, interlaced, parts):
    """And as OpenCV does."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, colors, shape, dtype=np.uint8)
    filters = rng.integers(0, 5, shape[0])
    content = png_of(pixels, filters, interlaced=interlaced, parts=parts)
    (folder / "made.png").write_bytes(content)
    opencv = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(opencv[..., ::-1], pixels[..., :3])
    ids = read_panoptic_png(folder / "made.png")
    np.testing.assert_array_equal(ids, pixels[..., :3].astype(int) @ [1, 256, 65536])


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_byte_never_goes_unnoticed_in_the_pixels(folder, data):
    ids = np.arange(600).reshape(20, 30)
    write_panoptic_png(folder / "whole.png", ids)
    content = bytearray((folder / "whole.png").read_bytes())
    place = data.draw(st.integers(0, content.index(b"IEND") - 9))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / "damaged.png").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.png: "):
        read_panoptic_png(folder / "damaged.png")


@given(ids=id_maps)
def test_pillow_reads_what_is_written(folder, ids):
    write_panoptic_png(folder / "ours.png", ids)
    with Image.open(folder / "ours.png") as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), rgb_of(ids))
    np.testing.assert_array_equal(read_panoptic_png(str(folder / "ours.png")), ids)


def test_a_slice_is_written_as_it_looks(tmp_path):
    ids = np.arange(200).reshape(10, 20)[::2, ::-3]
    write_panoptic_png(tmp_path / "a.png", ids)
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "a.png"), ids)


def test_a_png_that_is_compressed_as_far_as_can_be(tmp_path):
    ids = np.zeros((1500, 1500), int)
    Image.fromarray(rgb_of(ids)).save(tmp_path / "a.png", compress_level=9)
    assert 3 * ids.size > 900 * (tmp_path / "a.png").stat().st_size
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "a.png"), ids)


def test_alpha_is_dropped(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = rgba[..., :3].astype(int) @ [1, 256, 65536]
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "rgba.png"), expected)


@pytest.mark.parametrize(("mode", "found"), [("L", "8-bit grey"), ("P", "8-bit palette")])
def test_other_modes_are_refused(tmp_path, mode, found):
    Image.linear_gradient("L").convert(mode).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=rf"x\.png: {found} PNG; expected 8-bit RGB"):
        read_panoptic_png(tmp_path / "x.png")


@pytest.mark.parametrize(("shape", "found"), [((3, 4), "16-bit grey"), ((3, 4, 3), "16-bit RGB")])
def test_16_bit_is_refused(tmp_path, shape, found):
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros(shape, np.uint16))
    with pytest.raises(UserError, match=rf"x\.png: {found} PNG; expected 8-bit RGB"):
        read_panoptic_png(tmp_path / "x.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.png: .*No such file"):
        read_panoptic_png(tmp_path / "missing.png")


def test_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        read_panoptic_png(tmp_path)


def test_another_format_is_refused(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png", format="JPEG")
    with pytest.raises(UserError, match=r"x\.png: not a PNG"):
        read_panoptic_png(tmp_path / "x.png")


@given(data=st.data())
def test_truncated_files_are_refused(folder, data):
    write_panoptic_png(folder / "whole.png", np.arange(600).reshape(20, 30))
    content = (folder / "whole.png").read_bytes()
    image_data_end = content.index(b"IEND") - 8  # the last chunk of the pixels, less its checksum
    cut = content[: data.draw(st.integers(0, image_data_end))]
    (folder / "cut.png").write_bytes(cut)
    with pytest.raises(UserError, match=r"cut\.png: (not a|damaged or truncated) PNG"):
        read_panoptic_png(folder / "cut.png")


def test_an_absurd_size_is_refused(tmp_path):
    write_panoptic_png(tmp_path / "x.png", np.zeros((2, 2), int))
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[16:24] = b"\x7f\xff\xff\xff" * 2
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png: damaged .* bytes cannot hold 2147483647x"):
        read_panoptic_png(tmp_path / "x.png")


@pytest.mark.parametrize(
    "ids",
    [
        np.full((2, 2), -1),
        np.full((2, 2), 2**24),
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((2, 2)),
        np.zeros((0, 2), int),
    ],
)
def test_bad_ids_write_nothing(tmp_path, ids):
    with pytest.raises(ValueError, match=r"x\.png: segment ids must"):
        write_panoptic_png(tmp_path / "x.png", ids)
    assert not list(tmp_path.iterdir())
