"""Short runs of the program in this process, and what is compared of them."""

import json

import tensorflow.compat.v1 as tf

import vae_mnist

DATA = "data-00000-of-00001"  # how TensorFlow ends the name of a checkpoint's larger file
SHORT = ["--iterations", "6", "--batch-size", "8", "--log-every", "2", "--checkpoint-every", "3"]


def main(output, *options):
    """Run the program in this process; return its exit status."""
    try:
        return vae_mnist.main([*SHORT, "--output-dir", str(output), *map(str, options)])
    except SystemExit as stop:
        return stop.code


def refused(capsys, output, *options):
    """Run the program, which must refuse in one line and change no file; return the line."""
    before = content(output)
    capsys.readouterr()
    assert main(output, *options) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert content(output) == before
    return err


def content(folder):
    """Return the bytes of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def record(output):
    """Return what run.json says."""
    return json.loads((output / "checkpoint" / "run.json").read_text())


def variables(output):
    """Return every variable of the newest checkpoint, by name, as bytes."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(output / "checkpoint")))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name).tobytes() for name in names}


def kept_files(output, before):
    """Return which files must stay whatever a save does: not those that it writes to."""
    name = record(output)["checkpoint_name"]
    other = {"vae_mnist-a": "vae_mnist-b", "vae_mnist-b": "vae_mnist-a"}[name]
    return [path for path in before if path.stem != other]


def assert_same_run(output, expected):
    """Every variable, log, picture and page are the same bytes, and no stray file is left."""
    assert variables(output) == variables(expected)
    for name in ("log.csv", "latent.png", "explore.html"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    slots = {f"vae_mnist-{slot}.{end}" for slot in "ab" for end in ("index", DATA)}
    files = [
        {path for path in content(run) if path.name not in slots} for run in (output, expected)
    ]
    assert files[0] == files[1]
    newest = tf.train.latest_checkpoint(output / "checkpoint")
    assert newest == str(output / "checkpoint" / record(output)["checkpoint_name"])
