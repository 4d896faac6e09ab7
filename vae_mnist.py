"""Train the variational autoencoder of Nate Merrill's 2019 tutorial on MNIST, in graph mode.

The encoder turns an image x, D = 784 pixels in [0, 1], into a Gaussian over a latent code z of
K = 2 dimensions; the decoder turns a code into r, the probability of white for every pixel. Both
are trained on KLD + RecLoss, the negative evidence lower bound on log p(x), in nats an image:

    KLD     = 1/2 sum_k (exp(log_sig_sq_k) - log_sig_sq_k + mu_k^2 - 1)             (1)
    RecLoss = -sum_d (x_d log r_d + (1 - x_d) log(1 - r_d))                         (2)

    python vae_mnist.py            # train for 5,000 iterations, then draw outputs/latent.png
    python vae_mnist.py --help     # all options and their defaults

It writes latent.png, explore.html, log.csv and checkpoint/. The method is all above the line
"beyond the tutorial"; what keeps, measures and shows a run is below. The tutorial's main block
became `work`.

Source: Nate Merrill, "Implementing an MNIST Variational Autoencoder in TensorFlow", 2019.
Method: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
from base64 import b64encode
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    # What TensorFlow's C++ code says while it loads goes nowhere; Python's errors still arrive.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
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
LATENT = 2  # K; the picture and the report need the codes to lie in a plane
DECODERS = {"tutorial": [256, 128, 64], "mirrored": [64, 128, 256]}  # units of the ELU layers
ITERATIONS = 5000  # a bit over 21 passes over the 60,000 images
BATCH_SIZE = 256  # images an iteration
LEARNING_RATE = 0.001  # Adam's own default
LOG_EVERY = 100  # iterations from one log line to the next
CHECKPOINT_EVERY = 500  # iterations, a bit over a second of training
HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------- model
def split(batch, shards):
    """Split a batch into a list of shards, which are computed side by side, a thread each."""
    return tf.split(batch, [tf.shape(batch)[0] // shards] * (shards - 1) + [-1])


def dense(fc, units, activation=None):
    """Apply a fully connected layer to every shard, as `tf.layers.dense` did to a batch.

    Its variables have the same names (`dense/kernel`, `dense/bias`, `dense_1/kernel`, ...).
    """
    with tf.variable_scope(None, default_name="dense"):
        op_seed = len(tf.trainable_variables())  # with the graph's seed, it decides the weights
        kernel = tf.get_variable(
            "kernel", [fc[0].shape[1], units], initializer=tf.glorot_uniform_initializer(op_seed)
        ).value()  # read once, for all the shards
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer()).value()
        fc = [tf.nn.bias_add(tf.matmul(shard, kernel), bias) for shard in fc]
        return [activation(shard) for shard in fc] if activation else fc


@tf.custom_gradient
def cross_entropy(x, logits):
    """Return equation (2) for r = sigmoid(logits), (B, D), summed over the batch, and its gradient.

    As softplus(logits) - x logits it stays finite where r rounds to 0 or 1, and its derivative
    r - x does not vanish there, as that of a clipped logarithm does.
    """
    loss = tf.reduce_sum(tf.nn.softplus(logits) - x * logits)
    return loss, lambda upstream: (-upstream * logits, upstream * (tf.sigmoid(logits) - x))


class VAE:
    """The tutorial's variational autoencoder, built in the current default graph.

    Its tensors are attributes: `x`, `mu`, `log_sig_sq`, `eps`, `z` and `rec` have a row for each
    image; `kld`, `rec_loss` and their sum `loss` are averages over the batch, in nats an image.
    `opt` is one update by Adam, which also counts `iteration` up.

    `learning_rate` is Adam's. `seed` decides the first weights and, with the number of updates, the
    noise eps. `shards`, parts of a batch that are computed side by side, change a result by
    rounding alone. `decoder` is "tutorial", as in its listing, or "mirrored", as in its text.
    """

    def __init__(self, learning_rate=LEARNING_RATE, seed=0, shards=None, decoder="tutorial"):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder, self.shards = decoder, shards or shard_count()
        tf.set_random_seed(seed)
        self.iteration = tf.train.get_or_create_global_step()  # updates made, int64

        # Input data Tensor
        self.x = tf.placeholder(tf.float32, shape=[None, PIXELS], name="x")  # (B, D) in [0, 1]
        with tf.name_scope("encoder"):
            batch_size = tf.shape(self.x)[0]
            fc = x = split(self.x, self.shards)  # lists, of a tensor for each shard
            for n in [256, 128, 64]:
                fc = dense(fc, units=n, activation=tf.nn.elu)
            fc = tf.concat(dense(fc, units=2 * LATENT), axis=0)
            # estimate log sigma^2 for numerical stability
            mu, log_sig_sq = self.mu, self.log_sig_sq = tf.split(fc, 2, axis=1)  # (B, K) each

        # z = mu + sigma * epsilon
        with tf.name_scope("sampler"):
            # epsilon is a sample from a N(0, 1) distribution, another one for every iteration
            self.eps = tf.random.stateless_normal([batch_size, LATENT], [seed, self.iteration])
            noise = tf.exp(log_sig_sq / 2) * self.eps
        # Random normal variable for decoder :D
        # Graph mode lets a run feed any tensor, not only placeholders: whoever feeds z overrides
        # the sampler, and neither x nor the encoder is needed. So one graph trains and draws.
        self.z = tf.add(mu, noise, name="z")  # (B, K)

        with tf.name_scope("decoder"):
            fc = split(self.z, self.shards)
            for n in DECODERS[decoder]:
                fc = dense(fc, units=n, activation=tf.nn.elu)
            if decoder == "tutorial":
                fc = dense(fc, units=4)
            logits = dense(fc, units=PIXELS)
            self.hidden, self.logits = fc, logits  # by shards; report and page compute with them
            fc = tf.concat(logits, axis=0)
        # sigmoid bounds answer to [0,1] for images
        self.rec = tf.sigmoid(fc, name="rec")  # (B, D)

        with tf.name_scope("losses"):  # averages over the batch
            images = tf.cast(batch_size, tf.float32)
            # reconstruction loss
            self.rec_loss = tf.add_n([cross_entropy(*pair) for pair in zip(x, logits)]) / images
            # KLD( (mu, sigma) , N(0,1) ) = .5 (tr(sigma2) + mu^T mu - k - log det(sigma2))
            kld = 0.5 * tf.reduce_sum(tf.exp(log_sig_sq) + tf.square(mu) - 1.0 - log_sig_sq)
            self.kld = kld / images
            self.loss = self.kld + self.rec_loss

        adam, ungated = tf.train.AdamOptimizer(learning_rate), tf.train.Optimizer.GATE_NONE
        with tf.name_scope("adam") as scope:
            gradients, variables = zip(*adam.compute_gradients(self.loss, gate_gradients=ungated))
            # The first layer's gradient comes last and its update takes longest: it starts at once.
            # The others wait for all gradients, or they would hold up products on the way there.
            gradients = [gradients[0], *tf.tuple(gradients)[1:]]
        self.opt = adam.apply_gradients(zip(gradients, variables), self.iteration, name=scope)
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
        """Load the newest checkpoint in a directory, such as outputs/checkpoint, into the session.

        What it lacks, as one of the tutorial's own program does, is initialized. Raises ValueError
        if there is none, or if it is damaged or of another network.
        """
        restore_variables(self, directory, sess)

    def export(self, directory, sess):
        """Write a SavedModel: `encode` makes mu and log_sig_sq of x, `decode` makes rec of z.

        Other programs use it without this module. Raises FileExistsError if the directory exists.
        """
        write_saved_model(self, directory, sess)


# ------------------------------------------------------------------------------------- picture
@matplotlib.style.context("default")  # whatever the user's matplotlibrc says
def display_manifold(model, sess, path="latent.png", show=False):
    """Draw 30 x 30 images, decoded over [-2, 2] in both latent dimensions, into a PNG file.

    Each decoded pixel is one pixel of the file. show=True also opens a window. Returns all images
    as one, float32 (840, 840) in [0, 1], in which z[0] grows to the right and z[1] upwards.
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
    axes = fig.add_axes(area, facecolor="none")
    axes.set(xlabel="z[0]", ylabel="z[1]", xlim=edges, ylim=edges[::-1])
    fig.figimage(matplotlib.colormaps["Greys_r"](figure, bytes=True), left, bottom)  # as it is
    axes.spines[:].set_position(("outward", 3))  # on the edge they would cover pixels
    axes.spines[["top", "right"]].set_visible(False)
    coordinates = np.linspace(-2, 2, 9)
    ticks = (coordinates + 2) / 4 * (n - 1) * SIDE + (SIDE - 1) / 2  # centres of the images
    axes.set_xticks(ticks, coordinates)
    axes.set_yticks(ticks[::-1], coordinates)
    write_file(path, fig)
    if show and plt.get_backend().lower() == "agg":  # pyplot's choice where no window can open
        print("--show: there is no display", file=sys.stderr)
    elif show:
        plt.show()
    return figure


# ---------------------------------------------------------------------------------------- data
def load_mnist(path=None):
    """Load MNIST, or a data set of the same form such as Fashion-MNIST, from an .npz archive.

    Default: `data/mnist.npz` beside this module; where that is missing, what
    `tf.keras.datasets.mnist.load_data()` has or downloads. Returns (x_train, y_train), (x_test,
    y_test): images, uint8 (N, 28, 28) from 0 to 255, and labels, integers (N,). Raises OSError if
    there is no such file, or none at all and no download, ValueError if it is not such an archive.
    """
    if path is None and not (path := HERE / "data" / "mnist.npz").exists():
        try:
            return tf.keras.datasets.mnist.load_data()
        except Exception as error:  # Keras raises the bare class
            reason = f"{path} is missing and MNIST cannot be downloaded ({error})"
            raise OSError(f"no data: {reason}; give a file mnist.npz with --data FILE") from error
    with open(path, "rb") as file:  # a missing file or a directory fails here, by name
        try:
            archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
            names = ("x_train", "y_train", "x_test", "y_test")
            data = {name: np.ascontiguousarray(archive[name]) for name in names}
        except Exception as error:  # NumPy, zipfile and zlib raise whatever they come upon
            expected = "expected an .npz archive like mnist.npz, got a damaged, truncated or other"
            raise ValueError(f"{path}: {expected} file: {error}") from error
    for part in ("train", "test"):
        x, y = data[f"x_{part}"], data[f"y_{part}"]
        images = x.dtype == np.uint8 and x.shape[1:] == (SIDE, SIDE) and len(x)
        if not images or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            expected = f"x_{part} uint8 (N, {SIDE}, {SIDE}), N > 0, y_{part} integers {x.shape[:1]}"
            got = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"
            raise ValueError(f"{path}: expected {expected}, got {got}")
    return (data["x_train"], data["y_train"]), (data["x_test"], data["y_test"])


def scale(images, out=None):
    """Return images, uint8 (B, 28, 28), as the network's input, float32 (B, D) in [0, 1]."""
    return np.divide(images.reshape(-1, PIXELS), np.float32(255), out=out)


def random_batches(x_train, batch_size=BATCH_SIZE, seed=0, first=0):
    """Yield the batches of the iterations first, first + 1, ..., float32 (B, D) in [0, 1].

    Images are drawn with replacement, as (seed, iteration) alone decide: no generator's state needs
    to outlive a run. Each batch is written over the one before; copy it to keep it.
    """
    # TensorFlow reads a batch in place, without a copy, if it starts at a multiple of 64 bytes.
    memory = np.empty(batch_size * PIXELS + 16, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    x_batch = memory[start:][: batch_size * PIXELS].reshape(batch_size, PIXELS)
    # A generator serves many iterations, as making one takes time; the bound is for big batches.
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
    """Make the updates that a `Run` lacks; save it on the way, at its end, and once `stopped`."""
    # Where nobody fetches the losses, graph mode leaves out what only they need.
    update = sess.make_callable(model.opt, feed_list=[model.x])
    batch_size, seed = run.settings["batch_size"], run.settings["seed"]
    batches = random_batches(x_train, batch_size, seed, first=run.iteration)
    for i, x_batch in zip(progress(run.iteration, run.iterations), batches):
        if i % log_every == 0:
            kld, rec_loss = model.step(x_batch, sess)
            check_losses(i, kld, rec_loss)
            run.log.append([i, kld, rec_loss])
            print(f"Iteration {i}: KLD = {kld:f}, RecLoss = {rec_loss:f}")
        else:
            update(x_batch)
        run.iteration = i + 1
        if run.iteration % checkpoint_every == 0 or run.iteration == run.iterations or stopped:
            # The losses of the same images under the new weights show whether these are sound.
            check_losses(i + 1, *sess.run([model.kld, model.rec_loss], {model.x: x_batch}))
            run.save(model, sess)
            if stopped:  # perhaps during the save: nothing was trained since
                break


# ======================================================================= beyond the tutorial
# ------------------------------------------------------------------------- machine and output
def shard_count():
    """Return how many shards of a batch to compute side by side: 2, or 1 on one core or a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if cores == 1 or tf.config.list_physical_devices("GPU") else 2


def session(shards=None):
    """Open a session on the current graph, with a thread for each shard, if there are several."""
    config = tf.ConfigProto(gpu_options=tf.GPUOptions(allow_growth=True))  # not all its memory
    if (shards := shards or shard_count()) > 1:
        config.intra_op_parallelism_threads, config.inter_op_parallelism_threads = 1, shards
    return tf.Session(config=config)


def stop_signals(held):
    """Return a list that gets the first SIGINT and SIGTERM until `held`, an ExitStack, closes."""
    stopped = []

    def note(number, _):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)  # the same again ends the process

    for each in (signal.SIGINT, signal.SIGTERM):
        held.callback(signal.signal, each, signal.signal(each, note))
    return stopped


def lock(directory, held):
    """Keep other runs out of a directory until `held`, an ExitStack, closes or the process ends."""
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{directory.parent}: another run is at work there") from error
    except (ImportError, OSError):
        pass  # Windows and some file systems have no such locks


def progress(first, last):
    """Yield the iterations from first to last; a terminal shows the share done and time left."""
    start = shown = time.monotonic()
    for i in range(first, last):
        yield i
        if time.monotonic() - shown > 0.2 and sys.stderr.isatty():
            shown = time.monotonic()
            speed = (i + 1 - first) / (shown - start)
            left = (last - i - 1) / speed
            text = f"{(i + 1) / last:4.0%}, {speed:.0f} iterations/s, {left:.0f} s left"
            print(f"\033[K{text}\r", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr, flush=True)


def one_line(error):
    """Return what an exception says, in one line."""
    if isinstance(error, tf.errors.OpError):
        error = error.message.split("\n\t [[")[0].splitlines()[-1]  # without where in the graph
    elif isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'standard output'}: {error.strerror}"  # all others have one
    return " ".join(str(error).split())


def write_file(path, content):
    """Write bytes, or a figure as PNG, into a file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror or error, str(temporary)) from error


# ---------------------------------------------------------------------------------------- runs
SETTINGS = ("decoder", "seed", "batch_size", "learning_rate", "shards")  # that decide each bit
RESULTS = ("latent.png", "explore.html", "metrics.json", "report.png")  # of the newest checkpoint


class CheckpointError(ValueError):
    """There is no checkpoint where one is expected, or a damaged one, or of another network."""


@dataclass
class Run:
    """A training run, and where it stands; run.json records all of it but the directory."""

    directory: Path
    settings: dict  # what decides the result, by name
    iterations: int  # wanted
    iteration: int = 0  # made
    log: list = field(default_factory=list)  # [[iteration, kld, rec_loss], ...]
    model: str = ""  # the name of the newest checkpoint in the directory
    stale: bool = False  # whether RESULTS may be there, of weights that the next save replaces

    def save(self, model, sess):
        """Save the variables, the record of the run, its log, and what latest_checkpoint reads.

        The variables go to the one of two names that run.json does not name, and then run.json,
        replaced in one step, names it: so at every moment it belongs to a whole checkpoint.
        """
        directory = self.directory / "checkpoint"
        directory.mkdir(exist_ok=True)
        name = "vae_mnist-b" if self.model == "vae_mnist-a" else "vae_mnist-a"
        for path in directory.glob(f"{name}.*"):  # older, or left by a save that was killed
            path.unlink()
        model.saver.save(sess, str(directory / name), write_meta_graph=False, write_state=False)
        self.model = name
        self.write_record()
        if self.stale:
            for result in RESULTS:
                (self.directory / result).unlink(missing_ok=True)
            self.stale = False
            self.write_record()
        lines = "".join(f"{i},{kld!r},{rec_loss!r}\n" for i, kld, rec_loss in self.log)
        write_file(self.directory / "log.csv", f"iteration,kld,rec_loss\n{lines}".encode())
        write_file(directory / "checkpoint", f'model_checkpoint_path: "{name}"\n'.encode())

    def write_record(self):
        record = {key: value for key, value in vars(self).items() if key != "directory"}
        write_file(self.directory / "checkpoint" / "run.json", json.dumps(record).encode())


def read_run(directory):
    """Return the run whose newest checkpoint is in a directory, None if there is none."""
    path = Path(directory) / "run.json"
    if not path.exists():
        return None
    try:
        run = Run(path.parent.parent, **json.loads(path.read_bytes()))
        run.settings.setdefault("decoder", "tutorial")  # once there was no other
        run.settings.setdefault("shards", shard_count())  # nor were these recorded
    except (ValueError, TypeError, AttributeError) as error:
        damaged = "expected the record of a run, got a damaged file; --overwrite begins a new one"
        raise CheckpointError(f"{path}: {damaged}") from error
    return run


def open_run(args, x_train, held):
    """Lock the output directory; return the run that goes on or begins there, if one may."""
    directory, old = args.output_dir / "checkpoint", None
    if not args.resume:
        directory.mkdir(parents=True, exist_ok=True)
    lock(directory, held)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["data"] = "sha256:" + hashlib.sha256(x_train).hexdigest()
    run = Run(args.output_dir, settings, args.iterations or ITERATIONS)
    try:
        old = read_run(directory)
    except CheckpointError:
        if not args.overwrite:
            raise
        run.stale = True
    if old:
        finished = old.iteration >= old.iterations
        state = f"the run in {args.output_dir} made {old.iteration} of {old.iterations} iterations"
    if args.resume:
        if not old:
            raise ValueError(f"--resume: there is no checkpoint in {directory}")
        for name, value in settings.items():
            if value not in (None, recorded := old.settings.get(name)):
                option = f"--resume: --{name.replace('_', '-')} is {value}"
                raise ValueError(f"{option}, but the run in {args.output_dir} has {recorded}")
        if not finished and args.iterations and args.iterations < old.iteration:
            raise ValueError(f"--resume: {state}, beyond --iterations {args.iterations}")
        return old
    settings["shards"] = args.shards or shard_count()
    if old:
        if not (finished or args.overwrite):
            raise ValueError(f"{state}: go on with --resume, or replace it with --overwrite")
        run.model, run.stale = old.model, old.stale or finished
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


def write_saved_model(model, directory, sess):
    """Do what `VAE.export` promises."""
    if os.path.exists(directory):
        raise FileExistsError(f"{directory}: there already; expected the name of a new directory")
    verbosity = tf.logging.get_verbosity()
    tf.logging.set_verbosity(tf.logging.ERROR)  # predict_signature_def calls what is deprecated
    signature = tf.saved_model.predict_signature_def
    encode = signature({"x": model.x}, {"mu": model.mu, "log_sig_sq": model.log_sig_sq})
    decode = signature({"z": model.z}, {"rec": model.rec})
    tf.logging.set_verbosity(verbosity)
    with sess.graph.as_default(), TemporaryDirectory(dir=Path(directory).parent) as beside:
        builder = tf.saved_model.Builder(f"{beside}/model")
        saver = tf.train.Saver(tf.trainable_variables())
        signatures = {"encode": encode, "decode": decode}
        builder.add_meta_graph_and_variables(sess, ["serve"], signatures, saver=saver)
        builder.save()
        os.rename(f"{beside}/model", directory)


def check_losses(iteration, kld, rec_loss):
    """Raise FloatingPointError unless the losses of an iteration are finite."""
    if not np.isfinite(kld + rec_loss):
        losses = f"iteration {iteration}: KLD = {kld:f}, RecLoss = {rec_loss:f}"
        raise FloatingPointError(f"{losses}, so training stopped; try a lower --learning-rate")


# ----------------------------------------------------------------------------- report and page
SAMPLES = 100  # of z for an image
# Ten colours that colour-blind people can tell apart: Petroff 2021, arXiv:2107.02270.
COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]  # fmt: skip


def code_features(model):
    """Return features of codes z: h(z), 1 and -z^2 / 2 - sum softplus(logits), (B, units + 2).

    The last layer is logits = h W + b, so log p(x | z) = x . logits - sum softplus(logits) =
    (x W^T) . h + x . b - sum softplus(logits): a product with features of x, but for -z^2 / 2.
    """
    hidden = tf.concat(model.hidden, axis=0)
    normalizer = [tf.reduce_sum(tf.nn.softplus(shard), axis=1) for shard in model.logits]
    offset = -tf.concat(normalizer, axis=0) - tf.reduce_sum(tf.square(model.z), axis=1) / 2
    return tf.concat([hidden, tf.ones_like(offset)[:, None], offset[:, None]], axis=1)


def evaluate(model, sess, images, seed=0, reach=6.0, step=0.03):
    """Measure what a model has learnt of images, uint8 (N, 28, 28), in nats an image.

    `seed` decides the samples of z, 100 an image; `reach` and `step` the grid of codes, over
    [-reach, reach] in both dimensions. Returns arrays (N,), float64, by name:
    "RecLoss": equation (2), averaged over the samples; "KLD": (1); "-ELBO": their sum.
    "IW bound": the importance-weighted bound, -log 1/100 sum_k p(x, z_k) / q(z_k | x) (Burda,
    Grosse and Salakhutdinov 2015, arXiv:1509.00519).
    "NLL": -log p(x), the integral of N(z; 0, I) p(x | z) dz, as a sum over the grid.
    "KL(q || p)": -ELBO - NLL, the divergence of the encoder's q(z | x) from the exact p(z | x).
    """
    rng, x = np.random.default_rng(seed), scale(images)
    with sess.graph.as_default():
        kernel, bias = sess.run(tf.trainable_variables()[-2:])
        of_images = np.column_stack([x @ kernel.T, x @ bias, np.ones(len(x), np.float32)])
        of_codes = code_features(model)
        fed = tf.placeholder(tf.float32, of_images.shape)
        joint = [tf.matmul(part, of_codes, transpose_b=True) for part in split(fed, model.shards)]
        log_sum = tf.concat([tf.reduce_logsumexp(part, axis=1) for part in joint], axis=0)
    mu, log_sig_sq = np.asarray(model.encode(x, sess), np.float64)
    kld = 0.5 * np.sum(np.exp(log_sig_sq) - log_sig_sq + mu**2 - 1, axis=1)
    rec_loss, log_ratios = np.zeros(len(x)), []
    for eps in rng.standard_normal((len(x), SAMPLES, LATENT)).swapaxes(0, 1):  # (N, K) each
        z = mu + np.exp(log_sig_sq / 2) * eps
        log_joint = np.sum(of_images * sess.run(of_codes, {model.z: z}), 1, np.float64)
        rec_loss -= (log_joint + np.sum(z**2, axis=1) / 2) / SAMPLES
        log_ratios.append(log_joint + np.sum(eps**2 + log_sig_sq, axis=1) / 2)
    iw_bound = np.log(SAMPLES) - np.logaddexp.reduce(log_ratios)

    grid = np.linspace(-reach, reach, round(2 * reach / step) + 1)
    codes = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, LATENT)
    log_px = np.full(len(x), -np.inf)
    for z in np.array_split(codes, 1 + len(codes) // 500):
        log_px = np.logaddexp(log_px, sess.run(log_sum, {fed: of_images, model.z: z}))
    nll = np.log(2 * np.pi / (grid[1] - grid[0]) ** 2) - log_px
    figures = {"RecLoss": rec_loss, "KLD": kld, "-ELBO": rec_loss + kld}
    return figures | {"IW bound": iw_bound, "NLL": nll, "KL(q || p)": rec_loss + kld - nll}


@matplotlib.style.context("default")
def draw_report(model, sess, test, run, means):
    """Draw codes and reconstructions of the test set and the losses of the run: report.png."""
    images, labels = test
    fig = matplotlib.figure.Figure(figsize=(9, 8.8), dpi=150, layout="constrained")
    of = f"{run.settings['decoder']} decoder, seed {run.settings['seed']}"
    fig.suptitle(f"{of}, {run.iteration:,} iterations: NLL {means['NLL']:.2f} nats an image")
    panels = fig.subplot_mosaic("AB;CC", width_ratios=(2, 1), height_ratios=(2, 1))
    codes, sheet, losses = panels.values()
    mu, _ = model.encode(scale(images), sess)
    codes.scatter(*mu.T, s=2, linewidth=0, c=[COLOURS[label % 10] for label in labels])
    for label in np.unique(labels):
        codes.scatter([], [], c=COLOURS[label % 10], label=label)
    codes.legend(title="digit", loc="upper left", bbox_to_anchor=(1, 1))
    codes.add_patch(matplotlib.patches.Rectangle((-2, -2), 4, 4, fill=False, linestyle="--"))
    codes.set(title=f"Codes of {len(images):,} test images: KLD {means['KLD']:.2f}", aspect="equal")
    codes.set(xlabel="mu[0]; dashed: what latent.png shows", ylabel="mu[1]")
    classes = np.unique(labels)[:10]
    digits = np.zeros((len(classes), 2, SIDE, 10, SIDE), np.float32)
    for (above, below), label in zip(digits, classes):
        x, mu_x = (part[labels == label][:10] for part in (images, mu))
        above[:, : len(x)] = x.swapaxes(0, 1) / 255
        below[:, : len(x)] = model.decode(mu_x, sess).swapaxes(0, 1)
    sheet.imshow(digits.reshape(-1, 10 * SIDE), cmap="Greys_r", vmin=0, vmax=1)
    title = f"Images over reconstructions:\nRecLoss {means['RecLoss']:.2f}"
    sheet.set(title=title, ylabel="digit", xticks=[], anchor="N")
    sheet.set_yticks(np.arange(len(classes)) * 2 * SIDE + SIDE - 0.5, classes)
    iterations, kld, rec_loss = np.transpose(run.log)
    last = f"KLD {kld[-1]:.2f}, RecLoss {rec_loss[-1]:.2f}"
    losses.set(title=f"One batch in iteration {iterations[-1]:,.0f}: {last}")
    losses.set(xlabel=f"iteration; RecLoss begins at {rec_loss[0]:.2f}")
    curves = (losses, "RecLoss", rec_loss, COLOURS[0]), (losses.twinx(), "KLD", kld, COLOURS[2])
    for axes, name, values, colour in curves:
        axes.plot(iterations, values, color=colour, linewidth=1)
        axes.set_ylabel(name, color=colour)
        settled = values[len(values) // 20 :]  # the first ones would squeeze the rest into a line
        margin = 0.1 * np.ptp(settled) + 0.01
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    write_file(run.directory / "report.png", fig)


def report(model, sess, test, run):
    """Print what `evaluate` measures on the test set, save it as metrics.json, draw report.png."""
    print(f"On {len(test[0]):,} test images, nats an image (standard error):")
    means, metrics = {}, {}
    for name, values in evaluate(model, sess, test[0]).items():
        mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
        means[name], metrics[name] = mean, {"mean": mean, "standard_error": error}
        print(f"{name:10} {mean:8.2f} ({error:.2f})")
    content = {"settings": run.settings, "iteration": run.iteration, "metrics": metrics}
    write_file(run.directory / "metrics.json", (json.dumps(content, indent=2) + "\n").encode())
    draw_report(model, sess, test, run, means)
    print(f"These figures are in metrics.json, pictures to them in {run.directory / 'report.png'}")


def explore(model, sess, test, run):
    """Write explore.html, the frame in data/ with a run's numbers; return its path, or None."""
    frame, page = HERE / "data" / "explore.html", run.directory / "explore.html"
    if not frame.exists():  # the module stands alone
        return None
    images, labels = (part[:10000] for part in test)
    shown = np.concatenate([np.flatnonzero(labels == n)[:2] for n in np.unique(labels)[:10]])
    codes = [model.encode(scale(part), sess)[0] for part in np.array_split(images, 100)]
    grid = np.linspace(-3, 3, 101)
    rows = np.stack(np.meshgrid(grid, grid[::-1]), axis=-1)  # one at a time takes little memory
    offset = code_features(model)[:, -1]
    offsets = [sess.run(offset, {model.z: z}) for z in rows]
    decoder, seed = run.settings["decoder"], run.settings["seed"]
    of = f"{decoder} decoder, {run.iteration:,} iterations, seed {seed}"
    numbers = {"decoder": decoder, "run": of, "codes": np.concatenate(codes), "colours": COLOURS}
    numbers |= {"labels": labels.tolist(), "shown": labels[shown].tolist(), "images": images[shown]}
    numbers |= {"offset": np.concatenate(offsets), "variables": sess.run(tf.trainable_variables())}
    text = json.dumps(numbers, default=lambda array: b64encode(array.tobytes()).decode())
    write_file(page, frame.read_bytes().replace(b">null<", f">{text}<".encode()))
    return page


# -------------------------------------------------------------------------------- command line
def argument(kind, valid, expected, text):
    """Return the value of a kind that a text on the command line stands for, if it is valid."""
    with suppress(ValueError):
        if valid(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def parse_arguments(argv):
    """Return the parser of the command line, and the options."""
    parser = argparse.ArgumentParser("vae_mnist.py", description=__doc__.splitlines()[0])
    parser.error = lambda error: parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")

    def add(name, text, default, shown=None, to=parser, **how):
        to.add_argument(name, default=default, help=f"{text} (default: {shown or default})", **how)

    most = 2**31 - 1
    positive = partial(argument, int, lambda n: 1 <= n <= most, f"a whole number from 1 to {most}")
    seed = partial(argument, int, lambda n: 0 <= n <= most, f"a whole number from 0 to {most}")
    shards = partial(argument, int, lambda n: 1 <= n <= 64, "a whole number from 1 to 64")
    rate = partial(argument, float, lambda r: 1e-45 <= r <= 3.4e38, "a number above 0")  # float32
    # TensorFlow wants names in UTF-8, and takes those with other characters for patterns.
    plain = re.compile(r"[^*?[\\\ud800-\udfff]+").fullmatch
    path = partial(argument, Path, lambda p: plain(p.as_posix()), "a name in UTF-8, no * ? [ \\")
    add("--data", "an .npz archive", None, "data/mnist.npz", metavar="FILE")
    add("--output-dir", "where files go, made if missing", "outputs", type=path, metavar="DIR")
    add("--iterations", "updates to make", None, ITERATIONS, type=positive, metavar="N")
    add("--batch-size", "images an iteration", BATCH_SIZE, type=positive, metavar="N")
    add("--learning-rate", "step size of Adam", LEARNING_RATE, type=rate, metavar="R")
    add("--decoder", "as the tutorial lists or describes it", "tutorial", choices=DECODERS)
    add("--seed", "decides everything random", 0, type=seed, metavar="N")
    add("--shards", "parts of a batch", None, "what suits the machine", type=shards, metavar="N")
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
    how = {name: run.settings[name] for name in ("learning_rate", "seed", "shards", "decoder")}
    with tf.Graph().as_default(), session(how["shards"]) as sess:
        model = VAE(**how)
        if args.resume:
            model.restore(run.directory / "checkpoint", sess)
            run.save(model, sess)  # so that all files are of one iteration, even after a kill
            run.stale = run.iteration >= run.iterations
            run.iterations = max(args.iterations or run.iterations, run.iteration)
        else:
            sess.run(tf.global_variables_initializer())
            if run.stale and not args.overwrite:
                print(f"Replacing the finished run in {run.directory}")
        with ExitStack() as training:
            stopped = stop_signals(training)
            train(model, sess, x_train, run, args.log_every, args.checkpoint_every, stopped)
        if stopped:
            text = f"{signal.Signals(stopped[0]).name} after {run.iteration} of {run.iterations}"
            text = f"Stopped by {text} iterations; go on with the same options and --resume"
            print(text, file=sys.stderr)
            return 128 + stopped[0]
        display_manifold(model, sess, run.directory / "latent.png", args.show)
        where = f"The manifold of the latent codes is in {run.directory / 'latent.png'}"
        page = explore(model, sess, test, run)
        print(f"{where}; move through it in {page}" if page else where)
        if args.report:
            report(model, sess, test, run)
    return 0


def main(argv=None):
    """Do what the command line says; return 0, or 128 plus the number of a signal that stopped it.

    Raises SystemExit: with status 2 for wrong options, data or checkpoint, 1 after a fault.
    """
    parser, args = parse_arguments(argv)
    with ExitStack() as held:
        try:
            # the tutorial ignores testing data and labels; a report needs them
            (x_train, _), test = load_mnist(args.data)
            run = open_run(args, x_train, held)
        except (OSError, ValueError) as error:
            parser.error(error)
        try:
            return work(args, run, x_train, test)
        except CheckpointError as error:
            parser.error(f"--resume: {error}")
        except (OSError, MemoryError, FloatingPointError, tf.errors.OpError) as error:
            if isinstance(error, MemoryError):
                error = f"no memory for batches of {args.batch_size} images: {error}"
            parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")


if __name__ == "__main__":
    sys.exit(main())
