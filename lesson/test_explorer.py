"""Tests of the explorer: the page computes what PyTorch computes, and it works in a browser.

python -m pytest lesson/test_explorer.py          # half a minute; needs selenium, chromium and chromedriver
python -m pytest lesson/test_explorer.py -s -k opens     # prints the seconds of 20 guided steps, too
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import explorer

from diffratio_mod import Config, DiT, RoutedLayer, encode, sample_images
from sample import read_checkpoint, run_command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PROMPTS = ["a purple circle", "a red circle above a blue square", "a cyan cross right of a green triangle"]
STEPS = 10
GUIDANCE = 3.0


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight as the page has it."""
    return weight.bfloat16().float()


def with_weights_of_page(model: DiT) -> DiT:
    """All weights rounded; the table stays as it is."""
    weights = model.state_dict()
    for name in weights:
        if name != "ratios":
            weights[name] = rounded(weights[name])
    model.load_state_dict(weights)
    return model


def model_in(page: str) -> dict:
    return json.loads(explorer.MODEL.search(page)[0])


@pytest.fixture(scope="module")
def shipped() -> DiT:
    model, _ = read_checkpoint(explorer.SHIPPED)
    return with_weights_of_page(model)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of a small random model with other sizes and words, and one column in its table."""
    words = ("a", "photo", "of", "airplane", "dog")
    config = Config(words, 15, 3, dim=16, depth=3, heads=2, caption_length=5, mode="layer")
    model = DiT(config)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    model.ratios.data = torch.tensor([[0.0], [0.5], [0.7]])
    path = tmp_path_factory.mktemp("explorer") / "small.pt"
    torch.save({"config": asdict(config), "prompts": ["a photo of a dog"], "ema": model.state_dict()}, path)
    return path


def run_explorer(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["explorer.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_command(explorer.main)
    return stopped.value.code or 0


# --- The file --------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_shipped_model_and_loads_nothing():
    page = explorer.PAGE.read_text(encoding="utf-8")
    content = model_in(page)
    model, checkpoint = read_checkpoint(explorer.SHIPPED)

    assert len(page.encode()) <= 4_000_000
    assert content["config"] == json.loads(json.dumps(checkpoint["config"]))
    assert torch.equal(torch.tensor(content["ratios"]), model.ratios.detach())
    planes = zlib.decompress(base64.b64decode(content["weights"]))
    upper, lower = np.frombuffer(planes, np.uint8).reshape(2, -1).astype(np.uint32)
    stored = (upper << 24 | lower << 16).view(np.float32)
    weights = [rounded(w).flatten() for name, w in model.state_dict().items() if name != "ratios"]
    assert np.array_equal(stored, torch.cat(weights).numpy()), "run lesson/explorer.py again"

    frame = explorer.MODEL.sub("", page)
    outside = re.findall(r'(?:https?:)?//\w+\.[^"\s]*', frame)
    assert outside == ["https://arxiv.org/abs/2412.16822"], "one link, which is followed only by a click"
    assert "default-src 'none'" in frame
    assert (HERE / content["readme"]).samefile(ROOT / "README.md")


def test_a_dense_checkpoint_is_refused_in_one_line_and_leaves_the_old_page(small, monkeypatch, capsys):
    checkpoint = torch.load(small)
    checkpoint["config"]["mode"] = "dense"
    dense = small.with_name("dense.pt")
    torch.save(checkpoint, dense)
    page = small.with_name("old.html")
    page.write_text("old")

    assert run_explorer(monkeypatch, dense, "--out", page) == 2

    error = capsys.readouterr().err
    assert "dense.pt is a dense model" in error
    assert error.count("\n") == 1
    assert page.read_text() == "old"


# --- A browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not BROWSER or not DRIVER:
        pytest.skip("no chromium or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def look(driver, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def open_page(driver, width: int = 1280, fragment: str = "", page: Path = explorer.PAGE) -> None:
    look(driver, width)
    driver.get("about:blank")  # else another fragment alone would not load the page anew
    driver.get(page.as_uri() + fragment)
    wait(driver, "return shown.every(run => run.steps.length > 0)")


def wait(driver, condition: str) -> None:
    end = time.monotonic() + 120
    while not driver.execute_script(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def finished_pictures(driver) -> np.ndarray:
    """What A and B have drawn: uint8 (2, 3, S, S)."""
    wait(driver, "return runs.every((run, p) => run.setting === JSON.stringify(settingOf(p)))")
    wait(driver, "return runs.every(run => run.steps.length === state.steps)")
    pixels = driver.execute_script("return runs.map(run => Array.from(run.steps.at(-1).x0))")
    size = driver.execute_script("return config.image_size")
    return to_uint8(np.array(pixels)).reshape(2, 3, size, size)


def to_uint8(pixels) -> np.ndarray:
    return np.clip(np.round((np.asarray(pixels) + 1) * 127.5), 0, 255).astype(int)


def noise_of(seed: int, size: int) -> torch.Tensor:
    """As sample.py draws the noise of its first image."""
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed * 1_000_003))


# --- Equal to PyTorch ------------------------------------------------------------------------------------------------

SAMPLE_IN_PAGE = """
const [prompt, noise, steps, guidance, ratios, randomSeed, done] = arguments;
(async () => {
  window.weights ??= await readWeights();
  const model = new DiT(config, weights, randomSeed === null ? RoutedLayer : RandomLayer);
  const generator = new Generator(randomSeed ?? 0);
  for (const layer of model.layers) layer.generator = generator;
  const run = [...sampleImages(model, encode(config, prompt), Float32Array.from(noise), steps, guidance, ratios)];
  const layers = run.flatMap(step => step.routing);
  done({
    k: layers.map(layer => layer.k),
    chosen: layers.map(layer => layer.order.slice(0, layer.k)),
    pixels: Array.from(run.at(-1).x0),
  });
})().catch(error => done(String(error)));
"""


class LotLayer(RoutedLayer):
    """RandomLayer with given lots, one for each call and image."""

    def score_and_sort(self, x):
        return torch.full_like(x[:, :, 0], 0.5), self.lots.pop(0)


def draw_lots(seeds: list[int], depth: int, tokens: int) -> torch.Tensor:
    """The lots (steps, depth, 2 * images, N) in the order in which the page draws: a run, a step, a half, a layer."""
    lots = torch.empty(STEPS, depth, 2, len(seeds), tokens, dtype=torch.long)
    for image, seed in enumerate(seeds):
        rng = torch.Generator().manual_seed(seed)
        for step in range(STEPS):
            for half in range(2):
                for layer in range(depth):
                    lots[step, layer, half, image] = torch.rand(tokens, generator=rng).argsort(stable=True)
    return lots.flatten(2, 3)


@pytest.mark.parametrize("name", ["learned", "uniform", "reversed", "dense", "any", "random tokens"])
def test_the_page_computes_what_pytorch_computes(chromium, shipped, monkeypatch, name):
    learned = shipped.ratios.detach()
    rng = torch.Generator().manual_seed(1)
    tables = {"uniform": torch.full_like(learned, float(learned.mean())), "reversed": learned.flip(1)}
    tables.update({"dense": 0 * learned, "any": torch.rand(learned.shape, generator=rng)})
    ratios = tables.get(name, learned)
    noise = torch.stack([noise_of(seed, shipped.config.image_size) for seed in range(len(PROMPTS))])
    lots = draw_lots(range(len(PROMPTS)), shipped.config.depth, shipped.config.tokens)
    calls = []  # of each layer at each step: scores and order of the conditional half, and k
    hooks = []
    for i, layer in enumerate(shipped.layers):

        def note(layer, inputs, options, _, i=i):
            if name == "random tokens":
                score, order = None, lots[len(calls) // shipped.config.depth, i]
            else:
                score, order = layer.score_and_sort(inputs[0])
            calls.append((score, order, options["k"]))

        hooks.append(layer.register_forward_hook(note, with_kwargs=True))
        if name == "random tokens":
            monkeypatch.setattr(layer, "__class__", LotLayer)
            layer.lots = list(lots[:, i])
    images = sample_images(shipped, encode(shipped.config, PROMPTS), noise, STEPS, GUIDANCE, ratios=ratios)
    for hook in hooks:
        hook.remove()

    open_page(chromium, fragment="#steps=5")
    for image, prompt in enumerate(PROMPTS):
        random_seed = image if name == "random tokens" else None
        arguments = (prompt, noise[image].flatten().tolist(), STEPS, GUIDANCE, ratios.tolist(), random_seed)
        found = chromium.execute_async_script(SAMPLE_IN_PAGE, *arguments)

        assert found["k"] == [k for _, _, k in calls]
        for chosen, (score, order, k) in zip(found["chosen"], calls, strict=True):
            at_a_tie = False
            if score is not None and k < shipped.config.tokens:
                at_a_tie = score[image, order[image, k - 1]] - score[image, order[image, k]] < 1e-5
            assert at_a_tie or set(chosen) == set(order[image, :k].tolist())
        difference = np.abs(to_uint8(found["pixels"]) - to_uint8(images[image].flatten()))
        assert difference.max() <= 1


def test_it_opens_on_the_picture_that_sample_py_draws_with_flops_and_seconds(chromium, shipped):
    open_page(chromium)
    assert chromium.execute_script("return state.tables") == ["learned", "dense"]
    wait(chromium, "return runs[0].steps.length > state.step")
    assert chromium.execute_script("return seen(0).routing.every(layer => layer.k < N)"), "here tokens bypass"
    prompt = chromium.execute_script("return state.prompt")

    pictures = finished_pictures(chromium)
    learned = shipped.ratios.detach()
    torch.backends.mha.set_fastpath_enabled(False)  # of the caption's encoder, whose operations are not counted
    for picture, ratios in zip(pictures, (learned, 0 * learned)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            image = sample_images(shipped, encode(shipped.config, [prompt]), noise_of(0, 24)[None], 20, ratios=ratios)
        assert np.abs(picture - to_uint8(image[0])).max() <= 1
        counted = chromium.execute_script("return flopsOfRun(arguments[0])", ratios.tolist())
        assert counted == counter.get_total_flops()
    torch.backends.mha.set_fastpath_enabled(True)

    wait(chromium, "return Boolean(seconds?.of)")
    a, b = chromium.execute_script("return seconds.of")
    verdict = chromium.find_element("id", "verdict").text
    print(f"\n20 guided steps in the browser: learned {a:.2f} s, dense {b:.2f} s. {verdict}")
    assert "less time" in verdict or "more time" in verdict
    loaded = "return performance.getEntriesByType('resource').filter(entry => !/^(data|blob):/.test(entry.name))"
    assert chromium.execute_script(loaded) == []
    assert chromium.get_log("browser") == []


def test_a_page_of_another_model_draws_what_pytorch_draws(chromium, small, monkeypatch):
    page = small.with_name("page.html")
    assert run_explorer(monkeypatch, small, "--out", page) == 0
    frame = explorer.MODEL.sub("", page.read_text(encoding="utf-8"))
    assert frame == explorer.MODEL.sub("", explorer.PAGE.read_text(encoding="utf-8"))

    open_page(chromium, fragment="#steps=7&guidance=1&seed=3&prompt=a+photo+of+an+airplane", page=page)
    pictures = finished_pictures(chromium)

    model, _ = read_checkpoint(small)
    with_weights_of_page(model)
    words = encode(model.config, ["a photo of an airplane"])
    image = sample_images(model, words, noise_of(3, 15)[None], 7, 1.0)
    assert np.abs(pictures[0] - to_uint8(image[0])).max() <= 1
    box = chromium.find_element("id", "words")
    box.clear()
    box.send_keys("a photo of a horse\n")
    wait(chromium, "return document.getElementById('problem').textContent.includes('unknown word')")
    assert chromium.get_log("browser") == []


# --- A walk through the page -----------------------------------------------------------------------------------------


def field(driver, layer: int, column: int):
    return driver.find_element("css selector", f"#table .pane input[data-layer='{layer}'][data-column='{column}']")


def drag(driver, element, pixels: int) -> None:
    actions = pytest.importorskip("selenium.webdriver").ActionChains(driver, duration=50)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    actions.click_and_hold(element).move_by_offset(pixels, 0).release().perform()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_table_is_edited_taken_back_and_taken_along(chromium, width):
    open_page(chromium, width, "#steps=5")
    learned = finished_pictures(chromium)[0]

    cell = field(chromium, 1, 9)
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    cell.click()
    cell.send_keys("0.9\ue007")  # Enter
    cell.send_keys("\ue015")  # arrow down
    assert chromium.execute_script("return [state.tables[0], state.mine[1][9]]") == ["my own", pytest.approx(0.85)]
    mine = finished_pictures(chromium)[0]
    assert (mine != learned).any()
    assert chromium.execute_script("return seen(0).routing[1].k") == round(64 * 0.15)
    address = chromium.execute_script("return location.href.split('#')[0] + fragment()")
    table = chromium.execute_script("return toJson(state.mine)")

    cell.send_keys("\ue009z\ue000")  # Control Z
    cell.send_keys("\ue009z\ue000")
    assert chromium.execute_script("return state.tables[0]") == "learned"
    assert (finished_pictures(chromium)[0] == learned).all()

    chromium.execute_script("readTable(arguments[0])", table)
    assert (finished_pictures(chromium)[0] == mine).all()
    chromium.execute_script("readTable('[[2]]')")
    assert "6 rows" in chromium.find_element("id", "told").text
    open_page(chromium, width, "#" + address.split("#")[1])
    assert (finished_pictures(chromium)[0] == mine).all()
    assert json.loads(table)["ratios"][1][9] == pytest.approx(0.85)

    drag(chromium, field(chromium, 0, 0), 50)
    assert chromium.execute_script("return state.mine[0][0]") == pytest.approx(0.5, abs=0.02)
    row_mean = chromium.execute_script("return view[1].fields[C]")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", row_mean)
    row_mean.click()
    row_mean.send_keys("0.4\ue007")
    assert chromium.execute_script("return state.mine[0]") == [0.4] * 10
    chromium.execute_script("edit(0, scaled(data.ratios, 0.5))")
    assert chromium.execute_script("return meanOf(state.mine)") == pytest.approx(0.5, abs=1e-3)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert chromium.get_log("browser") == []


def test_an_edit_stops_the_old_run(chromium):
    open_page(chromium, fragment="#steps=30&guidance=1")
    chromium.execute_script("window.old = runs[0]; edit(0, ratiosOf('uniform'))")
    finished_pictures(chromium)
    assert chromium.execute_script("return old !== runs[0] && old.steps.length < 30")
    assert chromium.execute_script("return runs[0].steps.every(step => step.routing[0].k === 45)")


def test_a_task_opens_its_answer_after_a_prediction(chromium):
    open_page(chromium)
    tasks = chromium.find_elements("css selector", ".task")
    assert 3 <= len(tasks) <= 5
    for task in tasks:
        show, answer = task.find_elements("tag name", "button")
        assert not answer.is_enabled()
        chromium.execute_script("arguments[0].click()", show)
        choice = task.find_element("css selector", "input")
        chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", choice)
        if choice.get_attribute("type") == "radio":
            choice.click()
        else:
            choice.send_keys("2")
        chromium.execute_script("arguments[0].click()", answer)
        assert "You said" in task.text
    assert chromium.get_log("browser") == []


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_fault(chromium, dark):
    axe_selenium_python = pytest.importorskip("axe_selenium_python")
    for width in (390, 1280):
        open_page(chromium, width, "#steps=5")
        look(chromium, width, dark)
        finished_pictures(chromium)
        axe = axe_selenium_python.Axe(chromium)
        axe.inject()
        faults = axe.run()["violations"]
        assert not faults, [(fault["id"], [node["target"] for node in fault["nodes"]][:5]) for fault in faults]
