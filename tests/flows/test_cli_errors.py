"""Bad input: one message, exit code 2, no traceback, nothing lost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app, main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["popalign", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_every_command_that_the_readme_names_is_there_and_every_other_is_named() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = text[text.index("## Commands") : text.index("`-w FOLDER` names")]
    named: set[str] = set()
    for line in re.findall(r"^\| `popalign (.+?) \|", table, re.MULTILINE):
        group, *others = re.findall(r"(?:^|`)([a-z-]+)", line)
        named |= {group, *others}
    found = get_command(app).commands
    inner = {name for command in found.values() for name in getattr(command, "commands", {})}
    assert named <= {*found, *inner}
    assert set(found) <= named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "sdxxl"], "unknown preset 'sdxxl'. Known: emoji, sdxl, sdxl-paper"),
        (["plan", "emoji", "--set", "expansion.axes=height"], "perceived_gender"),
        (["plan", "emoji", "--set", "expansion.prompts=eval=/nowhere/x.txt"], "/nowhere/x.txt"),
        (["plan", "emoji", "--set", "sampling.steps"], "has no '='"),
        (["plan", "emoji", "--set", "sampling.speed=3"], "unknown setting 'sampling.speed'"),
        (["plan", "emoji", "--set", "sampling.steps=0"], "sampling.steps: Input should be greater than 0 (got '0')"),
        (["plan", "emoji", "--set", "classification.judge=emoji-clip"], "judged by their own maker"),
        (["compare-samplers", "emoji", "--run-id", "x"], "there is nothing to compare"),
        (
            ["compare-samplers", "emoji", "--run-id", "x", "--set", "sampling.approximate.steps=10"],
            "approximate.steps is 10, not fewer than the 10 of steps",
        ),
        (
            (
                "compare-samplers emoji --run-id x --set sampling.approximate.steps=4 "
                "--set sampling.approximate.distilled_lora=./nowhere"
            ).split(),
            "there is no LoRA folder ./nowhere",
        ),
        (["plan", "emoji", "--set", "sampling.approximate=1"], "unknown setting 'sampling.approximate'"),
        (["run", "emoji", "--run-id", "../x"], "run id '../x' is not usable"),
    ],
)
def test_bad_arguments_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_a_newer_workspace_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "workspace.json").write_text(json.dumps({"schema_version": 99}))
    assert run(monkeypatch, "status", "-w", str(tmp_path)) == 2
    assert "schema 99" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["workspace.json"]


def test_square_brackets_are_text(tmp_path: Path) -> None:
    assert (
        CliRunner()
        .invoke(app, ["sql", "SELECT '[/x] [bold]' AS said", "-w", str(tmp_path)])
        .output.count("[/x] [bold]")
    )


def test_square_brackets_in_a_message_are_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "[/x]") == 2
    assert "unknown preset '[/x]'" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_prefect() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flows.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'prefect'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trend_of_no_run_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    assert run(monkeypatch, "trend", "-w", str(tmp_path)) == 2
    assert "there is no run in this workspace" in capsys.readouterr().err


def test_the_module_itself_is_the_command() -> None:
    asked = subprocess.run([sys.executable, "-m", "flows.cli", "show", "--nonsense"], check=False, capture_output=True)
    assert asked.returncode == 2
    assert b"--nonsense" in asked.stderr
