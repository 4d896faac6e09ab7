"""The page explore.html in real browsers, compared with the session and with NumPy."""

import base64
import io
import json
import os
import re
import time
import urllib.request

import matplotlib.image
import numpy as np
import pytest
import websocket  # a package that selenium needs
from conftest import built, chromium, webkit
from IPython.display import IFrame
from matplotlib.colors import to_hex, to_rgb
from processes import ROOT
from reference import Reference
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

import vae_mnist

pytestmark = pytest.mark.slow
FRAME = vae_mnist.DATA / "explore.html"
STROKE = "30 25 45 15 60 20 65 32 55 42 45 46 58 50 68 62 62 78 45 85 30 78"  # a three, in %
STROKE = np.array(STROKE.split(), float).reshape(-1, 2) / 100
LOSSES_WITHIN = [0.03, 0.0051, 0.03, 0.1]
GRID = np.linspace(-4.5, 4.5, 121)
MEDIA = "Emulation.setEmulatedMedia"
PICK = "shown.children[arguments[0]].click()"
TAKE = "vae.setImage(Float32Array.from(arguments[0]))"
SETTLED = """vae.state.isReady && !vae.state.asked && !vae.state.target && !vae.state.hasNew
    && (!vae.state.image || vae.state.image.losses)"""
CLEAR = "document.getElementById('clear').click()"
RESET = (
    f"{CLEAR}; "
    + """vae.state.pinned = false; vae.moveTo([0, 0]); scrollTo(0, 0);
    document.querySelector("[value=manifold]").click(); plane.focus({preventScroll: true})"""
)


class Page:
    """A page in a browser, and what a reader does with it."""

    def __init__(self, browser, path):
        self.browser, self.path, self.run = browser, path, browser.execute_script

    def cdp(self, command, **parameters):
        return self.browser.execute_cdp_cmd(command, parameters)

    def resize(self, width, height):
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.cdp("Emulation.setDeviceMetricsOverride", **device)

    def slow_down(self, times):
        self.cdp("Emulation.setCPUThrottlingRate", rate=times)

    def open(self, path=None, until=SETTLED):
        self.browser.get((path or self.path).as_uri())
        self.wait(until)

    def wait(self, until=SETTLED):
        look = f"(function look() {{({until}) ? done() : setTimeout(look, 20)}})()"
        self.browser.execute_async_script(f"const done = arguments[0]; {look}")

    def do(self, script, *arguments):
        self.run(script, *arguments)
        self.wait()

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return " ".join(" ".join(each.text for each in self.find(selector)).split())

    def drawn(self, side=28):
        return np.reshape(self.run("return [...vae.drawn]"), (side, side))

    def losses(self):
        return [float(each.text) for each in self.find("#losses b") if each.text]

    def boxes(self, selector):
        """Return [left, top, right, bottom] of each element that a selector finds."""
        script = """return [...document.querySelectorAll(arguments[0])].map(each => {
            const box = each.getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom]})"""
        return np.array(self.run(script, selector))

    def pixels(self, name):
        """Return a canvas of greys on black, (height, width), from 0 to 255."""
        png = self.run("return document.getElementById(arguments[0]).toDataURL()", name)
        image = matplotlib.image.imread(io.BytesIO(base64.b64decode(png.split(",")[1])))
        return 255 * image[..., 0] * image[..., 3]

    def screen(self):
        """Return what is seen of the plane, (840, 840, 3), from 0 to 255."""
        left, top, right, _ = self.boxes("#plane")[0]
        side = right - left
        clip = {"x": left, "y": top, "width": side, "height": side, "scale": 840 / side}
        png = self.cdp("Page.captureScreenshot", clip=clip)["data"]
        return 255 * matplotlib.image.imread(io.BytesIO(base64.b64decode(png)))[:840, :840, :3]

    def places(self, name, points):
        """Return where in the window points are, given as fractions of an element."""
        left, top, right, bottom = self.boxes(f"#{name}")[0]
        return [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]

    def mouse(self, name, points, button="left", buttons=1):
        """Press a button of the mouse on the first of several points; move it on."""
        places = self.places(name, points)
        kinds = ["mousePressed"] + ["mouseMoved"] * (len(places) - 1) + ["mouseReleased"]
        for kind, (x, y) in zip(kinds, [*places, places[-1]]):
            how = {"button": button, "buttons": buttons, "clickCount": 1}
            self.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, **how)
        self.wait()

    def hover(self, *point):
        ((x, y),) = self.places("plane", [point])
        self.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.wait()
        return np.array(self.run("return vae.z"))

    def touch(self, kind, name, *points):
        touches = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(self.places(name, points))]
        self.cdp("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=touches)

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)
        self.wait()


@pytest.fixture(scope="module")
def network(trained_runs):
    """The mirrored decoder's page, its model and session, and the same in NumPy float64."""
    with vae_mnist.trained(trained_runs["mirrored"]) as (model, sess):
        path = trained_runs["mirrored"] / "explore.html"
        yield path, model, sess, Reference(sess.run(model.weights), "mirrored")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    if not browser:
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing("needs Chromium or Chrome, and chromedriver")
    yield browser
    browser.quit()


@pytest.fixture
def blank(browser, network):
    """A wide window for the page of the mirrored decoder, which is still to be opened."""
    page = Page(browser, network[0])
    page.resize(1400, 900)
    yield page
    page.cdp(MEDIA)
    page.slow_down(1)


@pytest.fixture
def page(blank):
    """That page, opened once for many tests, with nothing at hand."""
    if blank.browser.current_url != blank.path.as_uri():
        blank.open()
    blank.do(RESET)
    return blank


@pytest.fixture(scope="module")
def encoded(network, mnist):
    """All test images, and mu and log_sig_sq of each, as the reference has them."""
    x = vae_mnist.scale(mnist[1][0])
    return x, *network[3].encode(x)


def codes_of(right, up):
    """Return all codes of two axes, by rows from the top, (codes, 2)."""
    return np.stack(np.meshgrid(right, up[::-1]), axis=-1).reshape(-1, 2)


def log_joint(reference, images, z):
    """Return log p(x, z), (codes, images), from sums over pixels in float64."""
    log_p = []
    for part in np.array_split(z, 1 + len(z) // 5000):
        logits = reference.decode(part)
        constant = np.sum(np.logaddexp(0, logits), axis=1) + np.sum(part**2, axis=1) / 2
        log_p.append(logits @ np.transpose(images) - constant[:, None] - np.log(2 * np.pi))
    return np.concatenate(log_p)


def expected_losses(reference, images, n=241):
    """Return RecLoss, KLD, their sum and KL(q || p), (images, 4), by finer quadratures."""
    mu, log_sig_sq = reference.encode(images)
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    sigma = np.exp(log_sig_sq / 2)
    z = mu[:, None] + sigma[:, None] * codes_of(nodes, nodes)
    rec_loss = np.array([-weights @ reference.log_px(*pair) for pair in zip(images, z)])
    kld = 0.5 * np.sum(sigma**2 - log_sig_sq + mu**2 - 1, axis=1)
    axis = np.linspace(-4.5, 4.5, n)
    log_px = np.logaddexp.reduce(log_joint(reference, images, codes_of(axis, axis)), axis=0)
    total = rec_loss + kld
    return np.stack([rec_loss, kld, total, total + log_px + 2 * np.log(9 / (n - 1))], axis=1)


@pytest.fixture(scope="module")
def shown(network, mnist):
    """The twenty test images of the page, their losses, p(z | x) on its grid, and what is beyond."""
    images, labels = mnist[1]
    x = np.concatenate([vae_mnist.scale(images[labels == n][:2]) for n in range(10)])
    log_p = log_joint(network[3], x, codes_of(GRID, GRID))
    p = np.exp(log_p - log_p.max(axis=0))
    p = (p / p.sum(axis=0)).T.reshape(20, 121, 121)
    inside = np.where(np.isclose(np.abs(GRID), 3), 0.5, np.abs(GRID) < 3)  # a half on the edge
    return x, expected_losses(network[3], x), p, 1 - np.einsum("kij,i,j->k", p, inside, inside)


def pen_ink(strokes, radius):
    """Return where ink is, in 560 x 560 parts of a square, after strokes of a round pen."""
    middle = (np.arange(560) + 0.5) / 560
    x, y = np.meshgrid(middle, middle)
    ink = np.zeros(x.shape, bool)
    for points in strokes:
        ways = np.diff(points, axis=0, append=points[-1:])
        for (x0, y0), (right, down) in zip(points, ways):
            along = ((x - x0) * right + (y - y0) * down) / max(right**2 + down**2, 1e-9)
            along = np.clip(along, 0, 1)
            ink |= np.hypot(x - x0 - along * right, y - y0 - along * down) < radius
    return ink


def mnist_form(strokes):
    """Return strokes as MNIST's authors would: in a box of 20 x 20, by a pen as wide as theirs."""
    places = np.concatenate(strokes)
    lowest = places.min(axis=0)
    side = np.ptp(places, axis=0).max()
    radius = 1.3 / 20
    scaled = [(points - lowest) * (1 - 2 * radius) / side + radius for points in strokes]
    box = pen_ink(scaled, radius).reshape(20, 28, 20, 28).mean(axis=(1, 3))
    means = [box.sum(axis=axis) @ np.arange(20) / box.sum() for axis in (1, 0)]
    down, right = np.clip(np.rint(14 - np.array(means)), 0, 8).astype(int)  # the box stays inside
    return np.pad(box, ((down, 8 - down), (right, 8 - right)))


def assert_drawn(page, *strokes):
    """The pad shows strokes, and `drawn` is their form, but for how grey the rim is."""
    on_pad = pen_ink(strokes, 1 / 24).reshape(140, 4, 140, 4).mean(axis=(1, 3))
    for found, exact in ((page.pixels("draw") / 255, on_pad), (page.drawn(), mnist_form(strokes))):
        assert np.abs(found - exact).max() < 0.4 and np.abs(found - exact).mean() < 0.01


# -------------------------------------------------------------------------------- the numbers
def test_page_begins_dark_and_says_how_far_it_is_on_a_slow_machine(blank, shown):
    """And when it is there, it shows the image of the largest KL(q || p)."""
    x, losses, _, _ = shown
    blank.slow_down(6)
    blank.open(until="globalThis.vae")
    assert not blank.pixels("plane")[784:].any()
    assert re.fullmatch(r"The map is being computed: \d+ %", blank.text("#wait"))
    found = blank.run("return [vae.state.isReady, vae.posterior(arguments[0])]", x[0].tolist())
    assert found == [False, None]
    blank.slow_down(1)
    blank.wait()
    (picked,) = np.flatnonzero([each.is_selected() for each in blank.find("#shown input")])
    assert not blank.text("#wait") and losses[picked, 3] > losses[:, 3].max() - 0.2


def test_picked_images_have_exact_numbers_and_their_sentence(page, network, mnist, shown):
    x, losses, p, beyond = shown
    _, model, sess, _ = network
    kl = losses[:, 3]
    said = set()
    for i in {*np.argsort(kl)[[0, 12, 19]], beyond.argmax(), np.abs(kl - 1.5).argmin()}:
        page.find("#shown canvas")[i].click()
        page.wait()
        assert [r.is_selected() for r in page.find("#shown input")] == [j == i for j in range(20)]
        np.testing.assert_allclose(page.pixels("draw")[2::5, 2::5].ravel(), 255 * x[i], atol=0.01)
        mu, _ = model.encode(x[i : i + 1], sess)
        image = model.decode(mu, sess)[0]
        np.testing.assert_allclose(page.pixels("reconstruction"), 255 * image, atol=0.51)
        np.testing.assert_allclose(page.run("return vae.z"), np.clip(mu[0], -3, 3), atol=1e-5)
        script = "const {p, ...rest} = vae.posterior(arguments[0]); return {p: [...p], ...rest}"
        found = page.run(script, x[i].tolist())
        assert (found["n"], found["reach"]) == (121, 4.5) and sum(found["p"]) == pytest.approx(1)
        np.testing.assert_allclose(found["p"], p[i].ravel(), atol=1e-3 * p[i].max(), rtol=0)
        assert found["beyond"] == pytest.approx(beyond[i], abs=0.001)
        assert np.all(np.abs(page.losses() - losses[i]) < LOSSES_WITHIN)
        degrees = ["covers", "covers most of", "misses many of", "misses"]
        degree = degrees[np.searchsorted([1, 2, 10], kl[i])]
        text = "The points that glow, the posterior, most likely made this digit. "
        text += f"The encoder's guess {degree} them."
        share = round(100 * beyond[i])
        text += f" {share} % is off the map." if share else ""
        assert page.text("#say") == text
        assert page.text("figcaption") == "test image encoder sees recon\u00adstruction"
        said.add(degree)
    assert len(said) == 4


def test_scale_compares_the_sum_with_the_test_images(page, network, encoded):
    page.do(PICK, 12)
    half, low, high = map(float, re.findall(r"\d+", page.text("#beside")))
    reference = network[3]
    reference.run(encoded[0], np.random.default_rng(0).normal(size=(10_000, 2)))
    expected = np.quantile(reference.klds + reference.rec_losses, [0.05, 0.5, 0.95])
    np.testing.assert_allclose([low, half, high], expected, rtol=0.06)
    ((left, _, right, _),) = page.boxes("#scale")
    shares = 0.25 + (np.array([half, page.losses()[2]]) - low) / (high - low) / 2
    places = page.boxes("#median, #this")[:, 0]
    np.testing.assert_allclose(places, left + shares * (right - left), atol=4)
    assert page.text("#beside").endswith("┃ this digit")
    page.do(CLEAR)
    assert "this digit" not in page.text("#beside")


# ------------------------------------------------------------------------------- z and the pen
def test_mouse_finger_and_keys_move_z(page, network, mnist, encoded):
    _, model, sess, _ = network
    for x, y in ((0.25, 0.4), (0.8, 0.6), (0.4, 0.9)):
        z = page.hover(x, y)
        np.testing.assert_allclose(z, [6 * x - 3, 3 - 6 * y], atol=0.02)
        image = model.decode([z], sess)[0]
        np.testing.assert_allclose(page.pixels("digit"), 255 * image, atol=0.51)
        label = mnist[1][1][np.sum((encoded[1] - z) ** 2, axis=1).argmin()]
        where = f"({z[0]:.2f}, {z[1]:.2f})"
        assert page.text("output#z") == f"The digit at z = {where} nearest test image: {label}"
    page.touch("Start", "plane", (0.75, 0.9))
    page.touch("Move", "plane", (0.75, 0.8))
    page.touch("End", "plane")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_UP)
    for held in (Keys.ALT, Keys.CONTROL, Keys.META):  # these are the browser's
        page.press(held, Keys.ARROW_UP)
    np.testing.assert_allclose(page.run("return vae.z"), [1.6, -1.6], atol=0.02)
    page.press(Keys.ARROW_DOWN * 20)
    assert page.run("return vae.z")[1] == -3  # the edge of the plane


def test_click_or_tap_pins_z_and_another_frees_it(page):
    page.mouse("plane", [(0.6, 0.6), (0.7, 0.6)])  # which a drag does not
    np.testing.assert_allclose(page.hover(0.2, 0.2), [-1.8, 1.8], atol=0.02)
    page.mouse("plane", [(0.3, 0.4)])
    np.testing.assert_allclose(page.hover(0.8, 0.8), [-1.2, 0.6], atol=0.02)
    page.mouse("plane", [(0.8, 0.8)])
    np.testing.assert_allclose(page.hover(0.3, 0.4), [-1.2, 0.6], atol=0.02)
    for pinned in (True, False):
        page.touch("Start", "plane", (0.8, 0.8))
        page.touch("End", "plane")
        page.wait()
        assert (", pinned" in page.text("output#z")) == pinned


@pytest.mark.parametrize("motion, least, most", [("no-preference", 6, 200), ("reduce", 0, 0)])
def test_z_glides_to_mu_but_for_who_wants_less_motion(motion, least, most, page, network, shown):
    page.cdp(MEDIA, features=[{"name": "prefers-reduced-motion", "value": motion}])
    script = """const [x, done] = arguments, path = [];
        vae.moveTo([2.5, -2.5]);
        vae.setImage(Float32Array.from(x));
        (function look() {
          path.push(vae.z);
          if (vae.state.target || vae.state.asked) requestAnimationFrame(look); else done(path);
        })()"""
    path = page.browser.execute_async_script(script, shown[0][0].tolist())
    far = np.linalg.norm(path - network[3].encode(shown[0][:1])[0], axis=1)
    assert far[-1] < 1e-3 and np.all(np.diff(far) <= 1e-9)
    assert least <= np.sum((far > 0.05) & (far < far[0] - 0.05)) <= most


def test_drawing_is_brought_into_mnists_form_and_encoded(page, network):
    page.do(PICK, 3)
    page.mouse("draw", STROKE)  # begins anew: the test image is no part of it
    assert_drawn(page, STROKE)
    x = page.drawn().reshape(1, 784)
    losses = expected_losses(network[3], x, n=161)[0]
    assert np.all(np.abs(page.losses() - losses) < LOSSES_WITHIN)
    assert page.text("figcaption") == "you drew encoder sees recon\u00adstruction"
    page.find("#clear")[0].click()
    assert not page.drawn().any() and not page.pixels("draw").any() and not page.losses()
    dot, line = np.array([(0.9, 0.1)]), np.array([(0.95, 0.5), (0.95, 0.95)])
    page.mouse("draw", dot)
    page.mouse("draw", line)
    assert_drawn(page, dot, line)


def test_small_drawing_is_as_wide_as_a_large_one(page):
    """A digit over all of the pad, a half, three tenths and a seventh: the same to the network."""
    white, losses = [], []
    place = (STROKE - STROKE.min(axis=0)) / np.ptp(STROKE, axis=0).max()
    for size in (1, 0.5, 0.3, 0.15):
        page.do(CLEAR)
        page.mouse("draw", 0.05 + place * 0.9 * size)
        white.append(np.sum(page.drawn() > 0.5))
        losses.append(page.losses()[2])
        assert np.array_equal(page.pixels("seen"), np.round(255 * page.drawn()))
    assert max(white) < 1.25 * min(white) and np.ptp(losses) < 15
    assert 52 < min(white) and max(white) < 165  # as in nine tenths of MNIST's images


def test_image_follows_the_pen_ten_times_a_second(page):
    """A line is on the pad at once; what is computed of it comes later, and not once a move."""
    page.run("""globalThis.images = new Set();
        (function look() {
          if (!images) return; // the test has ended, and the page is used by others
          images.add(vae.state.image);
          requestAnimationFrame(look);
        })()""")
    places = page.places("draw", STROKE)
    start = time.monotonic()
    for i in range(100):
        x, y = places[i % len(places)]
        kind = "mouseMoved" if i else "mousePressed"
        page.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1)
    seconds = time.monotonic() - start
    found = page.run(
        "return [images.size, draw.getContext('2d').getImageData(42, 35, 1, 1).data[3]]"
    )
    page.run("globalThis.images = null")
    page.cdp("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left")
    assert found[1] == 255 and 2 <= found[0] <= 3 + 10 * seconds
    page.wait()
    assert np.array_equal(page.pixels("seen"), np.round(255 * page.drawn()))


def test_quick_circle_stays_round_on_a_slow_machine(page):
    """Fifty points in 0.4 s at a sixth of the speed; and nothing is read back from a canvas."""
    page.run("CanvasRenderingContext2D.prototype.getImageData = () => { globalThis.isRead = true }")
    angles = np.linspace(0, 1.7 * np.pi, 50)  # not closed, so that its middle is not on an edge
    circle = np.stack([0.5 + 0.35 * np.cos(angles), 0.5 + 0.35 * np.sin(angles)], axis=1)
    places = page.places("draw", circle)
    address = page.browser.capabilities["goog:chromeOptions"]["debuggerAddress"]
    with urllib.request.urlopen(f"http://{address}/json") as tabs:
        url = next(tab["webSocketDebuggerUrl"] for tab in json.load(tabs) if tab["type"] == "page")
    page.slow_down(6)
    # As from a hand: no event waits until the page has dealt with the one before.
    socket = websocket.create_connection(url, suppress_origin=True)
    start = time.monotonic()
    for i, (x, y) in enumerate([*places, places[-1]]):
        kind = {0: "mousePressed", 50: "mouseReleased"}.get(i, "mouseMoved")
        event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        socket.send(json.dumps({"id": i, "method": "Input.dispatchMouseEvent", "params": event}))
        time.sleep(max(0, start + 0.4 * i / 50 - time.monotonic()))
    while json.loads(socket.recv()).get("id") != 50:
        pass
    socket.close()
    page.slow_down(1)
    page.wait()
    assert_drawn(page, circle)
    assert not page.run("return globalThis.isRead")


def test_only_the_main_pointers_left_button_draws(page):
    page.do(PICK, 3)
    picked = page.pixels("draw")
    line = np.array([(0.2, 0.2), (0.5, 0.2), (0.5, 0.4)])
    page.mouse("draw", line, "right", 2)
    page.mouse("draw", line, "middle", 4)
    assert np.array_equal(page.pixels("draw"), picked)  # the test image is still there
    page.run(CLEAR)
    page.touch("Start", "draw", line[0])
    page.touch("Start", "draw", line[0], (0.9, 0.9))  # a palm
    page.touch("Move", "draw", line[1], (0.1, 0.9))
    page.touch("Move", "draw", line[2], (0.1, 0.9))
    page.touch("End", "draw", (0.1, 0.9))
    page.touch("Move", "draw", (0.9, 0.9))  # the first finger is gone
    page.touch("End", "draw")
    page.mouse("draw", [(-0.04, 0.5), (0.5, 0.9)])  # a stroke that begins elsewhere
    assert_drawn(page, line)


# ------------------------------------------------------------------------------ what is seen
def test_marks_are_where_they_belong_and_explained_while_there(page, network, encoded):
    guess, glow = "⊕ the encoder's guess", "● the posterior"
    assert page.text("#marks") == "○ z ╌╌ the prior, 1 and 2 sigma"
    assert page.text("#say").startswith("The decoder draws a digit for each point of the map")
    page.do("vae.moveTo([-2.9, -2.9])")  # out of the way
    empty = page.screen()
    x, mu, log_sig_sq = encoded
    spread = 2 * np.exp(log_sig_sq / 2)
    i = np.where(np.all(np.abs(mu) + spread < 2.9, axis=1), spread.min(axis=1), 0).argmax()
    page.do(TAKE, x[i].tolist())
    page.do("vae.moveTo([-2.9, -2.9])")
    assert page.text("#marks") == f"○ z ╌╌ the prior, 1 and 2 sigma {guess} {glow}"
    around = np.linspace(0, 2 * np.pi, 180)
    line = mu[i] + spread[i] * np.stack([np.cos(around), np.sin(around)], axis=1)
    columns, rows = np.floor(140 * (line * [1, -1] + 3)).astype(int).T
    screen = page.screen()
    assert np.mean(screen[rows, columns].min(axis=1) > 120) > 0.9  # the ellipse
    p = np.exp(log_joint(network[3], x[i : i + 1], codes_of(GRID[20:101], GRID[20:101])))
    row, column = np.unravel_index(p.argmax(), (81, 81))
    near = screen[int(10.5 * row) - 8 : int(10.5 * row) + 9, int(10.5 * column) - 8 :][:, :17]
    assert np.max(near[..., 0] - near[..., 2]) > 60  # the glow

    outside = np.where(np.abs(mu[:, 1]) < 2, mu[:, 0], 0).argmax()
    page.do(TAKE, x[outside].tolist())
    page.do("vae.moveTo([-2.9, -2.9])")
    assert (
        page.text("#marks") == f"○ z ╌╌ the prior, 1 and 2 sigma {guess} → it is off the map {glow}"
    )
    row = round(140 * (3 - mu[outside, 1]))
    arrow = page.screen()[row - 2 : row + 3, 805:832].min(axis=2)
    assert np.mean(arrow.max(axis=0) > 170) > 0.9
    page.do(CLEAR)
    assert np.array_equal(page.screen(), empty)


def test_both_backgrounds_show_what_they_say(page, network, mnist, encoded):
    _, model, sess, _ = network
    for row, column in ((1, 2), (27, 15), (13, 28)):
        image = model.decode([[-2.9 + 0.2 * column, 2.9 - 0.2 * row]], sess)[0]
        tile = page.pixels("plane")[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        np.testing.assert_allclose(tile, 255 * image, atol=0.51)
    assert not page.find("#legend")[0].is_displayed()
    page.find("[value=codes]")[0].click()
    assert page.text("#legend") == " ".join(f"■ {n}" for n in range(10))
    screen = page.screen()
    places = 140 * (encoded[1] * [1, -1] + 3)
    inside = np.all((places > 2) & (places < 838), axis=1)
    columns, rows = places[inside].astype(int).T
    colours = 255 * np.array([to_rgb(vae_mnist.COLOURS[n]) for n in mnist[1][1][inside]])
    same = np.abs(screen[rows, columns] - colours).max(axis=1) < 40
    assert np.mean(same) > 0.6  # others lie beneath a line or beneath each other


# ------------------------------------------------------------------ for every hand and eye
WINDOWS = [(320, 568, 200), (390, 664, 300), (683, 650, 390), (844, 340, 320), (1400, 900, 700)]


@pytest.mark.parametrize("width, height, least", WINDOWS)
def test_all_is_in_one_view_and_picking_moves_nothing(width, height, least, page):
    page.resize(width, height)
    page.do(PICK, 0)
    page.do("scrollTo(0, 0)")
    assert page.run("return document.documentElement.scrollWidth") <= width
    plane, digit, pad = boxes = page.boxes("#plane, #digit, #draw")
    assert np.all(boxes >= 0) and np.all(boxes <= [width, height, width, height])
    assert plane[2] - plane[0] >= least and pad[2] - pad[0] >= 100
    assert (pad[0] > plane[2]) == (width >= 560)  # two columns
    assert (digit[0] > plane[2]) == (width == 1400)  # else in a corner of the plane
    parts = "#draw, #shown canvas, #losses, #scale, [name=behind]"
    places = page.boxes(parts)
    for choose in ("shown.children[7].click()", "shown.children[15].click()", CLEAR):
        page.do(choose)
        page.do("scrollTo(0, 0)")
        np.testing.assert_allclose(page.boxes(parts), places)
    page.run("scrollTo(0, 1e6)")
    for z in ([2.5, 2.5], [-2.5, 2.5], [0.1, 0]):
        page.do("vae.moveTo(arguments[0])", z)
        ring, here = page.boxes("#ring, #here")
        assert here[1] >= 0  # the plane sticks, and the digit keeps out of the way of z
        assert np.any(ring[:2] > here[2:]) or np.any(ring[2:] < here[:2])


def test_focus_is_seen_and_the_images_are_one_stop(page):
    page.do(PICK, 3)
    page.run("plane.focus()")
    picked = page.run("return getComputedStyle(shown.children[3].lastChild).outlineColor")
    stops = []
    for _ in range(4):
        page.press(Keys.TAB)
        name, colour, *outline = page.run("""const each = document.activeElement;
            const style = getComputedStyle(each.name === "shown" ? each.nextSibling : each);
            return [each.id || each.ariaLabel || each.value || each.tagName, style.outlineColor,
                style.outlineStyle, style.outlineWidth, style.outlineOffset]""")
        assert outline == ["solid", "3px", "2px"] and colour != picked
        stops.append(name)
    assert stops == ["clear", "A test image of 1", "manifold", "SUMMARY"]
    page.run("shown.children[13].firstChild.focus()")
    page.press(Keys.ARROW_LEFT)
    assert page.find("#shown input")[12].is_selected()


def test_page_follows_light_and_dark_and_keeps_its_swatches_in_forced_colours(page):
    page.find("[value=codes]")[0].click()
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    for scheme, ink, paper in (("dark", 255, 18), ("light", 0, 255)):  # while it is open
        page.cdp(MEDIA, features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours = [int(re.search(r"\d+", colour)[0]) for colour in page.run(script)]
        np.testing.assert_allclose(colours, [ink, paper], atol=20)
    page.cdp(MEDIA, features=[{"name": "forced-colors", "value": "active"}])
    swatches = [b.value_of_css_property("color") for b in page.find("#legend b")]
    swatches = [np.array(re.findall(r"\d+", c)[:3], int) / 255 for c in swatches]
    assert [to_hex(c) for c in swatches] == vae_mnist.COLOURS


def test_numbers_pen_and_keys_in_webkit(network, shown, tmp_path):
    x, losses, p, _ = shown
    with webkit(tmp_path) as browser:
        if not browser:
            pytest.skip("needs WebKitWebDriver, WebKitGTK's MiniBrowser and a display or Xvfb")
        page = Page(browser, network[0])
        page.open(until="vae.state.isReady")
        found = page.run("return [...vae.posterior(arguments[0]).p]", x[3].tolist())
        np.testing.assert_allclose(found, p[3].ravel(), atol=1e-3 * p[3].max(), rtol=0)
        page.do(TAKE, x[3].tolist())
        assert np.all(np.abs(page.losses() - losses[3]) < LOSSES_WITHIN)
        script = """const x = vae.decode([0, 0]), start = performance.now();
            for (let i = 0; i < 5; i++) vae.posterior(x);
            return (performance.now() - start) / 5"""
        assert min(page.run(script) for _ in range(5)) < 40  # ms
        page.do(RESET)
        pad = page.find("#draw")[0]
        offsets = np.rint((STROKE - 0.5) * pad.size["width"]).astype(int).tolist()
        actions = ActionChains(browser, duration=0)
        actions.move_to_element_with_offset(pad, *offsets[0]).click_and_hold()
        for offset in offsets[1:]:
            actions.move_to_element_with_offset(pad, *offset)
        actions.release().perform()
        page.wait()
        assert np.abs(page.drawn() - mnist_form([STROKE])).mean() < 0.02
        page.run("vae.moveTo([1, 1])")
        page.find("#plane")[0].send_keys(Keys.ARROW_LEFT)
        np.testing.assert_allclose(page.run("return vae.z"), [0.9, 1])


# -------------------------------------------------------------- as it was made, or not at all
def test_page_of_the_other_decoder_has_its_network(blank, trained_runs, encoded):
    z = np.random.default_rng(0).normal(size=(50, 2))
    x = encoded[0][:50]
    blank.open(trained_runs["tutorial"] / "explore.html", until="globalThis.vae")
    found = blank.run("return arguments[0].map(z => [...vae.decode(z)])", z.tolist())
    codes = blank.run("return arguments[0].map(x => vae.encode(x))", x.tolist())
    with vae_mnist.trained(trained_runs["tutorial"]) as (model, sess):
        np.testing.assert_allclose(found, model.decode(z, sess).reshape(50, -1), atol=1e-5)
        for name, values in zip(("mu", "log_sig_sq"), model.encode(x, sess)):
            np.testing.assert_allclose([code[name] for code in codes], values, atol=1e-5)


def test_narrow_posteriors_are_measured_on_finer_codes(blank, network, shown, tmp_path):
    """With a first kernel of the decoder four times as large, posteriors are a quarter as wide."""
    path, model, sess, _ = network
    parameters = sess.run(model.weights)
    parameters[8] = 4 * parameters[8]
    reference = Reference(parameters, "mirrored")
    offset = log_joint(reference, np.zeros((1, 784)), codes_of(GRID, GRID))  # but for a constant
    html = path.read_text()
    text = re.search('type="application/json">(.*?)</script>', html, re.DOTALL)[1]
    numbers = json.loads(text)
    packed = [base64.b64encode(np.float32(v)).decode() for v in (parameters[8], offset)]
    numbers["decoder"][0]["kernel"], numbers["offset"] = packed
    (tmp_path / "narrow.html").write_text(html.replace(text, json.dumps(numbers)))
    blank.open(tmp_path / "narrow.html")
    x = shown[0][[9, 17]]
    coarse, fine = [-np.diff(expected_losses(reference, x, n)[:, 2:])[:, 0] for n in (121, 481)]
    assert np.max(np.abs(coarse - fine)) > 0.3  # the page's own grid would not do
    for image, nll in zip(x, fine):
        blank.do(TAKE, image.tolist())
        _, _, total, kl = blank.losses()
        assert kl >= 0 and total - kl == pytest.approx(nll, abs=0.1)


def test_page_of_images_with_many_labels(blank, network, mnist, tmp_path):
    _, model, sess, _ = network
    images, labels = mnist[1]
    labels = labels + 10 * (np.arange(len(labels)) % 3)
    settings = {"decoder": "mirrored", "seed": 3, "data": "other.npz", "iterations": 1000}
    run = vae_mnist.Run(tmp_path, settings, made=1000)
    blank.open(vae_mnist.explore(model, sess, (images, labels), run))
    assert blank.browser.title == "vae_mnist: mirrored decoder, 1,000 iterations, seed 3"
    blank.find("[value=codes]")[0].click()
    assert blank.text("#legend") == " ".join(f"■ {n}" for n in range(30))
    text = blank.text("main")
    assert "draws an image for each point" in text and "most likely made this image" in text
    assert "digit" not in text


def test_page_has_the_size_of_the_images(blank, tmp_path, monkeypatch):
    """A module with another SIDE makes a page with numbers, as the session has them."""
    monkeypatch.setattr(vae_mnist, "SIDE", 16)
    monkeypatch.setattr(vae_mnist, "PIXELS", 256)
    monkeypatch.setitem(vae_mnist.DECODERS, "mirrored", ([64, 128, 256], [256]))
    images = np.random.default_rng(0).integers(256, size=(30, 16, 16)).astype(np.uint8)
    with built(decoder="mirrored") as (model, sess):
        settings = {"decoder": "mirrored", "seed": 0, "data": None, "iterations": 1}
        run = vae_mnist.Run(tmp_path, settings, made=1)
        blank.open(vae_mnist.explore(model, sess, (images, np.arange(30) % 10), run))
        (picked,) = np.flatnonzero([each.is_selected() for each in blank.find("#shown input")])
        chosen = images[picked // 2 + 10 * (picked % 2)]
        expected = vae_mnist.evaluate(model, sess, chosen, samples=400)
    for found, name in zip(blank.losses(), ("RecLoss", "KLD", "-ELBO")):
        assert found == pytest.approx(expected[name][0], abs=0.5)
    blank.mouse("draw", STROKE)
    drawn = blank.drawn(side=16)
    rows = np.flatnonzero(drawn.any(axis=1))
    assert len(rows) == 11 and np.array_equal(blank.pixels("seen"), np.round(255 * drawn))


def test_page_works_in_the_frame_that_a_notebook_shows(blank, tmp_path):
    """By the call that README has; the page's two columns fit into it."""
    call = re.search(r"`IPython.display.(IFrame\(.*?\))`", (ROOT / "README.md").read_text())[1]
    name, width, height = re.findall(r'"([^"]+)"|(\d+)', call)
    frame = IFrame(name[0].replace("outputs", blank.path.parent.name), width[1], height[1])
    notebook = blank.path.parents[1] / "notebook.html"
    notebook.write_text(frame._repr_html_())
    blank.open(notebook, until="frames.length")
    blank.browser.switch_to.frame(0)
    blank.wait(f"globalThis.vae && {SETTLED}")
    assert len(blank.losses()) == 4
    right, bottom = blank.boxes("#plane, #losses, [name=behind]")[:, 2:].max(axis=0)
    assert right <= 1100 and bottom <= 800


def test_page_is_shown_twice_in_one_document(blank):
    """As a notebook does: both copies answer, each with its own digit."""
    blank.open()
    blank.run(PICK, 3)
    blank.wait()
    html = re.search("<main>.*</main>", blank.path.read_text(), re.DOTALL)[0]
    code = re.search("<script>(.*?)</script>", blank.path.read_text(), re.DOTALL)[1]
    blank.run(
        """globalThis.first = vae;
        document.body.insertAdjacentHTML("beforeend", arguments[0]);
        const script = document.createElement("script");
        script.textContent = arguments[1];
        document.body.append(script)""",
        html,
        code,
    )
    blank.wait(f"vae !== first && {SETTLED}")
    image = "return document.querySelectorAll('#reconstruction')[arguments[0]].toDataURL()"
    before = [blank.run(image, i) for i in (0, 1)]
    assert before[0] != before[1]
    for i in (0, 1):
        blank.run("document.querySelectorAll('#shown')[arguments[0]].children[17].click()", i)
    blank.wait()
    after = [blank.run(image, i) for i in (0, 1)]
    assert after[0] == after[1] and after[0] not in before
    halos = blank.run(
        "return [...document.querySelectorAll('#halo')].map(e => e.getAttribute('href'))"
    )
    assert len(set(halos)) == 2
    assert [e for e in blank.browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_without_scripts_or_cut_short_it_says_what_to_do(blank, tmp_path):
    content = blank.path.read_text()
    for share, off in ((1, True), (0.5, False), (0.998, False)):
        path = tmp_path / f"{share}.html"
        path.write_text(content[: int(share * len(content))])
        blank.cdp("Emulation.setScriptExecutionDisabled", value=off)
        blank.browser.get(path.as_uri())
        blank.cdp("Emulation.setScriptExecutionDisabled", value=False)
        assert blank.text("body").endswith("save it as a file, and open that in a browser.")
    blank.browser.get(FRAME.as_uri())
    message = "This is only the frame: python vae_mnist.py makes explore.html of it."
    assert blank.text("body") == message


def test_page_asks_nobody_for_anything_and_is_printed_on_one_sheet(blank):
    assert blank.path.stat().st_size <= 3_000_000
    for log in ("browser", "performance"):
        blank.browser.get_log(log)
    blank.open()
    events = [json.loads(e["message"])["message"] for e in blank.browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {r["request"]["url"] for r in requests if r["documentURL"].startswith("file:")}
    assert urls == {blank.path.as_uri()} and blank.browser.get_log("browser") == []
    # Nor could it: its own policy forbids every connection.
    forbidden = blank.browser.execute_async_script("""const [done] = arguments;
        document.addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
        fetch("https://example.org").catch(() => setTimeout(done, 1000, "not forbidden"))""")
    assert forbidden == "connect-src"
    for landscape in (False, True):
        how = {"paperWidth": 8.27, "paperHeight": 11.69, "landscape": landscape}
        pdf = base64.b64decode(blank.cdp("Page.printToPDF", **how)["data"])
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1


def test_without_the_frame_there_is_a_picture_and_no_page(tmp_path, monkeypatch, capsys):
    data = vae_mnist.DATA / "mnist.npz"
    monkeypatch.setattr(vae_mnist, "DATA", tmp_path)
    options = ["--iterations", "3", "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert vae_mnist.main(options) == 0
    assert not (tmp_path / "run" / "explore.html").exists()
    assert capsys.readouterr().out.endswith(f"codes is in {tmp_path / 'run' / 'latent.png'}\n")
