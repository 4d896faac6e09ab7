"""Loading the data: what MNIST is, and every way in which a file can be wrong."""

import gzip
import hashlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from runs import main, settings, stopped

import vae_mnist

# The published MD5 sums of the four original files, uncompressed (../data holds the same arrays).
ORIGINALS = [
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
]


def arrays(**changes):
    """Return the arrays of a small valid data set, some of them changed, or left out (None)."""
    images = np.arange(3 * 784).reshape(3, 28, 28).astype(np.uint8)
    given = {"x_train": images, "y_train": np.arange(3, dtype=np.uint8)}
    given |= {"x_test": images[1:], "y_test": np.array([1, 0])}
    return {name: array for name, array in {**given, **changes}.items() if array is not None}


def test_data_is_the_original_mnist(mnist):
    (x_train, y_train), (x_test, y_test) = mnist
    for array, md5 in zip((x_train, y_train, x_test, y_test), ORIGINALS):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        assert hashlib.md5(header + array.tobytes()).hexdigest() == md5


def test_batches_are_decided_by_seed_and_iteration():
    """Whatever the version: a run that is resumed goes on with the batches of its seed."""
    x_train = np.random.default_rng(0).integers(256, size=(1000, 28, 28), dtype=np.uint8)
    as_in_the_tutorial = (x_train / 255.0).reshape(-1, 28**2).astype(np.float32)
    batches = vae_mnist.random_batches(x_train, 64, seed=7)
    for i, batch in zip(range(5), batches):
        batch_idx = np.random.default_rng([7, i]).integers(1000, size=64)
        expected = as_in_the_tutorial[batch_idx]
        assert batch.dtype == np.float32 and np.array_equal(batch, expected)
        from_there = next(vae_mnist.random_batches(x_train, 64, seed=7, first=i))
        assert np.array_equal(from_there, expected)


def test_images_of_another_form_are_refused_and_not_reshaped():
    for images, given in [
        (np.zeros((2, 28, 28, 4), np.uint8), "uint8 (2, 28, 28, 4)"),  # RGBA
        (np.zeros((112, 112), np.uint8), "uint8 (112, 112)"),
        (np.zeros((2, 28, 28)), "float64 (2, 28, 28)"),  # scaled already?
        (np.zeros((2, 2, 28, 28), np.uint8), "uint8 (2, 2, 28, 28)"),
    ]:
        with pytest.raises(ValueError) as refused:
            vae_mnist.scale(images)
        assert str(refused.value) == f"expected images, uint8 (N, 28, 28) or (28, 28), got {given}"
    image = np.arange(784, dtype=np.uint8).reshape(28, 28)  # one image is a batch of one
    assert np.array_equal(vae_mnist.scale(image), vae_mnist.scale(image[None]))


IMAGES = arrays()["x_train"]


class Trap:
    """What must never be unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


FORMS = {
    "as they are": {},
    "a channel": {"x_train": IMAGES[..., None]},
    "flat": {"x_train": IMAGES.reshape(3, 784)},
    "big-endian": {"x_train": IMAGES.astype(">u2")},
    "columns first": {"x_train": np.asfortranarray(IMAGES)},
    "labels in a column": {"y_train": np.arange(3)[:, None]},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_the_same_images_are_brought_into_one(form, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(**FORMS[form]))
    (x_train, y_train), (x_test, y_test) = vae_mnist.load_mnist(tmp_path / "d.npz")
    assert x_train.dtype == np.uint8 and np.array_equal(x_train, IMAGES)
    assert np.array_equal(x_test, IMAGES[1:])
    assert y_train.dtype.kind in "iu" and y_train.tolist() == [0, 1, 2]
    assert y_test.tolist() == [1, 0]


@pytest.mark.slow
def test_hash_of_the_images_does_not_depend_on_their_order_in_memory(tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(x_train=np.asfortranarray(IMAGES)))
    assert main(tmp_path / "run", "--data", tmp_path / "d.npz", "--iterations", 1) == 0
    expected = hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert settings(tmp_path / "run")["images_sha256"] == expected


@pytest.mark.slow
def test_labels_may_be_missing_and_are_one_class_then(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=IMAGES, x_test=IMAGES)
    (_, y_train), (_, y_test) = vae_mnist.load_mnist(tmp_path / "d.npz")
    assert y_train.tolist() == y_test.tolist() == [0, 0, 0]
    assert main(tmp_path / "run", "--data", tmp_path / "d.npz", "--report") == 0


def truncated(path):
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-9])


def archive(**changes):
    """Return a function that writes an archive with some arrays changed."""
    return lambda path: np.savez(path, **arrays(**changes))


BAD = {
    "missing": (lambda path: None, "No such file"),
    "CSV": (lambda path: path.write_text("label,pixel0\n5,0\n"), ""),
    "nothing": (lambda path: path.write_text(""), ""),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"")), ""),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Trap(), 2)), ""),
    "one array": (lambda path: np.save(path.open("wb"), IMAGES), ""),
    "other names": (lambda path: np.savez(path, a=0, b=0), "x_train is not a file in the archive"),
    "truncated": (truncated, "not a zip file"),
    "colour": (archive(x_train=np.zeros((3, 28, 28, 3), np.uint8)), "(3, 28, 28, 3)"),
    "scaled": (archive(x_train=IMAGES / 255), "x_train is float64 (3, 28, 28)"),
    "empty": (archive(x_test=IMAGES[:0]), "x_test is uint8 (0, 28, 28); expected integers"),
    "binarized": (archive(x_train=IMAGES // 128), "from 0 to 1; expected grey from 0 to 255"),
    "signed": (archive(x_train=IMAGES.astype(int) - 300), "has values from -300 to -45"),
    "16 bits": (archive(x_test=IMAGES[1:].astype(int) + 700), "has values from 700 to 955"),
    "other count": (archive(y_train=np.arange(4)), "y_train is int64 (4,); expected"),
    "folded labels": (archive(y_train=np.arange(4).reshape(2, 2)), "y_train is int64 (2, 2)"),
    "float labels": (archive(y_train=np.zeros(3)), "y_train is float64 (3,); expected integers"),
    "object labels": (archive(y_train=np.array([Trap(), 1])), "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_file_is_refused_in_one_line_before_anything_is_written(case, tmp_path, capsys):
    write, expected = BAD[case]
    write(tmp_path / "bad.npz")
    err = stopped(capsys, 2, tmp_path / "out", "--data", tmp_path / "bad.npz")
    assert not (tmp_path / "out").exists()
    assert err.startswith(f"vae_mnist.py: error: {tmp_path / 'bad.npz'}: expected an .npz archive")
    assert expected in err and 'README has a recipe, "Other data"' in err


def test_too_little_memory_is_not_called_a_damaged_file(tmp_path, capsys):
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as huge, huge.open("x_train.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}  # 700 TB
        np.lib.format.write_array_header_1_0(member, header)
    assert "Unable to allocate" in stopped(capsys, 1, tmp_path / "out", "--data", path)


def test_module_alone_uses_what_keras_has_or_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae_mnist, "DATA", tmp_path)
    found = object()
    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", lambda: found)
    assert vae_mnist.load_mnist() is found

    def fail():
        raise Exception("URL fetch failure on https://example.org: \n unreachable")  # noqa: TRY002

    monkeypatch.setattr(tf.keras.datasets.mnist, "load_data", fail)
    with pytest.raises(SystemExit, match="2"):
        vae_mnist.main(["--output-dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "URL fetch failure" in err and "mnist.npz: expected" in err
    assert not list(tmp_path.iterdir())
