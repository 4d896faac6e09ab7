"""Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST, in graph mode.

The encoder turns an image x, D = 784 pixels in [0, 1], into a Gaussian over a latent code z of
K = 2 dimensions; the decoder turns a code into r, the probability of white for every pixel. Both
are trained together on KLD + RecLoss, the negative evidence lower bound, in nats an image:

    KLD     = 1/2 sum_k (exp(log_sig_sq_k) - log_sig_sq_k + mu_k^2 - 1)             (1)
    RecLoss = -sum_d (x_d log r_d + (1 - x_d) log(1 - r_d))                         (2)

    python vae_mnist.py            # train for 5,000 iterations, then draw outputs/latent.png
    python vae_mnist.py --help     # all options and their defaults

It writes latent.png, log.csv and the directory checkpoint; with --report also metrics.json and
three pictures. All of the tutorial stands above the line "beyond the tutorial"; what is called
from there and defined below it keeps runs whole and does not concern the method.

In comments, shapes are written with B images a batch, D pixels and K latent dimensions.

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # Settings of the whole process belong to the program, not to whoever imports the module. What
    # TensorFlow's C++ code says while it loads goes nowhere; Python's own errors still arrive.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    sys.stdout.reconfigure(errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

import matplotlib.figure
import matplotlib.style
import numpy as np
import tensorflow.compat.v1 as tf

if __name__ == "__main__":
    tf.config.list_physical_devices("GPU")  # where there is none, it complains, once a process
    os.dup2(sys.stderr.fileno(), 2)

SIDE = 28  # pixels along an edge of an image
PIXELS = SIDE**2  # D
LATENT = 2  # K, two so that the codes can be drawn in a plane
DECODERS = {"tutorial": [256, 128, 64], "mirrored": [64, 128, 256]}  # units of the ELU layers
ITERATIONS = 5000  # a bit over 21 passes over the 60,000 images
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default
LOG_EVERY = 100  # iterations from one log line to the next
CHECKPOINT_EVERY = 500  # iterations, a bit over a second of training
HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------- model
def split(batch, shards):
    """Split a tensor into shards along its first axis; the last takes what is left over."""
    return tf.split(batch, [tf.shape(batch)[0] // shards] * (shards - 1) + [-1])


def dense(fc, units, activation=None):
    """Apply a fully connected layer to every shard, as `tf.layers.dense` did to a batch.

    The variables have its names (`dense/kernel`, `dense/bias`, `dense_1/kernel`, ...) and its
    initial values: Glorot uniform (Glorot and Bengio 2010) and zeros.
    """
    with tf.variable_scope(None, default_name="dense"):
        layer = len(tf.trainable_variables())  # with the graph's seed, it decides the weights
        kernel = tf.get_variable(
            "kernel", [fc[0].shape[1], units], initializer=tf.glorot_uniform_initializer(layer)
        ).value()  # read once, for all the shards
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer()).value()
        fc = [tf.nn.bias_add(tf.matmul(shard, kernel), bias) for shard in fc]
        return [activation(shard) for shard in fc] if activation else fc


@tf.custom_gradient
def cross_entropy(x, logits):
    """Return equation (2) for r = sigmoid(logits), (B, D), summed over the batch, and its gradient.

    -(x log r + (1 - x) log(1 - r)) = softplus(logits) - x logits stays finite where r rounds to 0
    or 1, and its derivative r - x does not vanish there. Given in closed form, it also lets a
    training step leave out the loss itself.
    """
    loss = tf.reduce_sum(tf.nn.softplus(logits) - x * logits)
    return loss, lambda upstream: (-upstream * logits, upstream * (tf.sigmoid(logits) - x))


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Its tensors are attributes: `x`, `mu`, `log_sig_sq`, `eps`, `z`, `logits` and `rec` have a row
    for each image; `kld`, `rec_loss` and their sum `loss` are averages over the batch, in nats an
    image. `opt` is one update by Adam, which also counts `iteration` up.

    Parameters
    ----------
    learning_rate : float, default 0.001
        Step size of Adam (Kingma and Ba 2015), whose other settings keep their defaults.
    seed : int, default 0
        Decides the initial weights (through the graph's seed) and, with the number of updates
        made, the noise eps.
    shards : int, default what `shard_count` finds best for the machine
        Parts of a batch that are computed side by side. They change results by rounding alone.
    decoder : {"tutorial", "mirrored"}, default "tutorial"
        The decoder of the tutorial's listing, which repeats the encoder's layers down to 4 linear
        units, or the one that its text describes, which widens up to the image.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=None, decoder="tutorial"):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder, self.shards = decoder, shards or shard_count()
        tf.set_random_seed(seed)
        self.iteration = tf.train.get_or_create_global_step()  # updates made, int64

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, shape=[None, PIXELS], name="x")  # (B, D) in [0, 1]
        batch_size = tf.shape(self.x)[0]
        # A matrix product this small gains nothing from a second thread. So a batch is computed in
        # shards that do not depend on each other, one thread each: fc is a list of them.
        fc = x = split(self.x, self.shards)
        for n in [256, 128, 64]:
            fc = dense(fc, units=n, activation=tf.nn.elu)
        fc = tf.concat(dense(fc, units=2 * LATENT), axis=0)
        # estimate log sigma^2 for numerical stability
        mu, log_sig_sq = self.mu, self.log_sig_sq = tf.split(fc, 2, axis=1)  # (B, K) each

        # z = mu + sigma * epsilon
        # epsilon is a sample from a N(0, 1) distribution, another one for every iteration
        self.eps = eps = tf.random.stateless_normal([batch_size, LATENT], [seed, self.iteration])
        # Random normal variable for decoder :D
        # Graph mode lets a run feed any tensor, not only placeholders: whoever feeds z overrides
        # the sampler, and neither x nor the encoder is needed. So one graph trains and draws.
        self.z = tf.add(mu, tf.exp(log_sig_sq / 2) * eps, name="z")  # (B, K)

        fc = split(self.z, self.shards)
        for n in DECODERS[decoder]:
            fc = dense(fc, units=n, activation=tf.nn.elu)
        if decoder == "tutorial":
            fc = dense(fc, units=4)
        logits = dense(fc, units=PIXELS)
        self.logits = tf.concat(logits, axis=0)  # (B, D)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(self.logits, name="rec")

        # Both losses are summed over pixels or dimensions and averaged over the batch.
        images = tf.cast(batch_size, tf.float32)
        # reconstruction loss
        self.rec_loss = tf.add_n([cross_entropy(*pair) for pair in zip(x, logits)]) / images
        # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
        kld = 0.5 * tf.reduce_sum(tf.exp(log_sig_sq) + tf.square(mu) - 1.0 - log_sig_sq)
        self.kld = kld / images
        self.loss = self.kld + self.rec_loss
        adam, ungated = tf.train.AdamOptimizer(learning_rate), tf.train.Optimizer.GATE_NONE
        gradients, variables = zip(*adam.compute_gradients(self.loss, gate_gradients=ungated))
        # The first layer's gradient comes last and its update takes longest, so it starts at once.
        # The other updates wait for all gradients, or they would hold up products on the way there.
        gradients = [gradients[0], *tf.tuple(gradients)[1:]]
        self.opt = adam.apply_gradients(zip(gradients, variables), global_step=self.iteration)
        self.saver = tf.train.Saver()

    def step(self, batch, sess):
        """Make one update on batch, (B, 784) in [0, 1]; return its kld, rec_loss as floats."""
        _, kld, rec_loss = sess.run([self.opt, self.kld, self.rec_loss], {self.x: batch})
        return float(kld), float(rec_loss)

    def encode(self, batch, sess):
        """Return mu, log_sig_sq, float32 (B, 2), of q(z | x) for images (B, 784) in [0, 1]."""
        return sess.run([self.mu, self.log_sig_sq], {self.x: batch})

    def decode(self, z, sess):
        """Return the images, float32 (B, 28, 28) in [0, 1], that the codes z, (B, 2), stand for."""
        return sess.run(self.rec, {self.z: z}).reshape(-1, SIDE, SIDE)

    def restore(self, directory, sess):
        """Load the newest complete checkpoint in a directory, in place of any other values.

        A checkpoint that the tutorial's own program saved, once a `tf.train.Saver` was added to it,
        will do: what it lacks, such as the iteration number, is initialized. Raises ValueError if
        there is none, if it is damaged, or if it is of another network.
        """
        restore_variables(self, directory, sess)


# ------------------------------------------------------------------------------------- picture
@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def display_manifold(model, sess, path="latent.png", show=False):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a PNG file.

    Each decoded pixel is one pixel of the file, unsmoothed. show=True also opens a window, where
    there is a display. Returns all the images as one, ndarray (840, 840), float32 in [0, 1], in
    which z[0] grows to the right and z[1] upwards.
    """
    n = 30
    grid_x = np.linspace(-2, 2, n)
    grid_y = grid_x[::-1]
    z = np.stack(np.meshgrid(grid_x, grid_y), axis=-1).reshape(-1, LATENT)  # (n * n, K), by rows
    digits = model.decode(z, sess).reshape(n, n, SIDE, SIDE)
    figure = digits.swapaxes(1, 2).reshape(n * SIDE, n * SIDE)

    left, bottom, width, height = 70, 60, n * SIDE + 90, n * SIDE + 80  # pixels of the file
    if show:
        from matplotlib import pyplot as plt
    new_figure = plt.figure if show else matplotlib.figure.Figure
    fig = new_figure(figsize=(width / 100, height / 100), dpi=100)
    area = (left / width, bottom / height, n * SIDE / width, n * SIDE / height)
    edges = (-0.5, n * SIDE - 0.5)
    axes = fig.add_axes(area, xlabel="z[0]", ylabel="z[1]", xlim=edges, ylim=edges[::-1])
    grey = matplotlib.colormaps["Greys_r"](figure, bytes=True)  # (840, 840, 4)
    fig.figimage(grey, left, bottom)  # unlike imshow, it never resamples
    axes.patch.set_visible(False)
    axes.spines[:].set_position(("outward", 3))  # on the edge they would cover pixels
    axes.spines[["top", "right"]].set_visible(False)
    coordinates = np.linspace(-2, 2, 9)
    ticks = (coordinates + 2) / 4 * (n - 1) * SIDE + (SIDE - 1) / 2  # centres of the images
    axes.set_xticks(ticks, coordinates)
    axes.set_yticks(ticks[::-1], coordinates)
    save_picture(fig, path)
    if show:
        if plt.get_backend().lower() == "agg":  # what pyplot takes where no window can open
            print("--show: there is no display", file=sys.stderr)
        else:
            plt.show()
        plt.close(fig)
    return figure


# ---------------------------------------------------------------------------------------- data
def load_mnist(path=None):
    """Load MNIST, or a data set of the same form such as Fashion-MNIST.

    Parameters
    ----------
    path : str or Path, optional
        An .npz archive with the arrays of `mnist.npz`. Default: `data/mnist.npz` beside this
        module; where that is missing, what `tf.keras.datasets.mnist.load_data()` has or downloads.

    Returns
    -------
    (x_train, y_train), (x_test, y_test)
        Images, uint8 (N, 28, 28) from 0 to 255, and labels, integers (N,).

    Raises OSError if there is no such file, or none at all and no download; ValueError if it is
    not such an archive. Pickled objects are never loaded.
    """
    if path is None and not (path := HERE / "data" / "mnist.npz").exists():
        try:
            return tf.keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises the bare class
            reason = f"no data: {path} is missing and MNIST cannot be downloaded ({error})"
            raise OSError(f"{reason}; get a file mnist.npz and give it with --data FILE") from error
    data = {}
    with open(path, "rb") as file:  # a missing file or a directory fails here, by name
        try:
            archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
            for name in ("x_train", "y_train", "x_test", "y_test"):
                data[name] = archive[name]
        except Exception as error:  # NumPy, zipfile and zlib raise whatever they come upon
            expected = "expected an .npz archive like mnist.npz, got a damaged, truncated or other"
            raise ValueError(f"{path}: {expected} file: {error}") from error
    for part in ("train", "test"):
        x, y = data[f"x_{part}"], data[f"y_{part}"]
        if x.dtype != np.uint8 or x.shape[1:] != (SIDE, SIDE) or not len(x):
            expected, got = f"x_{part} must be uint8 (N, {SIDE}, {SIDE}) with N > 0", x
        elif y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            expected, got = f"y_{part} must be integers ({len(x)},)", y
        else:
            continue
        raise ValueError(f"{path}: {expected}, got {got.dtype} {got.shape}")
    return (data["x_train"], data["y_train"]), (data["x_test"], data["y_test"])


def scale(images, out=None):
    """Return images, uint8 (B, 28, 28), as the network's input, float32 (B, D) in [0, 1]."""
    return np.divide(images.reshape(-1, PIXELS), np.float32(255), out=out)


def random_batches(x_train, batch_size=BATCH_SIZE, seed=0, first=0):
    """Yield the batches of the iterations first, first + 1, ..., float32 (B, D) in [0, 1].

    Images are drawn with replacement. A batch depends on (seed, iteration) alone, so no generator's
    state has to outlive a run; each is written over the one before it.
    """
    # TensorFlow reads a batch in place, without a copy, if it starts at a multiple of 64 bytes.
    memory = np.empty(batch_size * PIXELS + 16, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    x_batch = memory[start:][: batch_size * PIXELS].reshape(batch_size, PIXELS)
    # One generator serves many iterations: making one is slow after a training step, when all that
    # it needs has left the processor's cache. The bound keeps the indices of big batches small.
    rows = max(1, min(64, 2**20 // batch_size))
    for i in itertools.count(first):
        block, row = divmod(i, rows)
        if row == 0 or i == first:
            generator = np.random.default_rng([seed, block])
            indices = generator.integers(len(x_train), size=(rows, batch_size))
        batch_idx = indices[row]
        yield scale(x_train[batch_idx], out=x_batch)


# ------------------------------------------------------------------------------------ training
def train(model, sess, x_train, run, log_every, checkpoint_every, stopped=()):
    """Make the updates that a run lacks, or as many as there is time for until it is stopped.

    Parameters
    ----------
    run : Run
        Where the run stands; kept up to date and saved every `checkpoint_every` iterations, and
        once it stands still.
    stopped : sequence, default ()
        As soon as there is something in it, the run is saved and left.

    Raises FloatingPointError where a loss is not finite, with nothing of that iteration saved.
    """
    # Where nobody fetches the losses, graph mode leaves out what only they need.
    update = sess.make_callable(model.opt, feed_list=[model.x])
    batch_size, seed = run.settings["batch_size"], run.settings["seed"]
    batches = random_batches(x_train, batch_size, seed, first=run.iteration)
    for i, x_batch in zip(progress(run.iteration, run.iterations), batches):
        if i % log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            check_losses(run, i, kld, rec_loss)
            run.log.append([i, kld, rec_loss])
            say(f"Iteration {i}: KLD = {kld:f}, RecLoss = {rec_loss:f}")
        else:
            update(x_batch)
        run.iteration = i + 1
        if run.iteration % checkpoint_every == 0 or run.iteration == run.iterations or stopped:
            # The losses of the same images under the new weights show whether these are sound.
            check_losses(run, i + 1, *sess.run([model.kld, model.rec_loss], {model.x: x_batch}))
            run.save(model, sess)
            if stopped:  # asked here alone, so that nothing stops between a check and the save
                break


# ======================================================================= beyond the tutorial


# --------------------------------------------------------------------------------- the machine
def shard_count():
    """Return how many shards of a batch to compute side by side: 2, or 1 on one core or a GPU.

    More shards than two make the products smaller still and gain nothing on two cores; a GPU
    prefers the batch whole.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if cores == 1 or tf.config.list_physical_devices("GPU") else 2


def session(shards=None):
    """Open a session on the current graph, with one thread for each shard of a batch."""
    shards = shards or shard_count()
    threads = {"intra_op_parallelism_threads": 1, "inter_op_parallelism_threads": shards}
    options = tf.GPUOptions(allow_growth=True)  # a GPU's memory as needed, not all of it
    config = tf.ConfigProto(gpu_options=options, **(threads if shards > 1 else {}))
    return tf.Session(config=config)


@contextmanager
def stop_signals():
    """Yield a list that gets the number of a SIGINT or SIGTERM; a second one ends the process."""
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        stopped.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    previous = [signal.signal(each, note) for each in numbers]
    try:
        yield stopped
    finally:
        for each, handler in zip(numbers, previous):
            signal.signal(each, handler)


def lock(directory, held):
    """Keep other runs out of a directory until `held`, an ExitStack, closes, or the process ends."""
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{directory.parent}: another run is at work there") from error
    except (ImportError, OSError):
        pass  # Windows and some file systems have no such locks


# -------------------------------------------------------------------------------------- output
def live_line(text=""):
    """Show text in place of the live line on a terminal's standard error, and nowhere else."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def progress(first, last):
    """Yield the iterations from first to last; the live line shows the share done and time left."""
    start = shown = time.monotonic()
    for i in range(first, last):
        yield i
        if time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            speed = (i + 1 - first) / (shown - start)
            left = (last - i - 1) / speed
            live_line(f"{(i + 1) / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left")
    live_line()


def say(text):
    """Print a line on standard output."""
    live_line()
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = None  # or Python would complain once more at its end
        raise OSError(error.errno, error.strerror, "standard output") from error


def one_line(error):
    """Return what an exception says, in one line."""
    if isinstance(error, tf.errors.OpError):
        error = error.message.split("\n\t [[")[0].splitlines()[-1]  # without where in the graph
    elif isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def write_file(path, content):
    """Write bytes into a file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(temporary)) from error


def save_picture(fig, path):
    """Write a figure as a PNG file, whole or not at all."""
    content = io.BytesIO()
    fig.savefig(content, format="png")
    write_file(path, content.getvalue())


# ---------------------------------------------------------------------------------------- runs
SETTINGS = ("decoder", "seed", "batch_size", "learning_rate", "shards")  # that decide a result
DRAWN = ("latent.png", "metrics.json", "codes.png", "reconstructions.png", "training.png")


class CheckpointError(ValueError):
    """There is no checkpoint where one is expected, or a damaged one, or of another network."""


@dataclass
class Run:
    """A training run, and where it stands; run.json holds all of it but the directory."""

    directory: Path
    settings: dict  # what decides the result, by name
    iterations: int  # wanted
    iteration: int = 0  # made
    log: list = field(default_factory=list)  # [[iteration, kld, rec_loss], ...]
    model: str = ""  # the name of the newest checkpoint, this run's or one that it will replace
    drawn: bool = False  # whether pictures of an older checkpoint are there

    def finished(self):
        return self.iteration >= self.iterations

    def save(self, model, sess):
        """Save the variables, then the record of the run, then what is derived from it.

        There are two names for the variables' files. The one that run.json does not name is used
        anew, and then run.json, replaced in one step, names it: so at every moment it belongs to a
        whole checkpoint. Raises OSError if that fails; the older checkpoint is then still there.
        """
        directory = self.directory / "checkpoint"
        name = "vae_mnist-b" if self.model == "vae_mnist-a" else "vae_mnist-a"
        for path in directory.iterdir():
            if path.name.startswith(f"{name}."):  # older, or left by a save that was killed
                path.unlink()
        try:
            model.saver.save(sess, str(directory / name), write_meta_graph=False, write_state=False)
        except (tf.errors.OpError, ValueError) as error:
            raise OSError(f"{directory}: cannot save a checkpoint: {one_line(error)}") from error
        self.model = name
        self.write_record()
        if self.drawn:
            for picture in DRAWN:
                (self.directory / picture).unlink(missing_ok=True)
            self.drawn = False
            self.write_record()
        lines = ["iteration,kld,rec_loss", *(",".join(map(repr, line)) for line in self.log), ""]
        write_file(self.directory / "log.csv", "\n".join(lines).encode())
        state = f'model_checkpoint_path: "{name}"\n'  # for tf.train.latest_checkpoint
        write_file(directory / "checkpoint", state.encode())
        self.drawn = self.finished()

    def write_record(self):
        record = {key: value for key, value in vars(self).items() if key != "directory"}
        write_file(self.directory / "checkpoint" / "run.json", json.dumps(record).encode())


def read_run(directory):
    """Return the run whose newest checkpoint is in a directory, None if there is none."""
    path = Path(directory) / "run.json"
    try:
        run = Run(path.parent.parent, **json.loads(path.read_bytes()))
        run.settings.setdefault("decoder", "tutorial")  # once there was no other
        run.settings.setdefault("shards", shard_count())  # nor were these recorded
        return run
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, AttributeError) as error:
        damaged = "expected the record of a checkpoint, got a damaged file"
        raise CheckpointError(f"{path}: {damaged}") from error


def open_run(args, x_train, held):
    """Lock the output directory; return the run that goes on or begins there.

    Raises ValueError if that would lose an unfinished run, or mix two runs.
    """
    directory, old = args.output_dir / "checkpoint", None
    if not args.resume:
        directory.mkdir(parents=True, exist_ok=True)
    lock(directory, held)
    try:
        old = read_run(directory)
    except CheckpointError as error:
        if not args.overwrite:
            raise ValueError(f"{error}; --overwrite begins a new run in its place") from error
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["data"] = "sha256:" + hashlib.sha256(x_train).hexdigest()

    if args.resume:
        if not old:
            raise ValueError(f"--resume: there is no checkpoint in {directory}")
        for name, value in settings.items():
            if value not in (None, recorded := old.settings.get(name)):
                option = f"--{name.replace('_', '-')} is {value}"
                has = f"the run in {args.output_dir} has {recorded}"
                raise ValueError(f"--resume: {option}, but {has}")
        return old

    settings["shards"] = args.shards or shard_count()
    run = Run(args.output_dir, settings, args.iterations)
    if old:
        if not (old.finished() or args.overwrite):
            state = f"stopped after {old.iteration} of {old.iterations} iterations"
            choice = "go on with --resume, or replace it with --overwrite"
            raise ValueError(f"the run in {args.output_dir} {state}: {choice}")
        run.model, run.drawn = old.model, old.drawn or old.finished()
    return run


def restore_variables(model, directory, sess):
    """Do what `VAE.restore` promises."""
    run = read_run(directory)
    if run and (held := run.settings["decoder"]) != model.decoder:
        raise CheckpointError(f"{directory}: has the {held} decoder, not the {model.decoder} one")
    prefix = f"{directory}/{run.model}" if run else tf.train.latest_checkpoint(directory)
    if prefix is None:
        raise CheckpointError(f"{directory}: expected a directory with a checkpoint, found none")
    try:
        shapes = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
        for name, shape in ((v.op.name, v.shape.as_list()) for v in tf.trainable_variables()):
            if (found := shapes.get(name, "missing")) != shape:
                raise ValueError(f"of another network: {name} must be {shape}, is {found}")
        sess.run(tf.global_variables_initializer())
        saved = [v for v in tf.global_variables() if v.op.name in shapes]
        tf.train.Saver(saved).restore(sess, prefix)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{prefix}: not a checkpoint to use: {one_line(error)}") from error


def check_losses(run, iteration, kld, rec_loss):
    """Raise FloatingPointError unless the losses of an iteration are finite."""
    if not math.isfinite(kld + rec_loss):
        losses = f"iteration {iteration}: KLD = {kld:f}, RecLoss = {rec_loss:f}"
        remedy = f"try a lower --learning-rate than {run.settings['learning_rate']}"
        raise FloatingPointError(f"{losses}, so training stopped; {remedy}")


# -------------------------------------------------------------------------------------- report
def evaluate(model, sess, images, seed=0, reach=6.0, step=0.03):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    Parameters
    ----------
    seed : int, default 0
        Decides the samples of z, 100 an image.
    reach, step : float, default 6.0 and 0.03
        Of the grid of codes, over [-reach, reach] in both dimensions.

    Returns
    -------
    dict of str to ndarray of shape (N,), float64
        "RecLoss", "KLD", "-ELBO": equations (2), averaged over the samples, (1), and their sum.
        "IW bound": the importance-weighted bound, -log 1/100 sum_k p(x, z_k) / q(z_k | x) (Burda,
        Grosse and Salakhutdinov 2015, arXiv:1509.00519). "NLL": the negative log-likelihood itself,
        -log of the integral of N(z; 0, I) p(x | z) dz, as a sum over the grid.
    """
    rng, x = np.random.default_rng(seed), scale(images)
    with sess.graph.as_default():
        # log p(x | z) = x . logits - sum softplus(logits), of all images with all codes
        shards = split(model.logits, model.shards)
        dot = [tf.matmul(model.x, shard, transpose_b=True) for shard in shards]
        normalizer = [tf.reduce_sum(tf.nn.softplus(shard), axis=1) for shard in shards]
        log_px_z = tf.concat(dot, axis=1) - tf.concat(normalizer, axis=0)
    log_px_z = sess.make_callable(log_px_z, feed_list=[model.x, model.z])
    mu, log_sig_sq = np.float64(model.encode(x, sess))
    kld = 0.5 * np.sum(np.exp(log_sig_sq) - log_sig_sq + mu**2 - 1, axis=1)
    rec_loss, iw_bound = np.empty((2, len(x)))
    for i, (mean, log_var) in enumerate(zip(mu, log_sig_sq)):
        eps = rng.standard_normal((100, LATENT))
        z = mean + np.exp(log_var / 2) * eps
        log_px = np.float64(log_px_z(x[i : i + 1], z)[0])
        rec_loss[i] = -np.mean(log_px)
        log_ratio = log_px + 0.5 * np.sum(eps**2 - z**2 + log_var, axis=1)
        iw_bound[i] = np.log(100) - np.logaddexp.reduce(log_ratio)

    grid = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    codes = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, LATENT)
    log_px = np.full(len(x), -np.inf)
    for z in np.array_split(codes, 1 + len(codes) // 500):  # in blocks: memory stays small
        log_joint = log_px_z(x, z) - np.float32(np.sum(z**2, axis=1) / 2)
        largest = log_joint.max(axis=1)
        total = np.sum(np.exp(log_joint - largest[:, None]), axis=1, dtype=np.float64)
        log_px = np.logaddexp(log_px, largest + np.log(total))
    nll = np.log(2 * np.pi / (grid[1] - grid[0]) ** 2) - log_px
    names = ("RecLoss", "KLD", "-ELBO", "IW bound", "NLL")
    return dict(zip(names, (rec_loss, kld, rec_loss + kld, iw_bound, nll)))


# Ten colours that colour-blind people can tell apart: Petroff 2021, arXiv:2107.02270.
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]  # fmt: skip


@matplotlib.style.context("default")
def draw_codes(mu, labels, title, path):
    """Draw codes, (N, K), coloured by their labels, integers (N,), into a PNG file."""
    fig = matplotlib.figure.Figure(figsize=(8, 7.2), dpi=100, layout="constrained")
    axes = fig.add_subplot(title=title, xlabel="mu[0]", ylabel="mu[1]", aspect="equal")
    axes.scatter(*mu.T, s=3, c=[COLOURS[label % 10] for label in labels])
    for label in np.unique(labels):
        axes.scatter([], [], c=COLOURS[label % 10], label=label)
    fig.legend(loc="outside right upper", title="digit")
    for sigma in (1, 2):
        axes.add_patch(matplotlib.patches.Circle((0, 0), sigma, fill=False))
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.text(0, sigma, f"{sigma} sigma", ha="center", va="center", bbox=box)
    save_picture(fig, path)


@matplotlib.style.context("default")
def draw_reconstructions(model, sess, images, labels, title, path):
    """Draw ten images of each of ten classes over what the model makes of their mu, as PNG."""
    classes = np.unique(labels)[:10]
    sheet = np.zeros((len(classes), 2, SIDE, 10, SIDE), np.float32)
    for (above, below), label in zip(sheet, classes):
        x = images[labels == label][:10]
        mu, _ = model.encode(scale(x), sess)
        above[:, : len(x)] = x.swapaxes(0, 1) / 255
        below[:, : len(x)] = model.decode(mu, sess).swapaxes(0, 1)
    fig = matplotlib.figure.Figure(figsize=(5.6, 10), dpi=100, layout="constrained")
    axes = fig.add_subplot(title=title, ylabel="digit", xticks=[])
    axes.imshow(sheet.reshape(-1, 10 * SIDE), cmap="Greys_r", interpolation="nearest")
    axes.set_yticks(np.arange(SIDE, len(classes) * 2 * SIDE, 2 * SIDE) - 0.5, classes)
    save_picture(fig, path)


@matplotlib.style.context("default")
def draw_training(log, path):
    """Draw both losses of a run's log, [[iteration, kld, rec_loss], ...], into a PNG file."""
    iterations, *losses = np.transpose(log)
    fig = matplotlib.figure.Figure(figsize=(8, 6), dpi=100, layout="constrained")
    for axes, name, values in zip(fig.subplots(2, sharex=True), ("KLD", "RecLoss"), losses):
        axes.plot(iterations, values, ".-", markersize=4, linewidth=0.8)
        title = f"{name} of one batch: {values[-1]:.2f} nats an image in iteration {log[-1][0]}"
        axes.set(title=title, ylabel=f"{name}, nats an image")
        axes.grid(alpha=0.3)
    axes.set(yscale="log", xlabel="iteration")  # RecLoss falls far at once, and then slowly
    axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(50))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    save_picture(fig, path)


def report(model, sess, test, run):
    """Print what `evaluate` measures on the test set, save it as metrics.json, draw pictures."""
    x_test, y_test = test
    count = f"{len(x_test):,} test images"
    live_line(f"Measuring {count}")
    figures = evaluate(model, sess, x_test)
    say(f"On {count}, nats an image (standard error):")
    metrics = {}
    for name, values in figures.items():
        mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
        metrics[name] = {"mean": mean, "standard_error": error}
        say(f"{name:8} {mean:8.2f} ({error:.2f})")
    content = {"settings": run.settings, "iteration": run.iteration, "metrics": metrics}
    write_file(run.directory / "metrics.json", (json.dumps(content, indent=2) + "\n").encode())
    mu, _ = model.encode(scale(x_test), sess)
    title = f"Codes of {count}: KLD {metrics['KLD']['mean']:.2f} nats an image"
    draw_codes(mu, y_test, title, run.directory / "codes.png")
    title = f"RecLoss {metrics['RecLoss']['mean']:.2f} nats an image"
    title = f"Test images, each over its reconstruction:\n{title}"
    path = run.directory / "reconstructions.png"
    draw_reconstructions(model, sess, x_test, y_test, title, path)
    draw_training(run.log, run.directory / "training.png")
    say(f"The figures are in {run.directory / 'metrics.json'}, three pictures beside it")


# -------------------------------------------------------------------------------- command line
def number(kind, least, most, expected):
    """Return a function that reads an argument: a number of a kind, from least to most."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def utf8_path(text):
    """Read an argument: a path whose name is UTF-8, as TensorFlow wants it."""
    text.encode()  # or a ValueError, which argparse reports
    return Path(text)


def parse_arguments(argv):
    """Return the parser of the command line, and the options."""
    parser = argparse.ArgumentParser(
        prog="vae_mnist.py",
        description="Train a variational autoencoder on MNIST and draw its latent manifold.",
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # a line

    def add(name, text, default, to=parser, **how):
        to.add_argument(name, default=default, help=f"{text} (default: %(default)s)", **how)

    positive = number(int, 1, 2**31 - 1, "a whole number from 1 to 2147483647")
    seed = number(int, 0, 2**31 - 1, "a whole number from 0 to 2147483647")
    rate = number(float, 1e-45, np.finfo(np.float32).max, "a number above 0")
    shards = number(int, 1, 64, "a whole number from 1 to 64")
    parser.add_argument("--data", metavar="FILE", help="an .npz archive (default: data/mnist.npz)")
    add("--output-dir", "where files go, made if missing", "outputs", type=utf8_path, metavar="DIR")
    add("--iterations", "updates to make", ITERATIONS, type=positive, metavar="N")
    add("--batch-size", "images an iteration", BATCH_SIZE, type=positive, metavar="N")
    add("--learning-rate", "step size of Adam", LEARNING_RATE, type=rate, metavar="R")
    add("--decoder", "as the tutorial lists or describes it", "tutorial", choices=DECODERS)
    add("--seed", "decides everything random", 0, type=seed, metavar="N")
    text = "parts of a batch computed side by side (default: what suits the machine)"
    parser.add_argument("--shards", type=shards, metavar="N", help=text)
    add("--log-every", "iterations a log line", LOG_EVERY, type=positive, metavar="N")
    add("--checkpoint-every", "iterations a save", CHECKPOINT_EVERY, type=positive, metavar="N")
    group = parser.add_mutually_exclusive_group()
    add("--resume", "go on with the run in DIR", False, action="store_true", to=group)
    add("--overwrite", "replace an unfinished run in DIR", False, action="store_true", to=group)
    add("--report", "also measure and show the test set", False, action="store_true")
    add("--show", "also open the picture in a window", False, action="store_true")
    return parser, parser.parse_args(argv)


def work(args, run, x_train, test):
    """Do what is asked for, from the first iteration to the report; return the exit status."""
    decoder, seed, _, learning_rate, shards = (run.settings[name] for name in SETTINGS)
    with tf.Graph().as_default(), session(shards) as sess:
        model = VAE(learning_rate, seed, shards, decoder)
        if args.resume:
            model.restore(run.directory / "checkpoint", sess)
            run.save(model, sess)  # so that all files are of one iteration, even after a kill
            run.iterations = max(args.iterations, run.iteration)
        else:
            sess.run(tf.global_variables_initializer())
            if run.drawn:
                say(f"Replacing the finished run in {run.directory}")
        with stop_signals() as stopped:
            train(model, sess, x_train, run, args.log_every, args.checkpoint_every, stopped)
        if run.iteration < run.iterations:
            text = f"Stopped by {signal.Signals(stopped[0]).name} after {run.iteration} of "
            text += f"{run.iterations} iterations; go on with the same options and --resume"
            print(text, file=sys.stderr)
            return 128 + stopped[0]
        picture = run.directory / "latent.png"
        display_manifold(model, sess, picture, args.show)
        say(f"The manifold of the latent codes is in {picture}")
        if args.report:
            report(model, sess, test, run)
    return 0


def main(argv=None):
    """Train on MNIST as the command line says and draw the manifold.

    Returns the exit status: 0, or 128 plus the number of the signal that stopped the program.
    Raises SystemExit, as argparse does: with status 2 for wrong options or data, or a checkpoint
    that does not fit them, and 1 after a fault while running.
    """
    parser, args = parse_arguments(argv)
    with ExitStack() as held:
        try:
            # the tutorial ignores testing data and labels; a report needs them
            (x_train, _), test = load_mnist(args.data)
            run = open_run(args, x_train, held)
        except (OSError, ValueError) as error:
            parser.error(one_line(error))
        try:
            return work(args, run, x_train, test)
        except CheckpointError as error:
            parser.error(f"--resume: {one_line(error)}")
        except (OSError, MemoryError, FloatingPointError, tf.errors.OpError) as error:
            if isinstance(error, MemoryError):
                error = f"no memory for batches of {args.batch_size} images: {error}"
            live_line()
            parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")


if __name__ == "__main__":
    sys.exit(main())
