"""Images of every kind: the pixels that Detectron2 reads, or a line that names the file."""

import io
import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from panoptic_fpn_ext import UserError
from panoptic_fpn_ext.data import image_files
from panoptic_fpn_ext.data.checks import check_panoptic_dataset
from panoptic_fpn_ext.data.image_files import read_image
from panoptic_fpn_ext.data.panoptic_png import read_panoptic_png

from .tiny_dataset import TinyDataset

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth, as photographs are."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    image_files._warn_of_damage.cache_clear()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def record_of(path: Path, content: bytes, **fields: int) -> dict:
    path.write_bytes(content)
    return {"file_name": str(path), "height": HEIGHT, "width": WIDTH, **fields}


def refused(record: dict) -> str:
    with pytest.raises(UserError) as error:
        read_image(record, "BGR")
    line = str(error.value)
    assert line.startswith(f"{record['file_name']}: ") and "\n" not in line
    return line


KINDS = [
    *(("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK", "YCbCr")),
    *(("TIFF", mode) for mode in ("RGB", "CMYK", "P")),
    *(("BMP", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("PPM", "RGB")),
]


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_the_pixels_are_detectron2s_whatever_the_name(
    tmp_path, picture, kind, mode, image_format, caplog
):
    content = encoded(Image.fromarray(picture).convert(mode), kind)
    record = record_of(tmp_path / "a.jpg", content)
    image = read_image(record, image_format, strict=True)
    expected = detection_utils.read_image(record["file_name"], image_format)
    assert image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image, expected)
    assert not caplog.records


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    orientation=st.integers(0, 9),
)
def test_every_jpeg_is_read_as_by_detectron2(
    folder, seed, size, quality, subsampling, progressive, orientation
):
    """And none of them is taken for a damaged one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(
        Image.fromarray(pixels),
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        exif=exif,
    )
    height, width = size[::-1] if 5 <= orientation <= 8 else size
    record = record_of(folder / "b.jpg", content, height=height, width=width)
    expected = detection_utils.read_image(record["file_name"], "BGR")
    np.testing.assert_array_equal(read_image(record, "BGR", strict=True), expected)


def test_16_bits_of_a_colour_are_halved(tmp_path, picture):
    """As Pillow does: the upper byte, which holds what an image of 8 bits would."""
    _, content = cv2.imencode(".png", picture.astype(np.uint16) * 256 + 77)
    image = read_image(record_of(tmp_path / "a.png", content.tobytes()), "BGR")
    np.testing.assert_array_equal(image, picture)


# Damaged JPEGs


def jpeg(picture: np.ndarray) -> bytes:
    return encoded(Image.fromarray(picture), "JPEG", quality=90)


def with_header(content: bytes, height: int, width: int) -> bytes:
    place = content.index(b"\xff\xc0") + 5  # the frame: marker, length, precision
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def damaged(content: bytes) -> dict[str, tuple[bytes, int, int]]:
    """Files of which Pillow makes an image of some size."""
    middle = len(content) - 200  # in the pixels
    return {
        "cut, with an end": (content[:middle] + b"\xff\xd9", HEIGHT, WIDTH),
        "no code": (content[:middle] + b"\xff\0" * 20 + content[middle + 40 :], HEIGHT, WIDTH),
        "header too high": (with_header(content, 96, WIDTH), 96, WIDTH),
        "header too wide": (with_header(content, HEIGHT, 96), HEIGHT, 96),
        "header too low": (with_header(content, 8, WIDTH), 8, WIDTH),
    }


DAMAGES = list(damaged(jpeg(np.zeros((HEIGHT, WIDTH, 3), np.uint8))))


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGES)
def test_a_jpeg_with_made_up_pixels_is_named_and_a_fault_of_the_dataset(
    tmp_path, picture, name, caplog
):
    content, height, width = damaged(jpeg(picture))[name]
    data = TinyDataset(tmp_path / "data", 1)
    path = data.images / "1.jpg"
    record = record_of(path, content, height=height, width=width)
    with caplog.at_level(logging.WARNING):
        for image_format in ("BGR", "RGB"):
            image = read_image(record, image_format)
            expected = detection_utils.read_image(str(path), image_format)
            np.testing.assert_array_equal(image, expected)
    (entry,) = caplog.records  # once
    assert entry.getMessage().startswith(f"{path}: a damaged JPEG")
    with pytest.raises(UserError, match="cannot read the image: a damaged JPEG"):
        read_image(record, "BGR", strict=True)

    data.image(1).update(height=height, width=width)
    data.write()
    faults = check_panoptic_dataset(**data.paths()).faults
    assert ("unreadable-image", str(path)) in [(fault.kind, fault.file) for fault in faults]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["header too high", "header too wide", "header too low"])
def test_a_header_that_lies_is_not_what_the_annotations_say(tmp_path, picture, name):
    content, height, width = damaged(jpeg(picture))[name]
    line = refused(record_of(tmp_path / "a.jpg", content))
    assert f"{width}x{height} pixels (width x height), but the annotations say 40x24" in line


@pytest.mark.faults
@settings(deadline=None)
@given(data=st.data())
def test_a_jpeg_cut_anywhere_is_refused(folder, picture, data):
    content = jpeg(picture)
    length = data.draw(st.integers(0, len(content) - 12))
    refused(record_of(folder / "cut.jpg", content[:length]))


@pytest.mark.faults
@settings(deadline=None)
@given(data=st.data())
def test_any_byte_of_an_image_may_be_another(folder, picture, data):
    """It is refused, or of the size that its record says."""
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"]))
    content = bytearray(encoded(Image.fromarray(picture), kind))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    record = record_of(folder / "other.jpg", bytes(content))
    try:
        image = read_image(record, "BGR")
    except UserError as error:
        assert str(error).startswith(f"{record['file_name']}: ") and "\n" not in str(error)
    else:
        assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8


# Hostile files


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def bomb(height: int, width: int) -> bytes:
    """As many pixels as the header says, in a thousandth of the bytes."""
    pack = zlib.compressobj(9)
    row = bytes(1 + 3 * width) * 100
    data = b"".join(pack.compress(row) for _ in range(height // 100)) + pack.flush()
    return png(width, height, data)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """What its record says is smaller, or it is more than Pillow's limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    content = bomb(1000, 1000)
    assert len(content) < 3000
    path = tmp_path / "a.jpg"
    for function in ("decode_image_jpegturbo", "utils.read_image"):
        monkeypatch.setattr(f"panoptic_fpn_ext.data.image_files.{function}", unpacked)
    monkeypatch.setattr("panoptic_fpn_ext.data.panoptic_png.decode_image_png_u8", unpacked)
    assert "decompression bomb" in refused(record_of(path, content))
    with pytest.raises(UserError, match=r"a\.jpg: a PNG of 1000x1000 pixels, a bomb or a"):
        read_panoptic_png(path)
    assert "400x400 pixels" in refused(record_of(path, bomb(400, 400)))


def unpacked(*_: object, **__: object) -> None:
    raise AssertionError("unpacked")


@pytest.mark.faults
def test_the_limit_of_panoptic_pngs_is_pillows(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bomb(100, 21))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1050)
    assert read_panoptic_png(tmp_path / "a.png").shape == (100, 21)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1049)
    with pytest.raises(UserError, match="up to 2098 are read"):
        read_panoptic_png(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_panoptic_png(tmp_path / "a.png").shape == (100, 21)


@pytest.mark.faults
def test_a_text_that_unpacks_to_a_bomb(tmp_path):
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9))
    data = zlib.compress(bytes(HEIGHT * (1 + 3 * WIDTH)))
    record = record_of(tmp_path / "a.png", png(WIDTH, HEIGHT, data, text))
    assert "too large" in refused(record)
    assert not read_panoptic_png(record["file_name"]).any()


@pytest.mark.faults
def test_eps_is_not_given_to_ghostscript(tmp_path, picture, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", unpacked)
    record = record_of(tmp_path / "a.jpg", encoded(Image.fromarray(picture), "EPS"))
    assert "EPS files are programs" in refused(record)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>"])
def test_what_is_no_image(tmp_path, content):
    assert "cannot read the image" in refused(record_of(tmp_path / "a.jpg", content))


@pytest.mark.faults
def test_a_folder_is_no_image(tmp_path):
    record = {"file_name": str(tmp_path)}
    assert "Is a directory" in refused(record)


@pytest.mark.faults
@pytest.mark.parametrize("kind", [b"gAMA", b"sRGB", b"tRNS", b"bKGD", b"sBIT"])
def test_nothing_but_the_pixels_of_a_panoptic_png_counts(tmp_path, kind):
    body = {
        b"gAMA": struct.pack(">I", 45455),
        b"sRGB": b"\0",
        b"tRNS": struct.pack(">HHH", 1, 0, 0),
        b"bKGD": struct.pack(">HHH", 1, 2, 3),
        b"sBIT": b"\5\5\5",
    }[kind]
    pixels = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    pixels[0, 0] = 1, 0, 0
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, zlib.compress(rows), chunk(kind, body)))
    expected = pixels.astype(int) @ [1, 256, 65536]
    np.testing.assert_array_equal(read_panoptic_png(path), expected)
