"""The command-line shell: lazy imports, errors, exit codes, plug-ins."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import alloy
from alloy import cli
from alloy.errors import AlloyError, DataError, InterruptedRun

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(alloy.__file__).parents[1])}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("code", "limit_s"),
    [
        ("import alloy", 0.3),
        (
            "import sys; from alloy.cli import main\nsys.stdout = sys.stderr\ntry: main(['--help'])\nexcept SystemExit: pass",
            0.6,
        ),
    ],
    ids=["import", "help"],
)
def test_start_up_is_quick(code: str, limit_s: float) -> None:
    """Processor time from the start of the interpreter to the end, the best of five; other work on the machine is left out."""
    code += "\nimport sys, time; print(time.process_time(), file=sys.__stdout__)"
    assert min(float(python(code).stdout) for _ in range(5)) < limit_s


@pytest.mark.parametrize(
    "code",
    [
        "import alloy; dir(alloy)",
        "import alloy.cli",
        "from alloy.cli import main\ntry: main(['--help'])\nexcept SystemExit as end: assert end.code == 0",
    ],
)
def test_start_up_imports_nothing_heavy(code: str) -> None:
    """`import alloy` and `alloy --help` stay quick because these are not loaded."""
    heavy = (
        "torch",
        "pydantic",
        "transformers",
        "numpy",
        "matplotlib",
        "jinja2",
        "tokenizers",
        "huggingface_hub",
        "pyarrow",
    )
    done = python(f"import sys\n{code}\nprint('loaded', *(name for name in {heavy} if name in sys.modules))")
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "loaded"


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command of the table with its line."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.help.split()[0]}" in words


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_exists(name: str) -> None:
    """Its module can be imported and has the attribute; `alloy COMMAND --help` works."""
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])


def test_mistyped_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the nearest name."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctr"])
    assert "Did you mean 'doctor'?" in " ".join(capsys.readouterr().err.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The distribution's name and version."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"alloy-lm {alloy.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("corpus is empty; give text"), 4, "error: corpus is empty; give text\n"),
        (AlloyError("check failed"), 1, "error: check failed\n"),
        (InterruptedRun("interrupted at step 3", 143), 143, "error: interrupted at step 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (FileExistsError(17, "File exists", "x"), 2, "error: x: File exists; a file stands where a folder is wanted; "),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied; change the permissions or "),
        (IsADirectoryError(21, "Is a directory", ".x.tmp", None, "x"), 2, "error: x: Is a directory; a folder stands "),
        (OSError(30, "Read-only file system", "x"), 2, "error: x: Read-only file system; choose a path on a disk"),
        (OSError(28, "No space left on device"), 3, "error: the disk is full or the quota used up (No space left"),
    ],
)
def test_errors_are_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    """No traceback for what the user can mend."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "load_command", lambda name: _command(fail))
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == code
    text = capsys.readouterr().err
    assert text.startswith(said)
    assert text.count("\n") == 1


def _command(function: Any) -> Any:
    import typer

    single = typer.Typer(add_completion=False)
    single.command("fail")(function)
    return typer.main.get_command(single)


def test_internal_error_keeps_its_traceback() -> None:
    """Exit code 1."""
    done = python("from alloy import cli\ncli.load_command = lambda name: 1 / 0\ncli.main(['doctor'])")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_interrupt(number: signal.Signals, said: str) -> None:
    """A real SIGINT ends with 130, SIGTERM with 143; half-written files are cleared away, and there is no traceback."""
    code = (
        "import os, typer\nfrom alloy import cli\n"
        f"def wait():\n    try:\n        os.kill(os.getpid(), {int(number)})\n    finally:\n        print('cleared')\n"
        "single = typer.Typer(add_completion=False)\nsingle.command('x')(wait)\n"
        "cli.load_command = lambda name: typer.main.get_command(single)\ncli.main(['doctor'])"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleared\n", f"error: {said}\n")


def test_reader_goes_away() -> None:
    """As `alloy ... | head` does: exit code 0, and nothing on standard error."""
    code = (
        "import typer\nfrom alloy import cli\n"
        "def talk():\n    for i in range(100_000):\n        typer.echo(i)\n"
        "single = typer.Typer(add_completion=False)\nsingle.command('x')(talk)\n"
        "cli.load_command = lambda name: typer.main.get_command(single)\ncli.main(['doctor'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_module_runs_as_a_program() -> None:
    """`python -m alloy`, as torchrun calls it."""
    done = subprocess.run(
        [sys.executable, "-m", "alloy", "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"alloy-lm {alloy.__version__}\n"


def install(folder: Path, name: str, entry: str) -> None:
    """A distribution's metadata with one plug-in."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[alloy.plugins]\n{name} = {entry}\n")


def test_plugins_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callable of each entry point is called before the command."""
    install(tmp_path, "myplug", "myplug_module:register")
    (tmp_path / "myplug_module.py").write_text("calls = []\ndef register():\n    calls.append(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    import myplug_module

    assert myplug_module.calls == [1]


@pytest.mark.parametrize("entry", ["no_such_module:register", "json:no_such_function"])
def test_broken_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entry: str
) -> None:
    """Its name, what it points at, and exit code 2."""
    install(tmp_path, "badplug", entry)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--version"])
    assert f'error: plug-in "badplug" ({entry}) cannot be loaded' in capsys.readouterr().err


def test_public_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are listed; unknown ones are refused."""
    from alloy.core.recipe import Recipe

    assert alloy.Recipe is Recipe
    assert alloy.AlloyError is AlloyError
    assert set(alloy.__all__) <= set(dir(alloy))
    with pytest.raises(AttributeError, match="module 'alloy' has no attribute 'laod'"):
        alloy.laod  # noqa: B018


def test_other_distribution_named_alloy(tmp_path: Path) -> None:
    """Installed over ours, its metadata lies beside the package: one sentence says so."""
    (tmp_path / "alloy").symlink_to(Path(alloy.__file__).parent)
    (tmp_path / "alloy_lm-0.1.dist-info").mkdir()
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import alloy"]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    (tmp_path / "alloy-1.0.dist-info").mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (
        "another distribution named `alloy` is installed over alloy-lm: pip uninstall alloy"
        in done.stderr.splitlines()[-1]
    )


def test_version_agrees_with_the_build_file() -> None:
    """The wheel takes its version from the package."""
    file = Path(alloy.__file__).parents[2] / "pyproject.toml"
    if not file.is_file():
        pytest.skip("not a source tree")
    assert tomllib.loads(file.read_text())["tool"]["hatch"]["version"]["path"] == "src/alloy/__init__.py"
