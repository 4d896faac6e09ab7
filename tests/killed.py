"""The program in a process that kills itself, or is interrupted, at a moment: killed.py MOMENT OPTIONS.

Each moment replaces a function that the program calls by one that ends the process instead.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.figure
import tensorflow.compat.v1 as tf

import vae_mnist


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_second_rename():
    """Of run.json, of the first save after the start or the second one of a resumed run."""
    replace = os.replace
    renamed = []

    def second(*names):
        renamed.append(names)
        if len(renamed) == 2:
            kill()
        replace(*names)

    os.replace = second


def in_half_a_picture():
    def half(self, path, **_):
        path.write_bytes(b"half")
        kill()

    matplotlib.figure.Figure.savefig = half


def in_half_a_log():
    """Some of the new lines are written, and the last of these is cut."""
    write_log = vae_mnist.Run.write_log

    def half(run):
        if run.made < run.wanted:
            return write_log(run)
        with open(run.directory / "log.csv", "a") as file:
            file.write("".join(run.new_lines)[:-5])
        kill()

    vae_mnist.Run.write_log = half


def before_older_pictures_go():
    unlink = Path.unlink

    def unlinked(path, **how):
        if path.name == "latent.png":
            kill()
        unlink(path, **how)

    Path.unlink = unlinked


def before_run_json_names_the_variables():
    vae_mnist.Run.write = kill


def before_tensorflows_own_file():
    whole_file = vae_mnist.whole_file

    def whole(path):
        if path.name == "checkpoint":
            kill()
        return whole_file(path)

    vae_mnist.whole_file = whole


def terminated_while_restoring():
    def restore(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    vae_mnist.restore = restore


def interrupted_twice_in_the_second_save():
    """The save is held up, so that the second signal comes before its end."""
    save = tf.train.Saver.save
    saves = []

    def slow(*arguments, **how):
        result = save(*arguments, **how)
        saves.append(result)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return result

    tf.train.Saver.save = slow


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    try:
        sys.exit(vae_mnist.main(sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
