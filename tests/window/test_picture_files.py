"""Pictures of the user's: nothing outside the folder, nothing too large, every damage told in one line."""

import struct
import zlib

import pytest
from PIL import Image

from laid_eval.errors import UserError
from laid_eval.window.picture_files import MOST_PIXELS, PictureFolder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(root / "train2017" / "1.jpg")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    return PictureFolder(root)


def png(width, height):
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def refused(folder, name):
    for look in (folder.size, folder.read):
        with pytest.raises(UserError) as caught:
            look(name)
        assert name.split("/")[-1] in str(caught.value)
        assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_picture_is_read_as_rgb(folder):
    Image.new("P", (6, 5)).save(folder.root / "p.png", transparency=b"\0\1")
    Image.new("L", (4, 7), 9).save(folder.root / "grey.png")
    assert folder.size("train2017/1.jpg") == (40, 30)
    assert (folder.read("p.png").mode, folder.read("p.png").size) == ("RGB", (6, 5))
    assert folder.read("grey.png").getpixel((0, 0)) == (9, 9, 9)


def test_it_is_not_turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(folder.root / "turned.jpg", exif=exif)
    assert folder.read("turned.jpg").size == (20, 10)


def test_nothing_outside_is_read(folder, tmp_path):
    (folder.root / "link.png").symlink_to(tmp_path / "secret.png")
    (folder.root / "out").symlink_to(tmp_path)
    for name in (
        "../secret.png",
        "train2017/../../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "out/secret.png",
    ):
        with pytest.raises(UserError, match="lies outside --images"):
            folder.find(name)
        assert "lies outside" in refused(folder, name)


def test_links_inside_are_followed(folder):
    (folder.root / "same.jpg").symlink_to(folder.root / "train2017" / "1.jpg")
    assert folder.size("same.jpg") == (40, 30)


def test_what_is_no_file_is_missing(folder):
    (folder.root / "loop").symlink_to(folder.root / "loop")
    for name in ("none.jpg", "train2017", "a\0b", "x" * 5000, "loop"):
        assert folder.find(name) is None


def test_size_is_checked_before_decoding(folder):
    (folder.root / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder.root / "large.png").write_bytes(png(MOST_PIXELS // 5000 + 1, 5000))
    (folder.root / "fits.png").write_bytes(png(MOST_PIXELS // 5000, 5000))
    assert "too large to be decoded" in refused(folder, "bomb.png")
    assert "10001 x 5000" in refused(folder, "large.png")
    assert folder.size("fits.png") == (10_000, 5000)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", png(0, 7), b"\xff\xd8\xff\xe0 cut", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_what_is_no_picture_is_told(folder, content):
    (folder.root / "bad.jpg").write_bytes(content)
    said = refused(folder, "bad.jpg")
    assert "can't be read" in said or "no pixels" in said


def test_a_cut_off_picture_is_told_when_it_is_read(folder):
    path = folder.root / "train2017" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"1\.jpg.* can't be read"):
        folder.read("train2017/1.jpg")


def test_the_folder_itself_is_checked(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        PictureFolder(tmp_path / "none").find("1.jpg")
