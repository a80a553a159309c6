import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from tutorials.pictures import full_mnist, read_idx


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name, count, pack in (("train", 24, gzip.compress), ("t10k", 5, bytes)):
        suffix = ".gz" if name == "train" else ""
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    return tmp_path


def test_the_parts_of_mnist(folder):
    images, labels = full_mnist(folder, "train")
    assert images.shape == (22, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(22)]
    stored = read_idx(folder / "train-images-idx3-ubyte.gz", 3)
    assert np.allclose(images.numpy() * 255, stored[:22])
    assert full_mnist(folder, "validation")[1].tolist() == [2, 3]
    assert full_mnist(folder, "test")[1].tolist() == [0, 1, 2, 3, 4]


def test_damaged_files_are_named(folder):
    path = folder / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: expected 3920 values, of shape \(5, 28, 28\), got 3919"):
        full_mnist(folder, "test")
    path.write_bytes(whole[:9])
    with pytest.raises(ValueError, match="expected 3 sizes, but the file ends after 9 bytes"):
        full_mnist(folder, "test")
    path.write_bytes(b"\x00\x00\x0d\x03" + whole[4:])
    with pytest.raises(ValueError, match="expected the magic number 00000803, got 00000d03"):
        full_mnist(folder, "test")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected the magic number 00000803, got nothing"):
        full_mnist(folder, "test")
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"ubyte\.gz: expected an IDX file, got EOFError"):
        full_mnist(folder, "train")
    packed.write_bytes(packed.read_bytes()[:12] + b"no deflate")
    with pytest.raises(ValueError, match=r"ubyte\.gz: expected an IDX file, got error: Error -3"):
        full_mnist(folder, "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"expected t10k-images-idx3-ubyte or t10k-images-idx3-ubyte\.gz there"):
        full_mnist(folder, "test")


def test_labels_must_fit(folder):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx(np.array([0, 1, 2, 3], dtype=np.uint8)))
    with pytest.raises(ValueError, match="expected as many labels as images, got 4 for 5"):
        full_mnist(folder, "test")
    path.write_bytes(idx(np.array([0, 1, 2, 13, 4], dtype=np.uint8)))
    with pytest.raises(ValueError, match="expected labels from 0 to 9, got 13 at 3"):
        full_mnist(folder, "test")
    with pytest.raises(ValueError, match="split='dev'"):
        full_mnist(folder, "dev")


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (0, 28, 28), (2**20, 32, 33)])
def test_absurd_sizes_are_refused_before_memory_is_asked_for(shape, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape))
    tracemalloc.start()
    with pytest.raises(ValueError, match="images: expected 1 to 1073741824 values, got the shape"):
        read_idx(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_file_that_unpacks_to_more_than_it_announces_is_not_read_on(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((1, 4, 4), np.uint8)) + b"\0" * 2**26))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"images\.gz: expected 16 values, of shape \(1, 4, 4\), got more"):
        read_idx(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_mnist_has_28_pixels_a_side(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 27, 28), np.uint8)))
    with pytest.raises(ValueError, match=r"expected images of 28 x 28 pixels, got \(27, 28\) \(t10k\)"):
        full_mnist(folder, "test")
