"""Loading the data: what MNIST is, and every way in which a file can be wrong."""

import hashlib
import struct
import tracemalloc
import zipfile

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


def batch_of(x_train, batch_size, seed, iteration):
    """Return the batch of one iteration."""
    return next(vae_mnist.random_batches(x_train, batch_size, seed, first=iteration))


def numbered_images(count):
    """Return images of which each one's first two pixels are its number."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    return images


def numbers(batch):
    """Return which of the numbered images a batch holds."""
    return np.rint(batch[:, 0] * 255).astype(int) * 256 + np.rint(batch[:, 1] * 255).astype(int)


def test_batch_is_drawn_from_seed_and_iteration_with_replacement():
    x_train = np.arange(60, dtype=np.uint8)[:, None, None] + np.zeros((1, 28, 28), np.uint8)
    batch = batch_of(x_train, 3000, seed=5, iteration=9)
    assert batch.dtype == np.float32 and batch.shape == (3000, 784)
    assert np.array_equal(batch, batch_of(x_train, 3000, seed=5, iteration=9))
    for other in [(5, 10), (6, 9), (9, 5), (5, 73)]:  # 64 iterations are drawn together
        assert not np.array_equal(batch, batch_of(x_train, 3000, *other))
    counts = np.bincount(np.rint(batch[:, 0] * 255).astype(int), minlength=60)
    assert len(counts) == 60
    chi_square = np.sum((counts - 50) ** 2 / 50)  # 59 degrees of freedom
    assert 25 < chi_square < 110


def test_every_iteration_draws_another_batch_wherever_it_starts():
    x_train = numbered_images(60000)
    batches = vae_mnist.random_batches(x_train, 4, seed=0)
    forwards = [batch.copy() for _, batch in zip(range(200), batches)]
    backwards = [batch_of(x_train, 4, 0, i) for i in reversed(range(200))]
    assert np.array_equal(forwards, backwards[::-1])
    assert len({batch.tobytes() for batch in forwards}) == 200


def test_batches_are_the_ones_that_the_seed_has_always_drawn():
    """A run that an earlier version left unfinished goes on with the same batches."""
    for batch_size, iteration in [(3, 0), (256, 70), (4096, 63)]:
        block, row = divmod(iteration, 64)
        drawn = np.random.default_rng([7, block]).integers(60000, size=(64, batch_size))[row]
        batch = batch_of(numbered_images(60000), batch_size, 7, iteration)
        assert np.array_equal(numbers(batch), drawn)


def test_indices_of_big_batches_take_little_memory(monkeypatch):
    """A million images: 512 MB for 64 iterations, 8 MB for one. Images of one pixel here."""
    monkeypatch.setattr(vae_mnist, "PIXELS", 1)
    x_train = np.arange(200, dtype=np.uint8).reshape(200, 1, 1)
    tracemalloc.start()
    try:
        batches = vae_mnist.random_batches(x_train, 1_000_000, seed=0)
        first, second = next(batches).copy(), next(batches).copy()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6 and not np.array_equal(first, second)
    assert np.array_equal(second, batch_of(x_train, 1_000_000, 0, 1))


def test_batch_starts_where_tensorflow_reads_it_in_place():
    for batch_size in (1, 3, 256):
        batch = batch_of(np.zeros((5, 28, 28), np.uint8), batch_size, 0, 0)
        assert batch.ctypes.data % 64 == 0 and batch.flags.c_contiguous


def test_pixels_are_scaled_as_in_the_tutorial():
    x = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    expected = (x / 255.0).reshape(-1, 784).astype(np.float32)
    assert np.array_equal(batch_of(x, 1, 0, 0), expected)


def test_images_in_columns_order_are_taken_too(tmp_path):
    """Their hash, which belongs to the run, is of the images and not of how they lie."""
    x_train = np.random.default_rng(0).integers(256, size=(3, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", **{**arrays(), "x_train": np.asfortranarray(x_train)})
    (loaded, _), _ = vae_mnist.load_mnist(tmp_path / "d.npz")
    assert loaded.flags.c_contiguous and np.array_equal(loaded, x_train)


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


def huge(path):
    """Write an archive whose header claims 700 TB."""
    with zipfile.ZipFile(path, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
        with archive.open("x_train.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)


def marked(offset, value):
    """Return a function that writes an archive with two bytes of its first member's headers set."""

    def write(path):
        np.savez(path, **arrays())
        content = bytearray(path.read_bytes())
        central = content.index(b"PK\1\2")
        for place in (offset, central + offset + 2):  # the central directory's is 2 further on
            content[place : place + 2] = value.to_bytes(2, "little")
        path.write_bytes(content)

    return write


def raw(path):
    """Write an archive whose members are no arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"raw")


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
    "no arrays": (raw, "uint8"),
    "of 700 TB": (huge, "Unable to allocate"),
    "encrypted": (marked(6, 1), "encrypted"),
    "of unknown compression": (marked(8, 99), "compression"),
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
