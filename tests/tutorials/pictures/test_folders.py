import numpy as np
import pytest
import torch
from PIL import Image

from tutorials.pictures import celeba, imagenet


def picture(path, shade, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def faces(tmp_path):
    for number, shade in enumerate((10, 20, 30, 40), 1):
        picture(tmp_path / "img_align_celeba" / f"00000{number}.jpg", shade)
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n")
    return tmp_path


def test_parts_of_celeba(faces):
    assert [path.name for path in celeba(faces, "train").paths] == ["000001.jpg", "000002.jpg"]
    drawn = celeba(faces, "test", side=16).draw(1, generator())
    assert drawn.shape == (1, 3, 16, 16)
    assert drawn[0, 0].mean() * 255 == pytest.approx(40, abs=3)  # JPEG loses a little
    both = celeba(faces, "train", side=8).draw(2, generator())
    assert sorted((both[:, 0].mean((1, 2)) * 255).round().int().tolist()) == pytest.approx([10, 20], abs=3)


def test_celeba_that_does_not_fit(faces):
    table = faces / "list_eval_partition.txt"
    table.write_text("000001.jpg 0\n000009.jpg 0\n")
    with pytest.raises(ValueError, match=r"line 2: expected the picture .*000009\.jpg, which is not there"):
        celeba(faces, "train")
    table.write_text("000001.jpg 0\n000002.jpg 7\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt, line 2: expected a file name and 0, 1 or 2, got"):
        celeba(faces, "train")
    table.write_text("../secret.jpg 0\n")
    with pytest.raises(ValueError, match=r"line 1: expected a file name and 0, 1 or 2, got '\.\./secret\.jpg 0'"):
        celeba(faces, "train")
    table.write_bytes("é.jpg 0".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt: expected CelebA's partition, got 'utf-8' codec"):
        celeba(faces, "train")
    table.write_text("000001.jpg 0\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt \(test\): expected at least one picture, found none"):
        celeba(faces, "test")
    table.unlink()
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt: expected CelebA's partition, got No such file"):
        celeba(faces, "train")
    with pytest.raises(ValueError, match="split='dev'"):
        celeba(faces, "dev")


def test_files_are_read_when_they_are_drawn(faces):
    source = celeba(faces, "validation")
    path = faces / "img_align_celeba" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000003\.jpg: expected a picture, got"):
        source.draw(1, generator())
    with pytest.raises(ValueError, match="count=2: expected an integer from 1 to the 1 pictures"):
        source.draw(2, generator())


def test_parts_of_imagenet(tmp_path):
    for place in ("n01", "n02"):
        for number in range(20):
            picture(tmp_path / "train" / place / f"{place}_{number:02}.JPEG", 50)
        picture(tmp_path / "val" / place / "a.JPEG", 60)
    assert len(imagenet(tmp_path, "train").paths) == 38
    assert [path.name for path in imagenet(tmp_path, "validation").paths] == ["n01_19.JPEG", "n02_19.JPEG"]
    assert len(imagenet(tmp_path, "test").paths) == 2
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(ValueError, match=r"n03: expected pictures \(\.jpeg, \.jpg, \.png\), found none"):
        imagenet(tmp_path, "test")
    with pytest.raises(ValueError, match="train: expected a folder with one for each class"):
        imagenet(tmp_path / "elsewhere", "train")
    with pytest.raises(ValueError, match="split='dev'"):
        imagenet(tmp_path, "dev")


def test_the_middle_is_kept_and_gray_pictures_are_coloured(tmp_path):
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    place = tmp_path / "val" / "n01"
    place.mkdir(parents=True)
    Image.fromarray(pixels).save(place / "a.png")
    assert torch.equal(imagenet(tmp_path, "test", side=5).draw(1, generator()), torch.ones(1, 3, 5, 5))
    with pytest.raises(ValueError, match="side=0"):
        imagenet(tmp_path, "test", side=0)


def test_pictures_of_many_pixels_are_refused(faces, monkeypatch):
    for limit in (500, 200):  # the faces have 600: where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"000003\.jpg: expected a picture, got DecompressionBomb"):
            celeba(faces, "validation").draw(1, generator())


def test_formats_that_start_other_programs_are_refused(faces):
    path = faces / "img_align_celeba" / "000003.jpg"
    Image.new("RGB", (9, 9)).save(path, "EPS")  # Pillow hands it to Ghostscript
    with pytest.raises(ValueError, match=r"000003\.jpg: expected a picture, got UnidentifiedImageError"):
        celeba(faces, "validation").draw(1, generator())
