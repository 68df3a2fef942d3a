"""Reading and writing panoptic PNGs, against Pillow."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
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
    with pytest.raises(UserError, match=r"x\.png: damaged"):
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
