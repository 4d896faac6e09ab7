"""Loading the data: what MNIST is, and every way in which a file can be wrong."""

import hashlib
import struct

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import vae_mnist

# The published MD5 sums of the four original files, uncompressed (../data holds the same arrays).
ORIGINALS = [
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
]


def arrays(count=3):
    """Return the arrays of a small valid data set."""
    return {
        "x_train": np.full((count, 28, 28), 7, np.uint8),
        "y_train": np.arange(count, dtype=np.uint8),
        "x_test": np.full((2, 28, 28), 9, np.uint8),
        "y_test": np.array([1, 0]),
    }


def test_data_is_the_original_mnist(mnist):
    (x_train, y_train), (x_test, y_test) = mnist
    for array, md5 in zip((x_train, y_train, x_test, y_test), ORIGINALS):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        assert hashlib.md5(header + array.tobytes()).hexdigest() == md5


def test_any_archive_with_the_same_keys_works(tmp_path):
    np.savez(tmp_path / "d.npz", **arrays())
    (x_train, y_train), (x_test, y_test) = vae_mnist.load_mnist(tmp_path / "d.npz")
    assert x_train.dtype == np.uint8 and x_train.shape == (3, 28, 28) and (x_train == 7).all()
    assert y_train.tolist() == [0, 1, 2] and x_test[0, 0, 0] == 9 and y_test.tolist() == [1, 0]


def test_batch_is_drawn_from_seed_and_iteration_with_replacement():
    x_train = np.arange(60, dtype=np.uint8)[:, None, None] + np.zeros((1, 28, 28), np.uint8)
    batch = vae_mnist.random_batch(x_train, 3000, seed=5, iteration=9)
    assert batch.dtype == np.float32 and batch.shape == (3000, 784)
    assert np.array_equal(batch, vae_mnist.random_batch(x_train, 3000, seed=5, iteration=9))
    for other in [(5, 10), (6, 9), (9, 5), (5, 73)]:  # 64 iterations are drawn together
        assert not np.array_equal(batch, vae_mnist.random_batch(x_train, 3000, *other))
    counts = np.bincount(np.rint(batch[:, 0] * 255).astype(int), minlength=60)
    assert len(counts) == 60
    chi_square = np.sum((counts - 50) ** 2 / 50)  # 59 degrees of freedom
    assert 25 < chi_square < 110


def test_every_iteration_draws_another_batch_in_whatever_order():
    x_train = np.zeros((60000, 28, 28), np.uint8)
    x_train[:, 0, 0], x_train[:, 0, 1] = np.divmod(np.arange(60000), 256)  # each image its number
    forwards = [vae_mnist.random_batch(x_train, 4, 0, i) for i in range(200)]
    backwards = [vae_mnist.random_batch(x_train, 4, 0, i) for i in reversed(range(200))]
    assert np.array_equal(forwards, backwards[::-1])
    assert len({batch.tobytes() for batch in forwards}) == 200


def test_batch_memory_is_aligned_as_tensorflow_needs_it_to_read_in_place():
    for batch_size in (1, 3, 256):
        memory = vae_mnist.batch_memory(batch_size)
        assert memory.shape == (batch_size, 784) and memory.dtype == np.float32
        assert memory.ctypes.data % 64 == 0 and memory.flags.writeable and memory.flags.c_contiguous


def test_pixels_are_scaled_as_in_the_tutorial():
    x = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    expected = (x / 255.0).reshape(-1, 784).astype(np.float32)
    assert np.array_equal(vae_mnist.random_batch(x, 1, 0, 0), expected)


def wrong(**changes):
    """Return a function that writes an archive with some arrays changed, or left out (None)."""

    def write(path):
        changed = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
        np.savez(path, **changed)

    return write


def truncated(share):
    """Return a function that writes the first part of a valid archive."""

    def write(path):
        np.savez_compressed(path, **arrays(500))
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return write


def damaged(path):
    """Write an archive with a bit of its data turned over."""
    np.savez(path, **arrays(500))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


BAD = {
    "missing": (lambda path: None, "No such file"),
    "directory": (lambda path: path.mkdir(), "directory"),
    "text": (lambda path: path.write_text("hello"), "expected an .npz archive"),
    "nothing": (lambda path: path.write_text(""), "expected an .npz archive"),
    "npy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "expected an .npz archive"),
    "truncated early": (truncated(0.1), "truncated"),
    "truncated late": (truncated(0.99), "truncated"),
    "damaged": (damaged, "x_train"),
    "no labels": (wrong(y_train=None), "y_train"),
    "no images": (wrong(x_train=None), "x_train"),
    "no test images": (wrong(x_test=None), "x_test"),
    "flat": (wrong(x_train=np.zeros((3, 784), np.uint8)), "(N, 28, 28)"),
    "scalar": (wrong(x_train=np.uint8(3)), "(N, 28, 28)"),
    "float images": (wrong(x_train=np.zeros((3, 28, 28))), "float64"),
    "empty": (wrong(x_train=np.zeros((0, 28, 28), np.uint8), y_train=np.zeros(0, int)), "N > 0"),
    "labels of another length": (wrong(y_train=np.arange(4)), "(3,)"),
    "float labels": (wrong(y_train=np.zeros(3)), "float64"),
    "pickled": (wrong(y_train=np.array([{}, 1, 2], object)), "pickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_file_is_refused_in_one_line_before_anything_is_written(case, tmp_path, capsys):
    path, output = tmp_path / "bad.npz", tmp_path / "out"
    write, expected = BAD[case]
    write(path)
    with pytest.raises(SystemExit) as stop:
        vae_mnist.main(["--data", str(path), "--output-dir", str(output)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and not output.exists()
    assert err.count("\n") == 1 and str(path) in err and expected in err


def test_module_alone_uses_what_keras_has_or_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae_mnist, "HERE", tmp_path)
    found = object()
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: found)
    assert vae_mnist.load_mnist() is found

    def fail():
        raise Exception("URL fetch failure on https://example.org: \n unreachable")  # noqa: TRY002

    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", fail)
    with pytest.raises(SystemExit) as stop:
        vae_mnist.main(["--output-dir", str(tmp_path / "out")])
    _, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and "--data FILE" in err
    assert not list(tmp_path.iterdir())
