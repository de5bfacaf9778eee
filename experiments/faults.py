"""Does a run survive being killed, and do the commands survive hostile files? Counts, not opinions.

    pip install hypothesis
    python experiments/faults.py                       # minutes on two CPU cores; results go to experiments/faults.json

Kills: a real training process that saves at every step is killed with SIGKILL at random moments, half of them counted
from its first new checkpoint (so that they fall into training and saving), half from its start (so that they fall into
start-up and resuming too). Each time the checkpoint on disk must be whole, and at the end the run must equal, bit for
bit, one that was never killed.

Inputs: malformed checkpoints, settings, tables, pictures and flags, some made by hand and most by hypothesis. Each goes
through a whole command. The only good ends are success, or exit code 2 with one line on standard error, and in both
cases the input file must be as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample
import train_cifar

TINY = shlex.split(
    "--dataset shapes --image-size 16 --dim 16 --depth 2 --heads 2 --patch-size 4 --timestep-regions 3 --batch-size 6 "
    "--dense-fraction 0.1 --ratio-lr 0.02 --device cpu --log-every 2"
)


# --- kills -----------------------------------------------------------------------------------------------------------


def kills(count: int, steps: int, folder: Path) -> dict:
    """Kill a run `count` times, finish it, and compare it with an unbroken one."""
    line = [sys.executable, str(ROOT / "train_cifar.py"), *TINY, "--steps", str(steps), "--save-every", "1"]
    whole, broken = folder / "whole", folder / "broken"
    subprocess.run([*line, "--out", str(whole)], check=True, capture_output=True)
    rng, checkpoint = random.Random(0), broken / "checkpoint.pt"
    result = {"kills": 0, "survived": 0, "while writing": 0, "before the first new checkpoint": 0, "steps": steps}
    while result["kills"] < count:
        begun = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        resume = ["--resume"] if begun else []
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*line, "--out", str(broken), *resume], **quiet)

        def saved(since: int = begun) -> bool:
            return checkpoint.exists() and checkpoint.stat().st_mtime_ns > since

        if result["kills"] % 2:
            time.sleep(rng.uniform(0, 6))
        else:
            while process.poll() is None and not saved():
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.4))
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed; give more --kill-steps")
        process.send_signal(signal.SIGKILL)
        process.wait()
        result["kills"] += 1
        result["while writing"] += (broken / "checkpoint.pt.part").exists()
        result["before the first new checkpoint"] += not saved()
        if checkpoint.exists():
            sample.build_model(sample.read_checkpoint(checkpoint), checkpoint, "model")
        result["survived"] += 1
        print(f"kill {result['kills']}: checkpoint whole", flush=True)
    subprocess.run([*line, "--out", str(broken), "--resume"], check=True, capture_output=True)
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, broken))
    for name in ("model", "ema"):
        assert all(torch.equal(value, b[name][key]) for key, value in a[name].items()), name
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, broken)
    ]
    assert lines[0] == lines[1], "metrics"
    return result | {"equals the unbroken run": True}


# --- malformed inputs ------------------------------------------------------------------------------------------------


class Bench:
    """Runs commands in this process on malformed input and counts how they end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts, self.bad, self.kind = folder, {}, [], ""
        self.canary = folder / "executed"
        os.chdir(folder)
        self.run(train_cifar, [*TINY, "--steps", "6", "--save-every", "3", "--out", "run"])
        self.whole = Path("run/checkpoint.pt").read_bytes()
        self.checkpoint = torch.load("run/checkpoint.pt", weights_only=True)

    def run(self, module, arguments: list[str]) -> tuple[str, str]:
        """The end of a command, "success", "refused" or "bad", and what it said."""
        error = io.StringIO()
        old, sys.argv = sys.argv, [module.__file__, *arguments]
        try:
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                sample.run_command(module.main)
        except SystemExit as end:
            said = error.getvalue().split("\r")[-1].split("]\n")[-1]
            if not end.code:
                return "success", ""
            good = end.code == 2 and said.startswith("error: ") and said.count("\n") == 1
            return "refused" if good else "bad", said
        except BaseException as problem:  # noqa: BLE001 - this is what is looked for
            return "bad", f"{type(problem).__name__}: {problem}"
        finally:
            sys.argv = old
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
        raise AssertionError("run_command always exits")

    def attempt(self, module, arguments: list[str], *inputs: Path, only: str = "") -> None:
        """Run a command and count its end; `only` demands one end. The input files must stay as they were."""
        before = [path.read_bytes() for path in inputs]
        end, said = self.run(module, arguments)
        if [path.read_bytes() for path in inputs] != before or self.canary.exists() or (only and end != only):
            end, said = "bad", f"changed its input, ran a payload, or did not end in {only!r}: {said}"
        self.counts.setdefault(self.kind, Counter())[end] += 1
        if end == "bad":
            self.bad.append((self.kind, " ".join(arguments)[:300], said[:300]))

    def sample_from(self, content: object, only: str = "") -> None:
        """Sample from a checkpoint of these contents (bytes, or something to save)."""
        path = Path("fuzzed.pt")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        self.attempt(sample, ["--checkpoint", str(path), "--steps", "1", "--out", "s.png"], path, only=only)

    def resume_from(self, content: object, metrics: bytes = b"") -> None:
        """Go on with a run that has these contents."""
        out = Path("resumed")
        out.mkdir(exist_ok=True)
        path = out / "checkpoint.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        (out / "metrics.jsonl").write_bytes(metrics)
        before = path.read_bytes()
        self.attempt(train_cifar, ["--dataset", "shapes", "--out", str(out), "--resume"])
        if path.read_bytes() != before:  # it trained on: what it saved must be whole
            sample.build_model(sample.read_checkpoint(path), path, "model")


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8),
    st.sampled_from([10**9, -1, 0, 0.5, math.nan, math.inf, 2**63, "", "16", [], {}, [[]], (1, 2), "a\x1b[2Jb\nc"]),
    st.lists(st.integers(), max_size=3), st.builds(torch.zeros, st.integers(0, 3)),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("ratios"), inner),
    max_leaves=12,
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file with some bytes changed, removed, put in, or its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "remove", "insert", "cut", "zero"])):
            case "change":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=6))
            case "remove":
                del data[place : place + draw(st.integers(1, 5000))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=40))
            case "zero":
                size = min(draw(st.integers(1, 3000)), len(data) - place)
                data[place : place + size] = bytes(size)
            case "cut":
                del data[place:]
    return bytes(data)


class Payload:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def malformed_inputs(bench: Bench, examples: int) -> None:
    """All kinds of malformed input, each counted under its name."""
    state, config = bench.checkpoint, bench.checkpoint["config"]

    def fuzz(kind: str, strategy: st.SearchStrategy, share: float = 1.0):
        """Run the decorated function on examples of the strategy, and count under `kind`."""

        def run(function) -> None:
            bench.kind = kind
            options = {"max_examples": max(5, round(share * examples)), "deadline": None, "database": None}
            options |= {"derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
            settings(**options)(given(strategy)(function))()
            print(f"{kind}: {dict(bench.counts[kind])}", flush=True)

        return run

    bench.kind = "payloads, by hand"
    touch = Payload(Path.touch, bench.canary)
    torch.save(touch, "legacy.pt", _use_new_zipfile_serialization=False)
    system = Payload(os.system, f"touch {bench.canary}")
    contents = [touch, state | {"x": touch}, state | {"ema": state["ema"] | {"ratios": touch}}, state | {"x": system}]
    contents += [state | {"config": config | {"dim": touch}}, state | {"settings": touch}, state | {"prompts": [touch]}]
    contents += [pickle.dumps(touch), pickle.dumps(state["config"]), Path("legacy.pt").read_bytes(), b"", b"PK\x03\x04"]
    contents += [state | {"x": Payload(exec, "open('executed', 'w')")}, state | {"x": Payload(eval, "1 / 0")}]
    for content in contents:
        bench.sample_from(content, only="refused")
        bench.resume_from(content)
    print(f"{bench.kind}: {dict(bench.counts[bench.kind])}", flush=True)

    bench.kind = "configs, by hand"
    words = [f"w{i}" for i in range(10**5)]
    for change in (
        {"dim": 10**9}, {"dim": -4}, {"dim": 16.0}, {"dim": "16"}, {"dim": True}, {"dim": 2**70}, {"depth": -1}, {"depth": 0},
        {"depth": 10**7}, {"heads": 0}, {"heads": 3}, {"regions": 0}, {"regions": 10**8}, {"image_size": 10**6},
        {"image_size": 0}, {"image_size": 1024, "patch_size": 1}, {"patch_size": 0}, {"patch_size": 5}, {"mode": "fast"},
        {"mode": None}, {"mode": "dense"}, {"vocabulary": words}, {"vocabulary": []}, {"vocabulary": ["a", "a"]},
        {"vocabulary": [1, 2]}, {"vocabulary": "abc"}, {"vocabulary": [["a"]]}, {"caption_length": 0}, {"more": 1},
        {"caption_length": 10**9},
    ):  # fmt: skip
        bench.sample_from(state | {"config": config | change}, only="refused")
    for name in config:
        bench.sample_from(state | {"config": {k: v for k, v in config.items() if k != name}}, only="refused")
    print(f"{bench.kind}: {dict(bench.counts[bench.kind])}", flush=True)

    @fuzz("bytes of a checkpoint, sampled from", damaged(bench.whole))
    def _(data: bytes) -> None:
        bench.sample_from(data)

    @fuzz("bytes of a checkpoint, resumed", damaged(bench.whole))
    def _(data: bytes) -> None:
        bench.resume_from(data)

    @fuzz("configs", st.dictionaries(st.sampled_from(sorted(config)), ODD, min_size=1, max_size=3))
    def _(change: dict) -> None:
        bench.sample_from(state | {"config": config | change})

    tensors = st.one_of(
        ODD,
        st.builds(torch.zeros, st.lists(st.integers(0, 40), max_size=3)),
        st.sampled_from(["drop", "int", "complex", "half", "sparse", "nan", "inf", "bool", "one row more", "minus"]),
    )

    @fuzz("tensors", st.tuples(st.sampled_from([*sorted(state["ema"]), "extra", "ratios", "ratios"]), tensors))
    def _(change: tuple) -> None:
        name, value = change
        old = state["ema"].get(name, torch.ones(2, 2))
        changes = {
            "drop": None, "int": old.int(), "complex": old.to(torch.complex64), "half": old.half(), "bool": old.bool(),
            "sparse": old.to_sparse(), "nan": old * math.nan, "inf": old + math.inf, "one row more": torch.cat([old, old]),
            "minus": -old - 1,
        }  # fmt: skip
        value = changes.get(value, value) if isinstance(value, str) else value
        ema = {key: other for key, other in state["ema"].items() if key != name}
        bench.sample_from(state | {"ema": ema if value is None else ema | {name: value}})

    entries = st.sampled_from([*sorted(state), "drop"])

    @fuzz("entries of a checkpoint", st.tuples(entries, ODD, entries))
    def _(change: tuple) -> None:
        fuzzed = {key: value for key, value in (state | {change[0]: change[1]}).items() if key != change[2]}
        bench.sample_from(fuzzed)
        bench.resume_from(fuzzed)

    @fuzz("settings of a run", st.dictionaries(st.sampled_from(sorted(state["settings"])), ODD, min_size=1, max_size=2))
    def _(change: dict) -> None:
        if type(change.get("steps")) is int:
            change["steps"] = min(change["steps"], 8)  # more would be a valid, long run
        bench.resume_from(state | {"settings": state["settings"] | change, "step": 5})

    moments = st.sampled_from(["exp_avg", "exp_avg_sq", "step", "all"])

    @fuzz("state of the optimizer", st.tuples(st.integers(0, 9), moments, tensors))
    def _(change: tuple) -> None:
        number, name, value = change
        states = {key: dict(one) for key, one in state["optimizer"]["state"].items()}
        if name == "all":
            states[number] = value
        elif value == "drop":
            del states[number][name]
        else:
            states[number][name] = value
        bench.resume_from(state | {"optimizer": state["optimizer"] | {"state": states}, "step": 5})

    @fuzz("lines of metrics.jsonl", st.binary(max_size=60) | JSON.map(lambda x: json.dumps(x).encode() + b"\n"))
    def _(lines: bytes) -> None:
        bench.resume_from(bench.whole, lines)

    table = json.dumps({"ratios": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}).encode()
    rows = st.lists(st.lists(st.one_of(st.floats(), ODD.filter(lambda x: type(x) in (int, str, bool))), max_size=3))

    @fuzz("ratio tables", st.one_of(JSON, rows, rows.map(lambda x: {"ratios": x}), damaged(table), st.binary()), 2)
    def _(content: object) -> None:
        path = Path("table.json")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        arguments = ["--checkpoint", "run/checkpoint.pt", "--ratios", str(path), "--steps", "1", "--out", "s.png"]
        bench.attempt(sample, arguments, path)

    pictures = []
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.effect_noise((20, 20), 90).save(file, form)
        pictures.append(file.getvalue())
    mask = Path("mask.png")
    mask.write_bytes(pictures[0])

    @fuzz("pictures", st.one_of(*(damaged(picture) for picture in pictures), st.binary()), 2)
    def _(data: bytes) -> None:
        path = Path("data/train/frog/0.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        arguments = ["--checkpoint", "run/checkpoint.pt", "--inpaint", str(path), "--mask", str(mask), "--steps", "1"]
        bench.attempt(sample, [*arguments, "--out", "s.png"], path, mask)
        out = tempfile.mkdtemp(dir=bench.folder)
        arguments = ["--dataset", "folder", "--data-dir", "data", "--out", out, "--steps", "0"]
        bench.attempt(train_cifar, [*TINY, *arguments], path)

    flags = st.sampled_from([f"--{name}" for name in train_cifar.FLAGS if name not in ("out", "data-dir")])
    values = st.one_of(st.text(max_size=6), st.integers(-(10**20), 3).map(str), st.floats().map(str))

    @fuzz("flags of train_cifar.py", st.tuples(flags, values))
    def _(flag: tuple) -> None:
        if flag[0] != "--steps" or not flag[1].isdigit():
            out = tempfile.mkdtemp(dir=bench.folder)
            bench.attempt(train_cifar, [*TINY, "--steps", "0", "--out", out, f"{flag[0]}={flag[1]}"])

    flags = st.sampled_from(
        shlex.split("checkpoint prompt num steps guidance seed batch-size device inpaint mask ratios")
    )

    @fuzz("flags of sample.py", st.tuples(flags, values))
    def _(flag: tuple) -> None:
        arguments = ["--checkpoint", "run/checkpoint.pt", "--steps", "1", "--out", "s.png", f"--{flag[0]}={flag[1]}"]
        bench.attempt(sample, arguments)


def main() -> None:
    parser = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-steps", type=int, default=1500, help="steps of the run that is killed")
    parser.add_argument("--examples", type=int, default=40, help="malformed inputs of each fuzzed kind")
    args = parser.parse_args()
    results: dict = {"torch": torch.__version__}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            results["kills"] = kills(args.kills, args.kill_steps, Path(folder))
            print(results["kills"])
        if args.examples:
            bench = Bench(Path(folder).resolve())
            malformed_inputs(bench, args.examples)
            total = sum(bench.counts.values(), Counter())
            results["inputs"] = {kind: dict(count) for kind, count in bench.counts.items()} | {"all": dict(total)}
            for kind, arguments, said in bench.bad:
                print(f"BAD ({kind}): {arguments}\n    {said}")
            print(f"{total.total()} malformed inputs: {dict(total)}")
        os.chdir(here)
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
