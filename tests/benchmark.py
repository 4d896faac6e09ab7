"""Measure what training costs, beside the tutorial's own loop, PyTorch and JAX.

    python tests/benchmark.py               # seven rounds, about ten minutes
    python tests/benchmark.py --rounds 3
    python tests/benchmark.py --batch-size 4096

It prints the figures that README quotes, and the ratios that the project has set itself as goals.
Each round runs every row once, in a process of its own, so that a change in the machine's speed
meets all rows alike. The rows of PyTorch and JAX need the packages torch and jax.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

BATCH = 256
TUTORIAL = "as the tutorial writes it"
MINIMIZE = "`adam.minimize`"
PROJECT = "`--shards {}`"
TORCH = "PyTorch"
COMPILED = "`torch.compile`"
JAX = "JAX, `lax.scan`"
LAYERS = [(784, 256), (256, 128), (128, 64), (64, 4)]
LAYERS += [(2, 256), (256, 128), (128, 64), (64, 4), (4, 784)]
LINEAR = (3, 7, 8)


def median_ms(function, count=500, warm_up=100):
    """Return the median time of a call of function(i), in milliseconds."""
    times = []
    for i in range(warm_up + count):
        start = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warm_up:])


def tutorial():
    """An iteration as the tutorial writes it; only tf.layers.dense had to be replaced."""
    import numpy as np
    import tensorflow.compat.v1 as tf

    import vae_mnist

    (x_train, _), _ = vae_mnist.load_mnist()
    x_train = (x_train / 255.0).reshape(-1, 28**2)

    def dense(fc, i, activation=None):
        with tf.variable_scope(f"dense_{i}"):
            kernel = tf.get_variable("kernel", LAYERS[i])
            bias = tf.get_variable("bias", LAYERS[i][1:], initializer=tf.zeros_initializer())
        fc = tf.nn.bias_add(tf.matmul(fc, kernel), bias)
        return activation(fc) if activation else fc

    with tf.Graph().as_default():
        fc = x = tf.placeholder(tf.float32, shape=[None, 28**2])
        for i in range(4):
            fc = dense(fc, i, None if i in LINEAR else tf.nn.elu)
        mu, log_sig_sq = fc[:, :2], fc[:, 2:]
        eps = tf.random_normal(tf.shape(mu), 0.0, 1.0, dtype=tf.float32)
        fc = tf.add(mu, tf.sqrt(tf.exp(log_sig_sq)) * eps)
        for i in range(4, 8):
            fc = dense(fc, i, None if i in LINEAR else tf.nn.elu)
        rec = dense(fc, 8, tf.sigmoid)
        likelihood = x * tf.log(tf.clip_by_value(rec, 1e-10, 1.0))
        likelihood += (1.0 - x) * tf.log(tf.clip_by_value(1.0 - rec, 1e-10, 1.0))
        rec_loss = tf.reduce_mean(-tf.reduce_sum(likelihood, axis=1))
        kld = 1.0 + log_sig_sq - tf.square(mu) - tf.exp(log_sig_sq)
        kld = tf.reduce_mean(-0.5 * (tf.reduce_sum(kld, axis=1)))
        opt = tf.train.AdamOptimizer().minimize(kld + rec_loss)
        with tf.Session() as sess:
            sess.run(tf.global_variables_initializer())

            def iteration(i):
                batch_idx = np.random.randint(len(x_train), size=BATCH)
                sess.run([opt, kld, rec_loss], feed_dict={x: x_train[batch_idx, :]})

            return {TUTORIAL: median_ms(iteration)}


def project(shards, minimized=False):
    """An iteration of this project: the batch, the feed and the update."""
    import tensorflow.compat.v1 as tf

    import vae_mnist

    (x_train, _), _ = vae_mnist.load_mnist()
    with tf.Graph().as_default():
        model = vae_mnist.VAE(shards=shards)
        update = model.opt
        if minimized:
            update = tf.train.AdamOptimizer().minimize(model.loss, model.iteration)
        with vae_mnist.session(shards) as sess:
            sess.run(tf.global_variables_initializer())
            batches = vae_mnist.random_batches(x_train, BATCH)
            name = MINIMIZE if minimized else PROJECT.format(shards)
            return {name: median_ms(lambda _: sess.run(update, {model.x: next(batches)}))}


def start_up():
    """Seconds that a process takes to import TensorFlow, and the program to its first line."""
    program = [ROOT / "vae_mnist.py", "--iterations", "1"]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for arguments in (["-c", "import tensorflow"], [*program, "--output-dir", folder]):
            command = [sys.executable, *arguments]
            start = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                process.stdout.readline()
                seconds.append(time.perf_counter() - start)
    return {"`import tensorflow`, s": seconds[0], "start, s": seconds[1]}


def run(decoder, *options):
    """A run of 5,000 iterations: seconds of the training and the report, and peak memory."""
    import vae_mnist

    seconds = {}

    def timed(name):
        function = getattr(vae_mnist, name)

        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            seconds[name] = time.perf_counter() - start
            return result

        setattr(vae_mnist, name, call)

    timed("train")
    timed("report")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        assert vae_mnist.main(["--decoder", decoder, "--output-dir", folder, *options]) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if not options:
        return {"memory, MB": peak}
    share = seconds["report"] / seconds["train"]
    if decoder == "tutorial":
        return {"report / training": share}
    return {"the same, mirrored": share, "memory, mirrored, with report, MB": peak}


def torch_row(compiled):
    """The same iteration in PyTorch, with its fused Adam."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    x_train = np.load(ROOT / "data" / "mnist.npz")["x_train"].reshape(-1, 784)
    x_train = torch.from_numpy(x_train)
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(*shape) for shape in LAYERS)

    def apply(fc, which):
        for i in which:
            fc = layers[i](fc) if i in LINEAR else F.elu(layers[i](fc))
        return fc

    def loss(x):
        mu, log_sig_sq = apply(x, range(4)).chunk(2, dim=1)
        z = mu + torch.exp(log_sig_sq / 2) * torch.randn_like(mu)
        logits = apply(z, range(4, 9))
        rec_loss = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (rec_loss + 0.5 * (log_sig_sq.exp() + mu**2 - 1 - log_sig_sq).sum()) / len(x)

    step = torch.compile(loss) if compiled else loss
    adam = torch.optim.Adam(layers.parameters(), lr=0.001, fused=True)

    def iteration(i):
        x = x_train[torch.randint(len(x_train), (BATCH,))].float() / 255
        adam.zero_grad()
        step(x).backward()
        adam.step()

    return {COMPILED if compiled else TORCH: median_ms(iteration)}


def jax_row():
    """The same iteration in JAX: 100 of them in one jitted scan, the batch drawn inside."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x_train = jnp.asarray(np.load(ROOT / "data" / "mnist.npz")["x_train"].reshape(-1, 784))
    keys = jax.random.split(jax.random.key(0), len(LAYERS))
    glorot = jax.nn.initializers.glorot_uniform()
    weights = [(glorot(k, s), jnp.zeros(s[1])) for k, s in zip(keys, LAYERS)]

    def apply(weights, fc, which):
        for i in which:
            fc = fc @ weights[i][0] + weights[i][1]
            fc = fc if i in LINEAR else jax.nn.elu(fc)
        return fc

    def loss(weights, x, key):
        mu, log_sig_sq = jnp.split(apply(weights, x, range(4)), 2, axis=1)
        z = mu + jnp.exp(log_sig_sq / 2) * jax.random.normal(key, mu.shape)
        logits = apply(weights, z, range(4, 9))
        rec_loss = (jax.nn.softplus(logits) - x * logits).sum()
        return (rec_loss + 0.5 * (jnp.exp(log_sig_sq) + mu**2 - 1 - log_sig_sq).sum()) / len(x)

    def step(state, key):
        weights, m, v, t = state
        batch_key, noise_key = jax.random.split(key)
        x = x_train[jax.random.randint(batch_key, (BATCH,), 0, len(x_train))] / jnp.float32(255)
        gradient = jax.grad(loss)(weights, x, noise_key)
        tree, t = jax.tree.map, t + 1
        m = tree(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = tree(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
        rate = 0.001 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        weights = tree(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), weights, m, v)
        return (weights, m, v, t), None

    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = (weights, zeros, zeros, 0)
    scan = jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, 100))[0])

    def hundred(i):
        nonlocal state
        state = jax.block_until_ready(scan(state, jax.random.key(i)))

    return {JAX: median_ms(hundred, 5, 1) / 100}


def moves(browser):
    """Return how many seconds 50 moves of the pen take at a sixth of the speed."""
    cdp = browser.execute_cdp_cmd
    box = browser.find_element("id", "draw").rect
    cdp("Emulation.setCPUThrottlingRate", {"rate": 6})
    time.sleep(0.5)
    start = time.perf_counter()
    for i in range(50):
        x = box["x"] + box["width"] * (0.5 + 0.35 * math.cos(i / 3))
        y = box["y"] + box["height"] * (0.5 + 0.35 * math.sin(i / 3))
        kind = "mouseMoved" if i else "mousePressed"
        event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1}
        cdp("Input.dispatchMouseEvent", event)
    seconds = time.perf_counter() - start
    cdp("Input.dispatchMouseEvent", {**event, "type": "mouseReleased"})
    cdp("Emulation.setCPUThrottlingRate", {"rate": 1})
    return seconds


def page():
    """The page of a mirrored decoder: what takes how long in a browser, or None without one."""
    from conftest import chromium

    import vae_mnist

    with tempfile.TemporaryDirectory() as directory:
        options = ["--iterations", "100", "--decoder", "mirrored", "--output-dir", directory]
        with contextlib.redirect_stdout(io.StringIO()):
            vae_mnist.main(options)
        browser = chromium(f"{directory}/profile")
        if not browser:
            return {}
        observe = """globalThis.tasks = [0]; new PerformanceObserver(list => tasks.push(
            ...list.getEntries().map(e => e.duration))).observe({type: "longtask"})"""
        how = {"source": observe}
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", how)
        browser.get(Path(directory, "explore.html").as_uri())
        usable = "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
        usable = browser.execute_script(usable) / 1000
        while not browser.execute_script("return vae.state.isReady"):
            time.sleep(0.01)
        ready = browser.execute_script("return performance.now()") / 1000
        script = """const x = vae.decode([0, 0]), start = performance.now();
            for (let i = 0; i < 100; i++) arguments[0] ? vae.posterior(x) : vae.decode([i / 50, 0]);
            return (performance.now() - start) / 100"""
        decode, posterior = (browser.execute_script(script, which) for which in (0, 1))
        browser.get(Path(directory, "explore.html").as_uri())
        time.sleep(3)
        longest = browser.execute_script("return Math.max(...tasks)")
        drawing = moves(browser)
        empty = Path(directory, "empty.html")
        empty.write_text("<canvas id=draw width=140 height=140 style='width: 180px'></canvas>")
        browser.get(empty.as_uri())
        drawing /= moves(browser)
        browser.quit()
    return {
        "page usable, s": usable,
        "grid ready, s": ready,
        "a decode, ms": decode,
        "a posterior, ms": posterior,
        "longest pause, ms": longest,
        "pen / empty canvas": drawing,
    }


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ROWS = {  # what is measured, and the package that it needs
    "tutorial": (tutorial, None),
    "minimize": (partial(project, 2, minimized=True), None),
    **{f"shards {2**n}": (partial(project, 2**n), None) for n in range(7) if 2**n <= CORES},
    "torch": (partial(torch_row, False), "torch"),
    "torch.compile": (partial(torch_row, True), "torch"),
    "jax": (jax_row, "jax"),
    "start": (start_up, None),
    "page": (page, "selenium"),
    "run": (partial(run, "tutorial"), None),
    "report": (partial(run, "tutorial", "--report"), None),
    "report mirrored": (partial(run, "mirrored", "--report"), None),
}
ITERATIONS = [TUTORIAL, MINIMIZE, *(PROJECT.format(2**n) for n in range(7)), TORCH, COMPILED, JAX]
GOALS = [  # one of the measurements, what it is divided by, the limit
    (PROJECT.format(2), MINIMIZE, 0.6),
    (PROJECT.format(2), TORCH, 0.75),
    (PROJECT.format(2), COMPILED, 0.75),
    (PROJECT.format(2), JAX, 0.92),
    ("start, s", "`import tensorflow`, s", 1.6),
    ("report / training", None, 0.8),
    ("the same, mirrored", None, 0.8),
    ("memory, MB", None, 750),
    ("memory, mirrored, with report, MB", None, 1000),
    ("page usable, s", None, 0.3),
    ("grid ready, s", None, 3),
    ("a decode, ms", None, 2),
    ("a posterior, ms", None, 30),
    ("longest pause, ms", None, 100),
    ("pen / empty canvas", None, 3),
]


def measure(row, batch_size):
    """Return what a row measures in a process of its own: nothing where its package is missing."""
    package = ROWS[row][1]
    if package and not importlib.util.find_spec(package):
        return {}
    command = [sys.executable, __file__, "--row", row, "--batch-size", str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{row}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(title, values):
    """Print medians and ranges of samples by name."""
    lines = {title: [], "---": [], "median": [], "from, to": []}
    for name, samples in values.items():
        lines[title].append(name)
        lines["---"].append("---")
        lines["median"].append(f"{statistics.median(samples):.3g}")
        lines["from, to"].append(f"{min(samples):.3g}, {max(samples):.3g}")
    for first, cells in lines.items():
        print("|", " | ".join([first, *cells]), "|")
    print()


def main():
    """Measure all rows in turn, several times, and print medians, ranges and ratios."""
    global BATCH
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    BATCH = args.batch_size
    if args.row:
        print(json.dumps(ROWS[args.row][0]()))
        return
    values = {}
    for i in range(args.rounds):
        for row in ROWS:
            for name, value in measure(row, BATCH).items():
                values.setdefault(name, []).append(value)
        print(f"round {i + 1} of {args.rounds} done", file=sys.stderr, flush=True)

    of_iterations = {name: values[name] for name in values if name in ITERATIONS}
    print_table("an iteration, ms", of_iterations)
    print_table("a run", {name: values[name] for name in values if name not in ITERATIONS})
    print("| ratio | measured | at most |\n| --- | --- | --- |")
    for name, divisor, limit in GOALS:
        if name in values and (divisor is None or divisor in values):
            ratio = statistics.median(values[name])
            if divisor is not None:
                ratio /= statistics.median(values[divisor])
            print(f"| {name}{f' / {divisor}' if divisor else ''} | {ratio:.3g} | {limit} |")


if __name__ == "__main__":
    main()
