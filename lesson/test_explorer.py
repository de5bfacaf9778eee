"""Tests of the explorer: what the page holds is what sampling did, and the page works in a browser.

python -m pytest lesson/test_explorer.py     # half a minute; the browser's part needs selenium, chromium, chromedriver
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import explorer

import sample as tools

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image

import diffratio_mod as method

STEPS, GUIDANCE, SEED = 5, 2.0, 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def records_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpack(model: dict, table: dict) -> tuple[np.ndarray, np.ndarray]:
    """Processed (B, T, L, N) and scores in hundredths (B, L, N, T), bit by bit as the page does."""
    B, T, L, N = len(model["prompts"]), len(model["levels"]), model["depth"], tokens_of(model)
    bits, scores = (zlib.decompress(base64.b64decode(table[name])) for name in ("bits", "scores"))
    processed = [bits[i // 8] >> (7 - i % 8) & 1 for i in range(B * T * L * N)]
    values = [0] * len(scores)
    for i, byte in enumerate(scores):
        values[i] = byte if i % T == 0 else (values[i - 1] + byte) % 256
    return np.reshape(processed, (B, T, L, N)), np.reshape(values, (B, L, N, T))


def tokens_of(model: dict) -> int:
    return (model["image_size"] // model["patch_size"]) ** 2


def tile(model: dict, sheet: str, step: int, prompt: int) -> np.ndarray:
    S = model["image_size"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))), dtype=float)
    return image[prompt * S : (prompt + 1) * S, step * S : (step + 1) * S]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model with waking routers, its page, and the records in it."""
    folder = tmp_path_factory.mktemp("explorer")
    words = ("a", "photo", "of", "cat", "dog")
    config = method.Config(words, 16, 4, dim=16, depth=3, heads=2, regions=4)
    model, rng = method.DiT(config).eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = (1.0 if "router" in name else 0.3) * torch.randn(parameter.shape, generator=rng)
    model.ratios.data = torch.rand(3, 4, generator=rng) * 0.9
    prompts = ["a photo of a cat", "a photo of a dog", "a photo of a cat"]
    checkpoint = {"config": asdict(config), "prompts": prompts, "ema": model.state_dict()}
    torch.save(checkpoint, folder / "small.pt")
    command = [sys.executable, HERE / "explorer.py", folder / "small.pt", "--out", folder / "page.html"]
    options = ["--steps", STEPS, "--guidance", GUIDANCE, "--seed", SEED, "--prompts", 2]
    subprocess.run([str(part) for part in command + options], check=True)
    return model, records_of((folder / "page.html").read_text(encoding="utf-8")), folder


# --- The records -----------------------------------------------------------------------------------------------------


def test_records_are_what_a_sampling_run_does(small):
    model, data, _ = small
    page, N = data["models"][0], 16
    prompts = ["a photo of a cat", "a photo of a dog"]
    assert [prompt["text"] for prompt in page["prompts"]] == prompts and page["name"] == "Photographs"
    levels = torch.linspace(1, 0, STEPS + 1)[:-1]
    assert page["levels"] == pytest.approx(levels.tolist(), abs=1e-4)
    assert page["columns"] == method.column_of(levels, 4).tolist() == [3, 3, 2, 1, 0]
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(SEED * 1_000_003 + i)) for i in range(2)]
    learned = model.ratios.detach()
    tables = {"learned": learned, "uniform": learned.mean().expand(3, 4), "reversed": learned[:, [3, 2, 1, 0]]}
    tables["dense"] = torch.zeros(3, 4)
    for table in page["tables"]:
        if table["name"] == "random tokens":
            continue
        ratios, inputs, entered, guesses = tables[table["name"]], [], [], []
        hooks = [layer.register_forward_pre_hook(lambda _, z, into=inputs: into.append(z[0])) for layer in model.layers]
        hooks.append(model.register_forward_pre_hook(lambda _, z, into=entered: into.append(z[0])))
        words = tools.encode(model.config, prompts)
        hook = lambda t, x0, into=guesses: into.append(x0)
        method.sample_images(model, words, torch.stack(noise), STEPS, GUIDANCE, ratios=ratios, hook=hook)
        for handle in hooks:
            handle.remove()
        processed, scores = unpack(page, table)
        assert np.allclose(table["ratios"], ratios, atol=1e-4)
        for step in range(STEPS):
            for layer in range(3):
                k = max(1, round(N * (1 - float(ratios[layer, page["columns"][step]]))))
                assert table["k"][step][layer] == k
                z = inputs[step * 3 + layer][:2]  # of the conditional half
                router = model.layers[layer].router
                score = torch.sigmoid(z @ router.weight[0] + router.bias).detach()
                for b in range(2):
                    best = set(score[b].topk(k).indices.tolist())
                    assert set(np.flatnonzero(processed[b, step, layer])) == best
                    assert np.abs(scores[b, layer, :, step] - 100 * score[b].numpy()).max() <= 0.51
            for b in range(2):
                for sheet, images in (("noisy", entered), ("guess", guesses)):
                    image = (images[step][b].permute(1, 2, 0).numpy() + 1) * 127.5
                    alike = np.corrcoef(tile(page, table[sheet], step, b).ravel(), image.clip(0, 255).ravel())[0, 1]
                    assert alike > 0.9, "JPEG blurs, but this is another image"
        total = tools.sampling_flops(model.config, ratios, STEPS, GUIDANCE)
        assert page["captionFlops"] + sum(table["flops"]) == total


def test_tokens_drawn_by_chance_have_the_learned_k_but_not_the_routers_choice(small):
    _, data, _ = small
    page = data["models"][0]
    learned, _, _, drawn, _ = page["tables"]
    assert drawn["name"] == "random tokens" and drawn["chance"] and not learned["chance"]
    assert (drawn["k"], drawn["flops"], drawn["ratios"]) == (learned["k"], learned["flops"], learned["ratios"])
    ours, theirs = (unpack(page, table)[0] for table in (learned, drawn))
    assert (ours.sum(axis=3) == theirs.sum(axis=3)).all() and 0.1 < (ours != theirs).mean() < 0.9
    k = np.array(page["tables"][3]["k"])
    step, layer = np.argwhere((k > 2) & (k < 14))[0]
    assert (theirs[0, step, layer] != theirs[1, step, layer]).any(), "each image draws its own"
    first = [tile(page, table["noisy"], 0, 0) for table in page["tables"]]
    assert all((image == first[0]).all() for image in first), "all tables start from the same noise"


def test_what_is_wrong_is_one_line_and_leaves_the_old_page(small, monkeypatch, capsys):
    _, _, folder = small
    page = folder / "page.html"
    dense = folder / "dense.pt"
    before = page.read_bytes()
    checkpoint = torch.load(folder / "small.pt")
    checkpoint["config"]["mode"] = "dense"
    checkpoint["ema"]["ratios"] = checkpoint["ema"]["ratios"][:, :1]
    torch.save(checkpoint, dense)

    def complaint(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["explorer.py", *map(str, arguments), "--out", str(page)])
        with pytest.raises(SystemExit) as stopped:
            tools.run_command(explorer.main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "dense.pt is a dense model" in complaint(dense)
    assert "missing.pt" in complaint(folder / "missing.pt")
    assert "--steps" in complaint("--steps", "1")
    monkeypatch.setattr(explorer, "LARGEST", 10_000)
    assert "at most 0.01" in complaint(folder / "small.pt", "--steps", 2, "--prompts", 1)
    assert page.read_bytes() == before


def test_the_page_in_the_repository_is_of_the_shipped_models_and_loads_nothing():
    text = explorer.PAGE.read_text(encoding="utf-8")
    data = records_of(text)
    frame = explorer.RECORDS.sub("", text)
    assert len(text.encode()) < 3_000_000 and len(explorer.RECORDS.findall(text)) == 1
    links = re.findall(r'<a [^>]*href="([^"]*)"', frame)
    outside = re.findall(r'(?:https?:)?//\w+\.[^"\s]*', frame)
    assert outside == [link for link in links if link.startswith("http")], "only links lead outside"
    assert (HERE / data["readme"]).samefile(ROOT / "README.md")
    for model, path in zip(data["models"], explorer.SHIPPED, strict=True):
        shipped, _ = tools.read_checkpoint(path)
        assert model["file"] == path.name and model["depth"] == shipped.config.depth
        assert np.allclose(model["tables"][0]["ratios"], shipped.ratios.detach(), atol=1e-4), "run explorer.py again"
    for prompt in data["models"][0]["prompts"]:
        held_out = any(f"{colour} {shape}" in prompt["text"] for colour, shape in explorer.HELD_OUT)
        assert prompt["kind"] == ("held out" if held_out else "seen")


def test_a_page_elsewhere_has_the_same_frame_and_finds_the_readme(small):
    _, data, folder = small
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert explorer.RECORDS.sub("", page) == explorer.RECORDS.sub("", explorer.PAGE.read_text(encoding="utf-8"))
    assert (folder / data["readme"]).resolve() == ROOT / "README.md"


# --- The page in a browser -------------------------------------------------------------------------------------------


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
    yield driver
    driver.quit()


def look(driver, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def open_page(driver, width: int) -> None:
    look(driver, width)
    driver.get(explorer.PAGE.as_uri())
    wait(driver, "return !!view[0].pictures && document.getElementById('clock').textContent !== ''")


def wait(driver, condition: str) -> None:
    end = time.monotonic() + 20
    while not driver.execute_script(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def text(driver, selector: str) -> str:
    return driver.find_element("css selector", selector).text


def picture(driver, selector: str) -> str:
    return driver.execute_script(f"return document.querySelector('{selector}').toDataURL()")


def in_sight(driver, selector: str) -> bool:
    box = "const box = document.querySelector(arguments[0]).getBoundingClientRect(); "
    return driver.execute_script(box + "return box.top >= 0 && box.bottom <= innerHeight && box.height > 20", selector)


def choose(driver, select: str, value: str) -> None:
    """As a user's choice; returns when the page shows it."""
    change = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    driver.execute_script(change, driver.find_element("id", select), value)
    built = "return `${state.model} ${state.tables}` === render.built && document.getElementById('prompt').value === "
    wait(driver, built + "`${state.model} ${state.prompt}`")


@pytest.mark.parametrize("width", [1280, 375])
def test_a_walk_through_the_page(chromium, width):
    """Opened, stepped, a cell clicked with the guesses in sight, a token pointed at, tables and prompts, questions."""
    open_page(chromium, width)
    loaded = "return performance.getEntriesByType('resource').filter(e => !/^data:/.test(e.name))"
    assert chromium.execute_script(loaded) == []
    assert "step 20 of 20" in text(chromium, "#clock")
    assert chromium.execute_script("return tables().map(table => table.name)") == ["learned", "dense"]

    model = records_of(explorer.PAGE.read_text(encoding="utf-8"))["models"][0]  # what is drawn is what is recorded
    processed, scores = unpack(model, model["tables"][0])
    for layer in range(model["depth"]):
        seen = chromium.execute_script("return routing(tables()[0], arguments[0], 7)", layer)
        assert seen["processed"] == processed[0, 7, layer].tolist() and seen["k"] == sum(seen["processed"])
        assert np.allclose(seen["score"], scores[0, layer, :, 7] / 100)

    cell = "#table .pane button[data-layer='4'][data-column='8']"
    before = [picture(chromium, "#seen0"), picture(chromium, "#seen1"), picture(chromium, "#layers .pane canvas")]
    cost = text(chromium, "#bill .cost")
    element = chromium.find_element("css selector", cell)
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()
    assert "t = 0.90" in text(chromium, "#clock") and text(chromium, "#h-close") == "Layer 5, up close"
    after = [picture(chromium, "#seen0"), picture(chromium, "#seen1"), picture(chromium, "#layers .pane canvas")]
    assert all(old != new for old, new in zip(before, after)) and text(chromium, "#bill .cost") != cost
    for selector in (cell, "#seen0", "#seen1", "#prompt", "#table0", "#table1", "#play"):
        assert in_sight(chromium, selector), selector
    element.send_keys("\ue013\ue007")  # arrow up, Enter
    assert text(chromium, "#h-close") == "Layer 4, up close"

    box = chromium.find_element("css selector", "#layers .map")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", box)
    box.send_keys("\ue014")  # arrow right
    assert chromium.execute_script("return [state.layer, state.token]") == [0, 1]
    assert "row 1, column 2" in text(chromium, "#token") and "score" in text(chromium, "#token")

    images = set()
    chromium.find_element("id", "step").send_keys("\ue010")  # End
    for i in range(5):
        choose(chromium, "table1", str(i))
        images.add(picture(chromium, "#seen1"))
    assert len(images) == 5
    choose(chromium, "prompt", "1 0")
    assert text(chromium, "#kind").startswith("\u201ca photo of an airplane\u201d") and "airplane" in text(
        chromium, "#prompt"
    )

    for number, names in (("1", "learned,dense"), ("2", "learned,reversed"), ("3", "random tokens,uniform")):
        details = chromium.find_element("id", f"q{number}")
        assert not details.find_element("tag name", "p").is_displayed()
        chromium.execute_script("arguments[0].open = true", details)
        assert not details.text.strip().endswith("?") and len(details.text) > 200
        button = chromium.find_element("css selector", f"[data-show='{number}']")
        chromium.execute_script("arguments[0].click()", button)
        wait(chromium, f"return String(tables().map(table => table.name)) === '{names}' && state.model === 0")
    assert chromium.get_log("browser") == []


def test_no_sideways_scrolling_every_control_has_a_name_and_the_dark_is_followed(chromium):
    open_page(chromium, 1280)
    for width in (375, 320, 768, 1280):
        look(chromium, width)
        for prompt in ("0 0", "1 0"):
            choose(chromium, "prompt", prompt)
            assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    nodes = chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [node for node in nodes if not node["ignored"]]
    controls = ("button", "combobox", "slider", "application", "image", "link")
    names = [(z["role"]["value"], z["name"]["value"]) for z in nodes if z.get("role", {}).get("value") in controls]
    assert len(names) > 150 and all(name for _, name in names), [role for role, name in names if not name]
    assert {"button", "slider", "application", "link"} <= {role for role, _ in names}
    colour = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    light = chromium.execute_script(colour)
    look(chromium, 1280, dark=True)
    dark = chromium.execute_script(colour)
    bright, dim = [sum(map(int, re.findall(r"\d+", colours[0]))) for colours in (light, dark)]
    assert bright > 600 and dim < 150 and light[1] != dark[1]
    assert chromium.get_log("browser") == []
