"""Processes that are forked off one which has loaded TensorFlow, so that they start at once."""

import itertools
import multiprocessing
import os
import pkgutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tensorflow.compat.v1 as tf

import vae_mnist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes"])


def signal_in_call(name, count, *numbers):
    """Let this process get signals at the beginning of the count-th call of a function."""
    owner, attribute = name.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, attribute)
    calls = itertools.count(1)

    def call(*arguments, **how):
        if next(calls) == count:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*arguments, **how)

    setattr(owner, attribute, call)


def be_the_program(options, out, err, first, signals):
    """Run the program as `python vae_mnist.py` does; what it says goes to two files."""
    tf.config.list_physical_devices("GPU")  # complains once, where there is none
    os.dup2(os.open(out, os.O_WRONLY), 1)
    os.dup2(os.open(err, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which are ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run in the background
    for call in first:
        call()
    if signals:
        signal_in_call(*signals)
    try:
        sys.exit(vae_mnist.main(options))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
