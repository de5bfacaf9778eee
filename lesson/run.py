"""Run a command of the project with another file in the place of diffratio_mod.py: your answers, or a changed copy.

    python lesson/run.py my_solution.py sample.py --prompt "a red circle above a blue square"
    python lesson/run.py my_solution.py train_cifar.py --dataset shapes --init assets/shapes_dense.pt
    python lesson/run.py my_solution.py lesson/race.py dense learned
    python lesson/run.py my_solution.py -m pytest -k method             # a module, as in `python -m`

All that stands behind the script is for the script. The original file stays as it is.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from diffratio_mod import InputError

PUBLIC = ("Config", "InputError", "Layer", "RoutedLayer", "DiT", "column_of", "ratio_loss", "tokens_processed")
PUBLIC += ("ratio_gate", "schedule", "diffusion_loss", "sample_images", "encode", "words_of", "normalise")


def read_source(path: Path) -> str:
    """The text of a Python file. Raises InputError if it is none."""
    if path.exists() and not path.is_file():  # a folder, or a pipe that never ends
        raise InputError(f"cannot read {path}: it is no file")
    try:
        source = path.read_text(encoding="utf-8-sig")
        compile(source, str(path), "exec")
        ast.parse(source)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not UTF-8 text; blank.py --out writes such a file, `>` in PowerShell does not"
        ) from None
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}: Python cannot read it") from None
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes; brackets without end
        raise InputError(f"{path} is no Python file: {error}") from None
    return source


def why_it_stops(path: Path, error: BaseException) -> str:
    """One line for an error at import, with the last line of this file that was run."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    place = f" (line {lines[-1]})" if lines else ""
    return f"{path} stops while it is imported: {text[:500]}{place}"


def load(source: str, path: Path, name: str = "diffratio_mod", whole: bool = True) -> types.ModuleType:
    """A source as a module that can be imported under this name. Raises InputError if it is no solution.

    If it need not be `whole`, some of the public names are enough.
    """
    code = compile(source, str(path), "exec")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    before = sys.modules.get(name)
    sys.modules[name] = module  # a dataclass looks its module up there
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise InputError(why_it_stops(path, error)) from None
    missing = [public for public in PUBLIC if not hasattr(module, public)]
    if missing and (whole or len(missing) == len(PUBLIC)):
        sys.modules.pop(name)
        raise InputError(f"{path} is not a version of diffratio_mod.py: it has no {', '.join(missing[:3])}")
    return module


def run(arguments: list[str]) -> None:
    """Run what the command line says. Raises InputError."""
    if len(arguments) < 2 or (arguments[1] == "-m" and len(arguments) < 3):
        raise InputError("give a solution and a script: python lesson/run.py my_solution.py sample.py; see --help")
    solution, script, *others = arguments
    if script != "-m" and not Path(script).is_file():
        raise InputError(f"there is no script {script} here; run this in the folder of the project")
    path = Path(solution)
    load(read_source(path), path)
    try:
        if script == "-m":
            sys.argv = others
            sys.path[:2] = [os.getcwd(), str(ROOT)]  # in place of this file's folder, as Python does for the script
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [script, *others]
            sys.path[:2] = [str(Path(script).resolve().parent), str(ROOT)]
            runpy.run_path(script, run_name="__main__")
    except NotImplementedError as error:
        raise InputError(f"{solution} is not filled in: {error}") from None


if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        run(sys.argv[1:])
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
