"""Loading the data: what MNIST is, and every way in which a file can be wrong."""

import gzip
import hashlib
import pickle
import struct
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
    for other in [(5, 10), (6, 9), (9, 5)]:
        assert not np.array_equal(batch, batch_of(x_train, 3000, *other))
    counts = np.bincount(np.rint(batch[:, 0] * 255).astype(int), minlength=60)
    assert len(counts) == 60
    chi_square = np.sum((counts - 50) ** 2 / 50)  # 59 degrees of freedom
    assert 25 < chi_square < 110


def test_every_iteration_draws_another_batch_wherever_it_starts():
    x_train = numbered_images(60000)
    batches = vae_mnist.random_batches(x_train, 4, seed=0)
    forwards = [batch for _, batch in zip(range(200), batches)]  # they may be kept
    backwards = [batch_of(x_train, 4, 0, i) for i in reversed(range(200))]
    assert np.array_equal(forwards, backwards[::-1])
    assert len({batch.tobytes() for batch in forwards}) == 200


def test_batches_are_those_of_one_generator_drawn_in_turn():
    """Whatever the version: a run that is resumed goes on with the batches of its seed."""
    rng = np.random.default_rng(7)
    batches = vae_mnist.random_batches(numbered_images(60000), 256, seed=7)
    for _, batch in zip(range(5), batches):
        assert np.array_equal(numbers(batch), rng.integers(60000, size=256))


def test_pixels_are_scaled_as_in_the_tutorial():
    x = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    expected = (x / 255.0).reshape(-1, 784).astype(np.float32)
    assert np.array_equal(batch_of(x, 1, 0, 0), expected)


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (np.zeros((2, 28, 28, 4), np.uint8), "uint8 (2, 28, 28, 4)"),  # RGBA
        (np.zeros((28, 28, 4), np.uint8), "uint8 (28, 28, 4)"),
        (np.zeros((112, 112), np.uint8), "uint8 (112, 112)"),
        (np.zeros((3, 784), np.uint8), "uint8 (3, 784)"),
        (np.zeros((28, 28)), "float64 (28, 28)"),  # scaled already?
        (np.zeros((2, 28, 28), np.float32), "float32 (2, 28, 28)"),
        (np.zeros((2, 28, 28), np.int64), "int64 (2, 28, 28)"),
        (np.zeros((2, 2, 28, 28), np.uint8), "uint8 (2, 2, 28, 28)"),
        (np.zeros(28, np.uint8), "uint8 (28,)"),
    ],
)
def test_images_of_another_form_are_refused_and_not_reshaped(images, given):
    with pytest.raises(ValueError) as refused:
        vae_mnist.scale(images)
    assert str(refused.value) == f"expected images, uint8 (N, 28, 28) or (28, 28), got {given}"
    with pytest.raises(ValueError, match="expected images, uint8"):
        vae_mnist.evaluate(None, None, images)
    if images.ndim > 2 and images.shape[0] == 2:
        with pytest.raises(ValueError, match="expected images, uint8"):
            next(vae_mnist.random_batches(images))


def test_one_image_is_a_batch_of_one():
    image = np.arange(784, dtype=np.uint8).reshape(28, 28)
    assert np.array_equal(vae_mnist.scale(image), vae_mnist.scale(image[None]))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"x_train": a["x_train"][..., None]},
        lambda a: {"x_train": a["x_train"].reshape(3, 784), "x_test": a["x_test"].reshape(2, 784)},
        lambda a: {"y_train": a["y_train"][:, None], "y_test": a["y_test"][:, None]},
        lambda a: {"y_train": a["y_train"].astype(np.int8), "y_test": a["y_test"].astype("uint64")},
        lambda a: {"x_train": a["x_train"].astype(np.int64)},
        lambda a: {"x_train": a["x_train"].astype(">u2"), "x_test": a["x_test"].astype(np.int16)},
    ],
    ids=["a channel", "flat", "labels in a column", "types of labels", "int64", "big-endian"],
)
def test_other_forms_of_the_same_images_are_brought_into_one(change, tmp_path):
    given = arrays()
    given["x_train"] = np.arange(3 * 784).reshape(3, 28, 28).astype(np.uint8)
    np.savez(tmp_path / "d.npz", **{**given, **change(given)})
    (x_train, y_train), (x_test, y_test) = vae_mnist.load_mnist(tmp_path / "d.npz")
    for found, name in ((x_train, "x_train"), (x_test, "x_test")):
        assert found.dtype == np.uint8 and np.array_equal(found, given[name])
    for found, name in ((y_train, "y_train"), (y_test, "y_test")):
        assert found.dtype.kind in "iu" and np.array_equal(found, given[name])


def test_labels_may_be_missing_and_are_one_class_then(tmp_path):
    given = {name: array for name, array in arrays().items() if name.startswith("x")}
    np.savez(tmp_path / "d.npz", **given)
    (x_train, y_train), (x_test, y_test) = vae_mnist.load_mnist(tmp_path / "d.npz")
    assert np.array_equal(x_train, given["x_train"]) and len(x_test) == 2
    assert y_train.tolist() == [0, 0, 0] and y_test.tolist() == [0, 0]
    options = ["--data", str(tmp_path / "d.npz"), "--iterations", "2", "--report"]
    assert vae_mnist.main([*options, "--output-dir", str(tmp_path / "run")]) == 0


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


def only(**named):
    """Return a function that writes an archive with these arrays alone."""
    return lambda path: np.savez(path, **named)


def packed(kind):
    """Return a function that writes a file as Python packs objects: compressed, or as it is."""

    def write(path):
        content = pickle.dumps(arrays())
        path.write_bytes(gzip.compress(content) if kind == "gzip" else content)

    return write


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
    "CSV": (lambda path: path.write_text("label,pixel0\n5,0\n"), "is no .npz archive, but text"),
    "nothing": (lambda path: path.write_text(""), "is no .npz archive, but an empty file"),
    "npy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "but a single array"),
    "mnist.pkl.gz": (packed("gzip"), "is no .npz archive, but a gzip file"),
    "mnist.pkl": (packed("pickle"), "is no .npz archive, but a pickle"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG"), "but a file of another kind"),
    "MedMNIST": (
        only(train_images=np.zeros(3), train_labels=np.zeros(3), test_images=np.zeros(3)),
        "has train_images, train_labels, test_images; expected x_train, y_train, x_test, y_test",
    ),
    "KMNIST": (only(arr_0=np.zeros((3, 28, 28))), "has arr_0; expected x_train"),
    "truncated": (truncated(0.99), "damaged or truncated"),
    "damaged": (damaged, "x_train is damaged"),
    "no test images": (wrong(x_test=None), "has x_train, y_train, y_test; expected x_train"),
    "scalar": (wrong(x_train=np.uint8(3)), "x_train is uint8 (); expected"),
    "colour": (wrong(x_train=np.zeros((3, 28, 28, 3), np.uint8)), "(3, 28, 28, 3)"),
    "scaled": (wrong(x_train=np.zeros((3, 28, 28))), "x_train is float64 (3, 28, 28)"),
    "Boolean": (wrong(x_train=np.ones((3, 28, 28), bool)), "x_train is bool"),
    "binarized": (
        wrong(x_train=np.eye(28, dtype=np.uint8)[None].repeat(3, 0)),
        "x_train has values from 0 to 1; expected grey from 0 to 255",
    ),
    "signed": (wrong(x_train=np.full((3, 28, 28), -7)), "values from -7 to -7; expected"),
    "16 bits": (wrong(x_test=np.full((2, 28, 28), 999)), "x_test has values from 999 to 999"),
    "empty": (wrong(x_train=np.zeros((0, 28, 28), np.uint8), y_train=np.zeros(0, int)), "N > 0"),
    "labels of another length": (wrong(y_train=np.arange(4)), "y_train is int64 (4,); expected"),
    "float labels": (wrong(y_train=np.zeros(3)), "y_train is float64 (3,); expected integers (3,)"),
    "no arrays": (raw, "x_train"),
    "encrypted": (marked(6, 1), "encrypted"),
    "labels as objects": (
        wrong(y_train=np.array([{}, 1, 2], object)),
        "y_train holds Python objects",
    ),
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


@pytest.mark.parametrize(("resource", "said"), [("memory", "no memory"), ("files", "open files")])
def test_too_little_of_the_machine_is_not_called_a_damaged_file(
    resource, said, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "d.npz"
    if resource == "memory":
        huge(path)
    else:
        np.savez(path, **arrays())

        def member(self, name):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", member)
    with pytest.raises(SystemExit) as stop:
        vae_mnist.main(["--data", str(path), "--output-dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == (1 if resource == "memory" else 2)
    assert err.count("\n") == 1 and said in err and "damaged" not in err
    assert str(path) in err and not (tmp_path / "out").exists()


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
